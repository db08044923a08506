"""profile_step.py: every moment of a step belongs to one part, and the model is left as it was."""

import time
from pathlib import Path

import pytest
import torch

from gs_d2.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = ["--size", "64", "96", "--faces", "3", "--steps", "2"]


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/profile_step.py")


@pytest.mark.parametrize("name", ["demo", "two_stage"])
def test_prints_the_parts(tool, capsys, name):
    assert tool.main(["--config-file", str(CONFIGS / "quick" / f"{name}.yaml"), *SMALL]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    shares = {row[0]: float(row[2].rstrip("%")) for row in rows if len(row) == 3 and row[2].endswith("%")}
    parts = {"backbone", "head", "labelling", "sampling", "losses", "backward", "optimizer"}
    parts |= {"second stage", "proposals"} if name == "two_stage" else set()
    assert set(shares) == parts | {"other", "training step", "data loading (beside it)"}
    assert all(shares[part] > 0 for part in parts) and shares["training step"] == 100


def test_parts_within_parts_are_counted_once(tool):
    class Work:
        def outer(self):
            time.sleep(0.02)
            self.inner()

        def inner(self):
            time.sleep(0.05)

    work, before = Work(), Work.inner
    stopwatch = tool.Stopwatch("cpu")
    begin = time.perf_counter()
    with stopwatch.methods({(work, "outer"): "outer", (Work, "inner"): "inner"}), stopwatch.part("other"):
        work.outer()
    elapsed = time.perf_counter() - begin
    assert stopwatch.seconds["outer"] >= 0.02 and stopwatch.seconds["inner"] >= 0.05
    assert sum(stopwatch.seconds.values()) == pytest.approx(elapsed, abs=0.01)
    assert Work.inner is before and not vars(work)


def test_timing_changes_nothing(tool):
    cfg = load_config(CONFIGS / "quick" / "demo.yaml")
    inputs = tool.random_input((64, 64), 3)
    model = tool.random_model(cfg).eval()
    plain = model(inputs)[0]["instances"]
    stopwatch = tool.Stopwatch("cpu")
    with stopwatch.methods(tool.parts_of(model)), stopwatch.part("other"):
        timed = model(inputs)[0]["instances"]
    assert len(plain) > 0 and torch.equal(plain.pred_boxes.tensor, timed.pred_boxes.tensor)
    assert stopwatch.seconds["proposals"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere.yaml"], "nowhere.yaml"), ([str(CONFIGS / "wider_gs.yaml"), "A.B", "1"], "A.B")],
)
def test_a_wrong_config_is_named(tool, capsys, arguments, message):
    assert tool.main(["--config-file", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("profile_step: ") and message in error and error.count("\n") == 1
