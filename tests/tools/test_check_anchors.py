"""check_anchors.py: its table, overrides, and what it cannot check; the numbers are in tests/analysis."""

from pathlib import Path

import pytest
from check_anchors import main

CONFIG = Path(__file__).resolve().parents[2] / "configs/wider_gs.yaml"


def test_table(run_command, generated_train):
    status, printed, _ = run_command(main, "--config-file", CONFIG, "--dataset", generated_train)
    assert status == 0
    title, header, _, everything, *rows = printed.splitlines()
    assert (
        title.startswith(f"{generated_train}, one view each")
        and "16, 32, 64, 128 px; IoU thresholds: 0.4 and 0.6" in title
    )
    assert header.split("  ")[0] == "" and "no anchor in the first pass (%)" in header
    number = int(everything.split()[1])
    assert number > 6
    for name in ("height", "width / height"):
        assert (
            sum(
                int(row.removeprefix(name).replace("from", "0 to").split()[3])
                for row in rows
                if row.startswith(f"{name} ")
            )
            == number
        )
    assert any(row.endswith("-") for row in rows), "no face is so large"


def test_overrides_change_the_anchors(run_command, generated_train):
    overrides = ["MODEL.RPN.IOU_THRESHOLDS", "[0.1,0.2]", "DATASETS.TRAIN", f"('{generated_train}',)"]
    tables = [run_command(main, "--config-file", CONFIG, *opts)[1].splitlines() for opts in (overrides,)]
    strict = run_command(main, "--config-file", CONFIG, "--dataset", generated_train)[1].splitlines()
    missed = [float(table[3].split()[2]) for table in (tables[0], strict)]
    assert "thresholds: 0.1 and 0.2" in tables[0][0] and missed[0] < missed[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty: name a data set with --dataset"),
        (["--num-images", "0"], "--num-images must be at least 1"),
        (["--seed", "-1"], "--seed at least 0"),
        (["--dataset", "nobody"], "nobody"),
    ],
)
def test_what_cannot_be_checked(refused, words, message):
    with refused(message):
        main(["--config-file", str(CONFIG), *words])
