"""What tests of several folders share."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
_SHARED_DATA = Path(os.environ.get("GS_D2_SHARED_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Runs a test on the CPU and, where there is one, on the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Research data that is no part of the project: ../shared/data, or the folder that GS_D2_SHARED_DATA names."""
    if not _SHARED_DATA.is_dir():
        pytest.skip(f"the research data is not at {_SHARED_DATA}; GS_D2_SHARED_DATA can name another folder")
    return _SHARED_DATA


def load_script(path: str):
    """A script of the project as a module, by its path from the project's root; each call loads it anew."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", name="load_script")
def load_script_fixture():
    return load_script


@pytest.fixture(scope="session")
def drawn_datasets(tmp_path_factory) -> Path:
    """A DETECTRON2_DATASETS folder with six training and four validation images of 128 x 96 drawn faces."""
    root = tmp_path_factory.mktemp("datasets")
    load_script("tools/synthesize_faces.py").synthesize(root, {"train": 6, "val": 4}, (128, 96), seed=0)
    return root
