"""tools/evaluate.py as a user runs it: metrics, files, errors of one line and exit codes."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


def run(*arguments, **kwargs):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_wider_face(shared_data, tmp_path):
    mini = shared_data / "mini_wider"
    done = run(
        "wider_face",
        *("--predictions", mini / "predictions_detector_a.zip"),
        *("--ground-truth", mini / "widerface" / "ground_truth"),
        *("--output", tmp_path / "out", "--json", tmp_path / "deep" / "metrics.json"),
        *("--compare", shared_data / "wider_face" / "pr_curves", "--submission", tmp_path / "submission.zip"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "deep" / "metrics.json").read_text())
    expected = json.loads((shared_data / "expected_ap.json").read_text())["mini_wider/predictions_detector_a.zip"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert 0 < metrics["all"] < metrics["all_valid"] < 1
    assert "94.19" in done.stdout and "130 of 130 images matched, 0 missing" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == metrics
    assert (tmp_path / "out" / "pr_curve.png").is_file() and (tmp_path / "out" / "pr_curves.npz").is_file()
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert len(archive.namelist()) == 130

    # The submission evaluates to the same metrics, and its curves can be compared with.
    done = run(
        "wider_face",
        *("--predictions", tmp_path / "submission.zip"),
        *("--ground-truth", mini / "widerface" / "ground_truth"),
        *("--compare", f"before={tmp_path / 'out' / 'pr_curves.npz'}"),
        *("--json", tmp_path / "again.json", "--output", tmp_path / "again"),
    )
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again.json").read_text())
    assert {name: again[name] for name in expected} == {name: metrics[name] for name in expected}


def test_precision_and_recall_at_scores(shared_data, tmp_path):
    mini = shared_data / "mini_wider"
    arguments = ["wider_face", "--predictions", mini / "predictions_detector_a.zip"]
    arguments += ["--ground-truth", mini / "widerface" / "ground_truth"]
    done = run(*arguments, "--score-thresholds", "0.25", "0.5", "--json", tmp_path / "metrics.json")
    assert done.returncode == 0, done.stderr
    header = done.stdout.splitlines()[0].split()
    assert header == ["subset", "AP", "faces", "P@0.25", "R@0.25", "P@0.5", "R@0.5"]
    points = json.loads((tmp_path / "metrics.json").read_text())["at_scores"]
    assert list(points) == ["0.25", "0.5"]
    assert points["0.25"]["hard"]["recall"] > points["0.5"]["hard"]["recall"] > 0
    assert points["0.5"]["hard"]["precision"] > points["0.25"]["hard"]["precision"] > 0
    done = run(*arguments, "--score-thresholds", "nan")
    assert done.returncode == 2 and "score_thresholds must be numbers" in done.stderr


def test_needs_neither_torch_nor_detectron2(shared_data, tmp_path):
    """A machine with numpy and scipy only: every other import of the table is made to fail."""
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'torchvision', 'detectron2', 'matplotlib', 'h5py', 'tqdm', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    mini = shared_data / "mini_wider"
    arguments = ["wider_face", "--predictions", mini / "predictions_detector_a.zip"]
    arguments += ["--ground-truth", mini / "widerface" / "ground_truth"]
    command = [sys.executable, "-c", code, str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "94.19" in done.stdout
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr


def test_fddb(tmp_path):
    (tmp_path / "FDDB-fold-01-ellipseList.txt").write_text(
        "2002/a\n2\n60 40 1.5708 100 100 1\n60 40 1.5708 300 100 1\n2002/b\n1\n60 40 1.5708 100 100 1\n"
    )
    (tmp_path / "d.txt").write_text("2002/a\n2\n60 40 80 120 0.9\n0 300 50 50 0.01\n")
    done = run(
        "fddb",
        *("--predictions", tmp_path / "d.txt", "--ground-truth", tmp_path / "FDDB-fold-01-ellipseList.txt"),
        *("--json", tmp_path / "j.json", "--output", tmp_path / "out", "--fit-ellipses"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "j.json").read_text())
    assert list(metrics["disc_tpr"]) == list(metrics["cont_tpr"]) == ["100", "200", "500", "1000", "2000"]
    assert metrics["disc_tpr"]["100"] == pytest.approx(1 / 3)
    assert 0.2 < metrics["cont_tpr"]["2000"] < 1 / 3
    assert "33.33" in done.stdout and "1 of 2 images matched, 1 missing" in done.stdout
    assert (tmp_path / "out" / "roc_curve.png").is_file()
    assert np.load(tmp_path / "out" / "roc_curves.npz")["false_positives"].tolist() == [0, 0, 1]


@pytest.mark.parametrize(("benchmark", "folder"), [("afw", "AFW"), ("pascal_face", "PASCAL")])
def test_afw_and_pascal(shared_data, tmp_path, benchmark, folder):
    detections = shared_data / "afw_pascal" / "detections" / folder / "Ours_Headhunter.txt"
    arguments = [
        "--predictions",
        detections,
        "--ground-truth",
        shared_data / "afw_pascal",
        "--json",
        tmp_path / "j",
    ]
    done = run(benchmark, *arguments, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "j").read_text())
    assert metrics["num_faces"] == {"afw": 473, "pascal_face": 1341}[benchmark]
    assert f"{100 * metrics['ap']:.2f}" in done.stdout and "y-shift 0," in done.stdout
    done = run(benchmark, *arguments, "--y-shift", "0.2")
    assert "y-shift 0.2," in done.stdout


def one_line_error(done, *texts):
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("evaluate.py: error: ")
    for text in texts:
        assert str(text) in lines[0]


def test_errors_are_one_line_and_name_the_file(tmp_path):
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    for benchmark, names in (
        ("wider_face", "wider_face_val.mat"),
        ("fddb", "ellipseList"),
        ("afw", "new_annotations_AFW.mat"),
        ("pascal_face", "Annotations_Face_PASCALLayout_large_fixed.mat"),
    ):
        one_line_error(run(benchmark, "--predictions", empty, "--ground-truth", nowhere), nowhere)
        one_line_error(run(benchmark, "--predictions", empty, "--ground-truth", empty), empty, names)


def test_wrong_predictions(shared_data, tmp_path):
    ground_truth = shared_data / "mini_wider" / "widerface" / "ground_truth"
    one_line_error(run("wider_face", "--predictions", tmp_path, "--ground-truth", ground_truth), tmp_path, ".txt")
    with zipfile.ZipFile(shared_data / "mini_wider" / "predictions_detector_a.zip") as archive:
        name = next(n for n in archive.namelist() if n.endswith(".txt"))
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("x\n1\n1 2 3 4\n")
    done = run("wider_face", "--predictions", tmp_path, "--ground-truth", ground_truth)
    one_line_error(done, tmp_path / name, "line 3", "need 5 numbers, got 4")
    one_line_error(
        run(
            "afw",
            *("--predictions", shared_data / "afw_pascal" / "detections" / "PASCAL" / "DPM.txt"),
            *("--ground-truth", shared_data / "afw_pascal"),
        ),
        "no image of afw",
    )


def test_missing_images_are_counted(shared_data, tmp_path):
    ground_truth = shared_data / "mini_wider" / "widerface" / "ground_truth"
    with zipfile.ZipFile(shared_data / "mini_wider" / "predictions_detector_a.zip") as archive:
        names = [n for n in archive.namelist() if n.endswith(".txt")]
        (tmp_path / "p").mkdir()
        archive.extractall(tmp_path / "p", names[:3])
    (tmp_path / "p" / names[0]).write_text("")
    done = run(
        "wider_face",
        "--predictions",
        tmp_path / "p",
        "--ground-truth",
        ground_truth,
        "--json",
        tmp_path / "j",
    )
    assert "3 of 130 images matched, 127 missing" in done.stdout
    assert "1 files are without detections" in done.stdout
    metrics = json.loads((tmp_path / "j").read_text())
    assert (metrics["num_missing"], metrics["num_empty"]) == (127, 1) and metrics["hard"] < 0.5
