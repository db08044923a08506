"""profile_step.py: every moment of a step belongs to one part, and the model is left as it was."""

import time
from pathlib import Path

import pytest
import torch
from common import Stopwatch, parts_of, random_input, random_model
from profile_step import main

from gs_d2.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = ["--size", "64", "96", "--faces", "3", "--steps", "2"]


@pytest.mark.parametrize("name", ["demo", "two_stage"])
def test_prints_the_parts(run_command, name):
    status, out, _ = run_command(main, "--config-file", CONFIGS / "quick" / f"{name}.yaml", *SMALL)
    assert status == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    shares = {row[0]: float(row[2].rstrip("%")) for row in rows if len(row) == 3 and row[2].endswith("%")}
    parts = {"backbone", "head", "labelling", "sampling", "losses", "backward", "optimizer"}
    parts |= {"second stage", "proposals"} if name == "two_stage" else set()
    assert set(shares) == parts | {"other", "training step", "data loading (beside it)"}
    assert all(shares[part] > 0 for part in parts) and shares["training step"] == 100


def test_parts_within_parts_are_counted_once():
    class Work:
        def outer(self):
            time.sleep(0.02)
            self.inner()

        def inner(self):
            time.sleep(0.05)

    work, before = Work(), Work.inner
    stopwatch = Stopwatch("cpu")
    begin = time.perf_counter()
    with stopwatch.methods({(work, "outer"): "outer", (Work, "inner"): "inner"}), stopwatch.part("other"):
        work.outer()
    elapsed = time.perf_counter() - begin
    assert stopwatch.seconds["outer"] >= 0.02 and stopwatch.seconds["inner"] >= 0.05
    assert sum(stopwatch.seconds.values()) == pytest.approx(elapsed, abs=0.01)
    assert Work.inner is before and not vars(work)


def test_timing_changes_nothing():
    cfg = load_config(CONFIGS / "quick" / "demo.yaml")
    inputs = random_input((64, 64), 3)
    model = random_model(cfg).eval()
    plain = model(inputs)[0]["instances"]
    stopwatch = Stopwatch("cpu")
    with stopwatch.methods(parts_of(model)), stopwatch.part("other"):
        timed = model(inputs)[0]["instances"]
    assert len(plain) > 0 and torch.equal(plain.pred_boxes.tensor, timed.pred_boxes.tensor)
    assert stopwatch.seconds["proposals"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere.yaml"], "nowhere.yaml"), ([str(CONFIGS / "wider_gs.yaml"), "A.B", "1"], "A.B")],
)
def test_a_wrong_config_is_named(run_command, arguments, message):
    status, _, err = run_command(main, "--config-file", *arguments)
    assert status == 2 and ": error: " in err and message in err and err.count("\n") == 1
