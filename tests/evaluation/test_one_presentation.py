"""tools/evaluate.py and the evaluators present the same detections alike: table, results.json, curves and picture."""

import json
import logging

import evaluate
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from gs_d2.data import register_face_eval, register_fddb, register_wider_face
from gs_d2.evaluation import FaceEvalEvaluator, FDDBEvaluator, WiderFaceEvaluator
from gs_d2.evaluation.report import Result, write_summary

NAME = "one_presentation_test"
UNKNOWN = "9--Unknown/image"  # an image with detections that is in no ground truth
CASES = [
    ("wider_face", {}, []),
    ("fddb", {}, []),
    ("fddb", {"fit_ellipses": True}, ["--fit-ellipses"]),
    ("afw", {}, []),
    ("pascal_face", {"y_shift": 0.2}, ["--y-shift", "0.2"]),
]


@pytest.fixture
def evaluator_of(drawn_datasets, made_up_benchmarks, tmp_path):
    """Registers a benchmark; returns its evaluator, the files of its predictions, and the tool's arguments."""

    def make(benchmark, **options):
        output = str(tmp_path / "evaluator")
        if benchmark == "wider_face":
            root = drawn_datasets / "widerface"
            lists, images = root / "wider_face_split/wider_face_val_bbx_gt.txt", root / "WIDER_val/images"
            register_wider_face(NAME, lists, images, None, root / "ground_truth")
            return WiderFaceEvaluator(NAME, output, **options), "predictions", ["--ground-truth", root / "ground_truth"]
        root = made_up_benchmarks / benchmark
        if benchmark == "fddb":
            register_fddb(NAME, root / "FDDB-folds", root / "originalPics")
            evaluator = FDDBEvaluator(NAME, output, **options)
            return evaluator, "detections.txt", ["--ground-truth", root / "FDDB-folds"]
        images = root / ("testimages" if benchmark == "afw" else "images")
        register_face_eval(NAME, benchmark, root / "annotations", images)
        evaluator = FaceEvalEvaluator(NAME, output, **options)
        return evaluator, "detections.txt", ["--ground-truth", root / "annotations"]

    yield make
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def detections_near(dicts):
    """Three detections a face and some elsewhere, with ties in score; the first image is without, the last missing."""
    rng = np.random.default_rng(0)
    for i, image in enumerate(dicts[:-1]):
        near = image["gt_boxes"].repeat(3, axis=0)
        near = near + rng.normal(size=near.shape) * (near[:, 2:] - near[:, :2]).repeat(2, axis=1) / 15
        far = rng.uniform(0, 50, (4, 2))
        boxes = np.concatenate([near, np.concatenate([far, far + rng.uniform(15, 40, (4, 2))], axis=1)])
        boxes = boxes if i else boxes[:0]
        instances = Instances((200, 200), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
        instances.scores = torch.tensor(rng.integers(1, 40, len(boxes)) / 41.0, dtype=torch.float32)
        yield {"image_id": image["image_id"]}, {"instances": instances}


@pytest.mark.parametrize(("benchmark", "options", "arguments"), CASES)
def test_tool_and_evaluator_write_the_same(evaluator_of, tmp_path, caplog, capsys, benchmark, options, arguments):
    evaluator, files, where = evaluator_of(benchmark, **options)
    for image, output in detections_near(DatasetCatalog.get(NAME)):
        evaluator.process([image], [output])
    evaluator.process([{"image_id": UNKNOWN}], [output])
    with caplog.at_level(logging.INFO):
        metrics = evaluator.evaluate()[benchmark]
    assert all(5 < value < 95 for name, value in metrics.items() if not np.isnan(value)), metrics
    (text,) = (r.getMessage() for r in caplog.records if f" of {NAME}\n" in r.getMessage())
    table = text.split("\n", 1)[1] + "\n"

    folder = tmp_path / "evaluator"
    command = [benchmark, "--predictions", folder / files, "--output", tmp_path / "tool", *where, *arguments]
    capsys.readouterr()
    evaluate.main([*map(str, command), "--json", str(tmp_path / "metrics.json")])
    assert capsys.readouterr().out.startswith(table)
    written = sorted(path.name for path in (tmp_path / "tool").iterdir())
    assert len(written) == 3 and "results.json" in written
    for name in written:
        if name.endswith(".npz"):  # its bytes hold the time
            ours, tools = np.load(folder / name), np.load(tmp_path / "tool" / name)
            assert list(ours) == list(tools) != []
            for key in ours:
                np.testing.assert_array_equal(ours[key], tools[key])
        else:
            assert (folder / name).read_bytes() == (tmp_path / "tool" / name).read_bytes(), name
    summary = (folder / "results.json").read_text()
    assert (tmp_path / "metrics.json").read_text() == summary
    assert '"num_missing": 0,' not in summary and '"num_unknown": 1,' in summary


def test_settings_may_be_infinite_or_numpys(tmp_path):
    class Nothing(Result):
        def summary(self):
            return {"ap": None}

    write_summary(Nothing(), {"level box size": [0.0, float("inf")], "scales": np.array([1, 2])}, tmp_path / "a.json")
    expected = {"ap": None, "setting": {"level box size": [0.0, None], "scales": [1, 2]}}
    assert json.loads((tmp_path / "a.json").read_text()) == expected
