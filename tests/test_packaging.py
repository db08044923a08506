"""What is built and travels: source distribution, wheel, metadata; and that an installed wheel is all it takes."""

import ast
import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gs_d2 import __version__, model_zoo

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = re.compile(r"\.(ci|github)/|\.gitignore$|\.pre-commit-config\.yaml$")  # of a repository, not of a release


def files_of_checkout() -> list[str]:
    """What git has."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def files_of_package() -> set[str]:
    """What a wheel has but for the extension and the metadata."""
    files = {name for name in files_of_checkout() if name.startswith("gs_d2/")}
    return files | {f"gs_d2/model_zoo/configs/{name}" for name in model_zoo.list_configs()}


def run(*command, cwd, **variables) -> str:
    """What a command prints, without a gs_d2 of this checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory):
    """A checkout to build in, which leaves the real one clean."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in files_of_checkout():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def sdist(copied_tree, tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=copied_tree)
    (archive,) = folder.iterdir()
    assert archive.name == f"gs_d2-{__version__}.tar.gz"
    shutil.unpack_archive(archive, folder)
    return folder / f"gs_d2-{__version__}"


def test_the_source_distribution_is_the_checkout(sdist):
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    made = {name for name in found if name.startswith("gs_d2.egg-info/") or name in ("PKG-INFO", "setup.cfg")}
    assert found - made == {name for name in files_of_checkout() if not NOT_SHIPPED.match(name)}


def test_metadata(sdist):
    metadata = email.message_from_string((sdist / "PKG-INFO").read_text())
    assert metadata["Version"] == __version__
    assert metadata["License"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    (doi,) = re.findall(r"^  doi: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert metadata.get_all("Project-URL") == [f"Paper, https://doi.org/{doi}"]
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)} <= set(
        metadata.get_all("Classifier")
    )


def test_every_package_that_is_imported_is_required_or_an_extra(sdist):
    imported = set()
    for path in (ROOT / "gs_d2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    imported -= sys.stdlib_module_names | {"gs_d2", "detectron2"}  # why not Detectron2: setup.py
    assert {"torch", "scipy", "timm", "safetensors"} <= imported
    names = {"PIL": "pillow", "cv2": "opencv-python", "yaml": "pyyaml"}
    requirements = email.message_from_string((sdist / "PKG-INFO").read_text()).get_all("Requires-Dist")
    required = {re.match(r"[\w-]+", line)[0] for line in requirements}
    assert {names.get(name, name) for name in imported} <= required


def test_a_build_holds_the_configs_and_nothing_of_an_earlier_one(copied_tree, tmp_path):
    package = tmp_path / "gs_d2"
    left = [package / "modeling" / "gone.py", package / "model_zoo" / "configs" / "gone.yaml"]
    extension = package / "_C.abi3.so"
    for path in [*left, extension]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path, cwd=copied_tree)
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert built - {"gs_d2/_C.abi3.so"} == files_of_package()
    assert extension.exists()


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (
            ["csrc/cuda"],
            r"csrc/cuda/kernels\.h, csrc/cuda/box_iou\.cu, csrc/cuda/group_subsample\.cu, .*two_pass_match",
        ),
        (["csrc/ops/box_iou_cuda.cpp"], r"incomplete, csrc/ops/box_iou_cuda\.cpp missing in "),
    ],
)
def test_forced_cuda_without_its_sources_is_an_error(copied_tree, tmp_path, monkeypatch, removed, named):
    tree = tmp_path / "tree"
    shutil.copytree(copied_tree / "csrc", tree / "csrc")
    shutil.copy(copied_tree / "setup.py", tree)
    for name in removed:
        shutil.rmtree(tree / name) if (tree / name).is_dir() else (tree / name).unlink()
    monkeypatch.chdir(tree)
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    with pytest.raises(SystemExit, match=r"^gs_d2: the sources of the CUDA kernels are incomplete, ") as caught:
        runpy.run_path("setup.py", run_name="__main__")
    assert re.search(named, str(caught.value))


def test_cuda_that_is_not_forced_is_left_out_without_its_sources(copied_tree, tmp_path, monkeypatch, capsys):
    shutil.copytree(copied_tree / "csrc", tmp_path / "csrc")
    shutil.copytree(copied_tree / "gs_d2", tmp_path / "gs_d2")
    for name in ("setup.py", "README.md"):
        shutil.copy(copied_tree / name, tmp_path)
    shutil.rmtree(tmp_path / "csrc" / "cuda")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    runpy.run_path("setup.py", run_name="__main__")
    printed = capsys.readouterr()
    assert printed.out.strip() == "gs_d2"
    assert re.search(r"csrc/cuda/kernels\.h, .* missing in .*: building for the CPU only", printed.err)


IN_AN_EMPTY_FOLDER = """
import gs_d2
from detectron2.modeling import build_model
from gs_d2 import model_zoo
from gs_d2.inference import FaceDetector

cfg = model_zoo.get_config("wider_gs.yaml")
cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
print(gs_d2.__file__)
print(type(build_model(cfg)).__name__)
boxes, scores = FaceDetector(device="cpu").detect("picture.png")
print(boxes.shape == (len(scores), 4))
"""


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution_is_all_it_takes(sdist, tmp_path):
    """Compiles; the wheel is installed where this Python's packages are seen, but not this checkout."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, ".", cwd=sdist)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"gs_d2-{__version__}-cp310-abi3-linux_")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names - {"gs_d2/_C.abi3.so"} == files_of_package()
    assert "gs_d2/_C.abi3.so" in names

    venv, folder = tmp_path / "venv", tmp_path / "empty"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--target", site_packages, wheel, cwd=tmp_path)
    # Python reads no .pth files in folders that a .pth file names, so an editable install of the checkout stays out.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "packages.pth").write_text("\n".join(packages))
    folder.mkdir()
    Image.fromarray(np.full((70, 90, 3), 128, np.uint8)).save(folder / "picture.png")
    where, model, found = run(venv / "bin" / "python", "-c", IN_AN_EMPTY_FOLDER, cwd=folder).splitlines()[-3:]
    assert Path(where).is_relative_to(site_packages)
    assert model == "GroupedFastRCNN"
    assert found == "True"
