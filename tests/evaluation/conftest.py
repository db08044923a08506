"""Where the research data is. It is not part of the project: tests that use it skip where it is absent."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """`shared/data` beside the project."""
    path = Path(__file__).parents[2].parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the research data is not at {path}")
    return path
