"""dev/gpu_session.sh, rehearsed without a GPU: every step runs, whatever happened to the one before."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "dev" / "gpu_session.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def session(output, *arguments, python=sys.executable):
    environment = {**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), "--output", str(output), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=output.parent)


def command_of(folder, line):
    """A program in the place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def summary(output):
    """{step: status}"""
    rows = re.findall(r"^\| (\w+) \| (.*) \| \d+ \|$", (output / "summary.md").read_text(), re.MULTILINE)
    return dict(rows)


def steps():
    table = re.search(r'^STEPS="\n(.*?)^"', SCRIPT.read_text(), re.MULTILINE | re.DOTALL)[1]
    return {line.split()[0]: int(line.split()[1]) for line in table.splitlines()}


def test_its_syntax():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_every_step_is_a_function_and_all_fit_into_half_an_hour():
    text = SCRIPT.read_text()
    assert all(re.search(rf"^{name}\(\) {{", text, re.MULTILINE) for name in steps())
    assert sum(steps().values()) <= 1800


def test_files_that_steps_run_are_there():
    for name in re.findall(r"(?:benchmarks|tools|dev|configs|tests)/[\w/]+\.(?:py|yaml|cpp)", SCRIPT.read_text()):
        assert (ROOT / name).is_file(), name


def test_a_step_that_fails_does_not_keep_the_next_from_running(tmp_path):
    output = tmp_path / "results"
    broken = command_of(tmp_path, "echo broken >&2; exit 7")
    result = session(output, "--rehearse", "--only", "faces,profile,build", python=broken)
    assert result.returncode == 1 and "failed: faces profile" in result.stdout
    assert summary(output) == {
        "build": "skipped: needs a GPU",
        "faces": "FAILED: exit code 7",
        "profile": "FAILED: exit code 7",
    }
    assert (output / "faces.log").read_text() == "broken\n"


def test_a_step_that_takes_too_long_is_ended(tmp_path):
    output = tmp_path / "results"
    text = SCRIPT.read_text().replace('dirname "$0")/..', f'dirname "{SCRIPT}")/..')
    short = tmp_path / "short.sh"
    short.write_text(re.sub(r"^faces +45", "faces 1", text, flags=re.MULTILINE))
    slow = command_of(tmp_path, "sleep 20")
    command = ["bash", str(short), "--output", str(output), "--rehearse", "--only", "faces"]
    result = subprocess.run(command, env={**os.environ, "PYTHON": str(slow)}, capture_output=True, text=True)
    assert result.returncode == 1 and summary(output) == {"faces": "FAILED: over 3 s"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "tests,fuz"), "no step is called fuz"),
        (("--quick",), "no argument is called --quick"),
        (("--skip",), "--skip needs a value"),
    ],
)
def test_arguments_that_do_not_exist_are_refused(tmp_path, arguments, message):
    result = session(tmp_path / "results", *arguments)
    assert result.returncode == 2 and f"gpu_session.sh: error: {message}" in result.stderr


def test_steps_can_be_left_out_and_the_folder_says_of_what_it_is(tmp_path):
    output = tmp_path / "results"
    skipped = ",".join(name for name in steps() if name not in ("build", "faces"))
    result = session(output, "--rehearse", "--skip", skipped, python=command_of(tmp_path, "echo $@"))
    assert result.returncode == 0 and "all passed" in result.stdout
    assert summary(output) == {"build": "skipped: needs a GPU", "faces": "passed"}
    assert "Commit " in (output / "summary.md").read_text()
    assert f"synthesize_faces.py --output {output}/datasets" in (output / "faces.log").read_text()


@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    output = tmp_path / "results"
    result = session(output, "--rehearse")
    assert result.returncode == 0, result.stdout
    found = summary(output)
    assert list(found) == list(steps())
    assert {status for status in found.values()} == {"passed", "skipped: needs a GPU"}
    assert "commit " in (output / "machine.log").read_text()
    for name in ("ops.json", "detector.json", "train/metrics.json", "amp/metrics.json"):
        assert (output / name).is_file()
