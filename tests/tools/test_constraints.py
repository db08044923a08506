"""constraints.txt pins what both Detectron2s ask for, to versions that they and each other allow."""

from pathlib import Path

import install_detectron2
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"

# install_requires of facebookresearch/detectron2's setup.py at OFFICIAL_COMMIT of tools/install_detectron2.py
OFFICIAL_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
OFFICIAL_REQUIREMENTS = [
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "dataclasses; python_version<'3.7'",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "black",
    "packaging",
]
# What these ask for in turn, by the metadata of the pinned releases; of tensorboard and matplotlib, which many others
# need as well, the suite itself would notice.
THEIR_REQUIREMENTS = {
    "fvcore": "numpy yacs>=0.1.6 pyyaml>=5.1 tqdm termcolor>=1.1 Pillow tabulate iopath>=0.1.7",
    "iopath": "tqdm portalocker",
    "omegaconf": "antlr4-python3-runtime==4.9.* PyYAML>=5.1.0",
    "hydra-core": "omegaconf<2.4,>=2.2 antlr4-python3-runtime==4.9.* packaging",
    "black": "click>=8.0.0 mypy-extensions>=0.4.3 packaging>=22.0 pathspec>=1.0.0 platformdirs>=2 pytokens~=0.4.0",
    "yacs": "PyYAML",
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def pins(python_version) -> dict[str, str]:
    """Name -> version for that Python."""
    found = {}
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and not specifier.version.endswith("*"), line
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python_version}):
                name = canonicalize_name(requirement.name)
                assert name not in found, f"{name} is pinned twice for Python {python_version}"
                found[name] = specifier.version
    return found


def test_the_requirements_are_those_of_the_commit_that_is_installed():
    assert install_detectron2.OFFICIAL_COMMIT == OFFICIAL_COMMIT


@pytest.mark.parametrize("python_version", PYTHONS)
def test_pins_are_what_both_detectron2s_allow(python_version):
    pinned = pins(python_version)
    requirements = [*OFFICIAL_REQUIREMENTS, *install_detectron2.SDIST_REQUIREMENTS]
    requirements += [text for of_one in THEIR_REQUIREMENTS.values() for text in of_one.split()]
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python_version}):
            continue
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{text} is not pinned"
        assert requirement.specifier.contains(version), f"{text} is asked for, and {version} pinned"
