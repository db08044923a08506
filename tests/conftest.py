from pathlib import Path

import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")],
        ),
    ]
)
def device(request):
    return request.param


@pytest.fixture(scope="session")
def shared_data():
    path = Path(__file__).parents[1].parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no research data at {path}")
    return path
