"""The examples run as they are, do what they print, and change as few lines of other models as they say."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
PER_GROUP = 16


@cache
def run(*arguments: str) -> list[str]:
    """Lines that a fresh Python prints."""
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        cwd=FOLDER,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def changed_lines(source: str) -> list[str]:
    marked = re.findall(r"^# group sampling:\n(.*?)^# :group sampling$", source, re.DOTALL | re.MULTILINE)
    assert marked, "there are no markers"
    lines = [line for line in "".join(marked).splitlines() if line.strip() and not line.strip().startswith("#")]
    return lines + [line for line in source.splitlines() if line.endswith("  # group sampling")]


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_at_most_ten_lines_are_marked_and_no_others_are_needed(name):
    source = (FOLDER / f"{name}.py").read_text()
    lines = changed_lines(source)
    assert len(lines) <= 10
    assert all(len(line) <= 120 and ";" not in line for line in lines), "lines are not made few by making them long"
    assert sum("gs_d2" in line and "import" in line for line in lines) == 1
    outside = "\n".join(line for line in source.splitlines() if line not in lines)
    outside = outside.split('"""')[0] + outside.split('"""')[2]
    assert not re.search(r"gs_d2|GroupSampler\(|TwoPassMatcher|_ARCHITECTURE|PROPOSAL_GENERATOR\.NAME", outside)


def test_lines_outside_the_markers_do_not_count_and_those_inside_do():
    assert changed_lines(
        "a = 1\n# group sampling:\n\n# why\nb = 2\n# :group sampling\nc = 3\nd = 4  # group sampling\n"
    ) == ["b = 2", "d = 4  # group sampling"]


@pytest.mark.parametrize(
    ("name", "total"),
    [("retinanet", None), ("faster_rcnn", 256)],  # RetinaNet has no sampler; Detectron2's RPN samples 256
)
def test_detectron2s_models_with_group_sampling(name, total):
    header, before, after = run(f"{name}.py")[-3:]
    scales = [int(scale) for scale in header.removeprefix("anchor scale").removesuffix("loss").split()]
    assert scales == [16, 32, 64, 128]

    def counts(line):
        cells = re.findall(r"(\d+) \((\d+)\)", line)
        assert len(cells) == len(scales)
        return [int(drawn) for drawn, _ in cells], [int(positive) for _, positive in cells]

    drawn, positives = counts(before)
    assert before.startswith("as it is") and after.startswith("group sampling")
    assert drawn[0] > 3 * drawn[-1], "as it is, the smallest scale dominates"
    assert total is None or sum(drawn) == total
    drawn, positives = counts(after)
    assert drawn == [PER_GROUP] * len(scales)
    assert all(0 < positive <= PER_GROUP // 4 for positive in positives)
    for line in (before, after):
        assert 0 < float(line.split()[-1]) < 100, "it trains"


def test_the_ops_alone():
    """In plain PyTorch: every scale gives the same number of samples, and the detector learns."""
    program = f"""
        import runpy, sys
        runpy.run_path({str(FOLDER / "plain_torch.py")!r}, run_name="__main__")
        print(sorted({{"detectron2", "fvcore", "torchvision", "gs_d2.modeling"}} & set(sys.modules)))
    """
    lines = run("-c", "\n".join(line.strip() for line in program.splitlines()))
    assert lines[-1] == "[]"
    losses = [float(line.split()[-1]) for line in lines if line.startswith("iteration")]
    assert losses[-1] < 0.6 * losses[0]
    counts = {line.split(":")[0]: eval(line.split(":")[1]) for line in lines if re.search(r": \[\d", line)}
    assert counts["sampled"] == [32] * 4
    assert all(drawn <= 8 for drawn in counts["sampled positives"])
    assert all(a <= b for a, b in zip(counts["sampled positives"], counts["positive anchors"], strict=True))


def test_the_readme_shows_what_is_printed():
    """The counts; the last column, the loss, may differ in its last digits from machine to machine."""
    (shown,) = re.findall(r"^```\n(anchor.*?)^```", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    printed = run("retinanet.py")[-3:]
    assert [line.split()[:-1] for line in shown.splitlines()] == [line.split()[:-1] for line in printed]


def test_every_example_is_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.py"):
        assert f"`{path.name}`" in readme
