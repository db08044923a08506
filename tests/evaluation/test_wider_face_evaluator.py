"""`WiderFaceEvaluator` on made-up outputs: one process and two, with and without the official files."""

import json
import logging
import os
import socket

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from gs_d2.evaluation import (
    WiderFaceEvaluator,
    WiderGroundTruth,
    evaluate_wider_face,
    read_wider_predictions,
)

NAME = "wider_face_evaluator_test"
IDS = [f"{i % 3}--Event/image_{i}" for i in range(9)]
NOISE = {16: 0.5, 32: 1.0, 64: 4.0}  # pixels, of the detections of each anchor scale


def dataset_dicts():
    rng = np.random.default_rng(0)
    dicts = []
    for image_id in IDS:
        corners = rng.integers(0, 80, size=(5, 2))
        boxes = np.concatenate([corners, corners + rng.integers(0, 30, size=(5, 2))], axis=1)
        dicts.append(
            {
                "file_name": f"{image_id}.jpg",
                "image_id": image_id,
                "gt_boxes": boxes.astype(np.float32),
                "gt_ignore": np.zeros(5, dtype=bool),
                "attributes": {"invalid": (rng.random(5) < 0.2).astype(np.uint8)},
            }
        )
    return dicts


def outputs_of(dicts, with_scales=True):
    rng = np.random.default_rng(1)
    outputs = []
    for image in dicts:
        boxes = image["gt_boxes"].repeat(2, axis=0) + rng.normal(size=(10, 4)) * 2
        instances = Instances((100, 100), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
        instances.scores = torch.rand(10, generator=torch.Generator().manual_seed(len(outputs)))
        instances.anchor_scales = torch.tensor(rng.choice([16.0, 32.0, 64.0], size=10))
        outputs.append({"instances": instances})
        if with_scales:
            outputs[-1]["instances_by_scale"] = Instances.cat(
                [instances_of(rng, image["gt_boxes"], scale, noise) for scale, noise in NOISE.items()]
            )
    return outputs


def instances_of(rng, boxes, scale, noise):
    """A detection for each of the boxes."""
    boxes = boxes + rng.normal(size=boxes.shape) * noise
    instances = Instances((100, 100), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    instances.scores = torch.tensor(rng.random(len(boxes)), dtype=torch.float32)
    instances.anchor_scales = torch.full((len(boxes),), scale + 1e-6)
    return instances


@pytest.fixture
def dataset(tmp_path):
    dicts = dataset_dicts()
    DatasetCatalog.register(NAME, lambda: dicts)
    MetadataCatalog.get(NAME).set(
        evaluator_type="wider_face", ground_truth_dir=str(tmp_path / "ground_truth"), thing_classes=["face"]
    )
    yield dicts
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_metrics_files_and_table(dataset, tmp_path, caplog):
    evaluator = WiderFaceEvaluator(NAME, str(tmp_path / "out"), setting={"test sizes": "640", "NMS": 0.5})
    with caplog.at_level(logging.INFO):
        evaluator.process([{"image_id": "0--Event/stale"}], outputs_of(dataset[:1]))
        evaluator.reset()
        for image, output in zip(dataset, outputs_of(dataset), strict=True):
            evaluator.process([image], [output])
        results = evaluator.evaluate()
    metrics = results["wider_face"]
    assert list(metrics) == ["all", "all_valid", "all@16", "all@32", "all@64"]

    # The files written give the very same metrics, which are percents of the fractions in results.json.
    ground_truth = WiderGroundTruth.from_boxes(
        IDS, [d["gt_boxes"] for d in dataset], [d["attributes"] for d in dataset]
    )
    predictions = read_wider_predictions(tmp_path / "out" / "predictions", IDS)
    again = evaluate_wider_face(ground_truth, predictions.detections)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("all", "all_valid"):
        assert 0 < metrics[name] < 100
        assert metrics[name] == 100 * again.curves[name].ap == 100 * saved[name]
    assert saved["easy"] is None and saved["setting"] == {"test sizes": "640", "NMS": 0.5}
    assert 100 > metrics["all@16"] > metrics["all@32"] > metrics["all@64"] > 0
    assert {name: saved[name] for name in saved if "@" in name} == {
        f"all@{scale}": pytest.approx(metrics[f"all@{scale}"] / 100, rel=1e-15) for scale in NOISE
    }
    assert (tmp_path / "out" / "pr_curves.npz").is_file()
    assert (tmp_path / "out" / "pr_curve.png").read_bytes().startswith(b"\x89PNG")

    assert "setting: test sizes 640, NMS 0.5" in caplog.text
    lines = caplog.text.splitlines()
    head = lines.index("AP of each anchor scale's outputs alone, after an NMS among themselves:")
    assert [line.split() for line in [lines[head + 1], *lines[head + 3 : head + 6]]] == [
        ["scale", "All"],
        *([f"@{scale}", f"{metrics[f'all@{scale}']:.2f}"] for scale in NOISE),
    ]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and str(tmp_path / "ground_truth") in warnings[0]


def test_by_scale_is_the_protocol_on_each_scale_alone(dataset):
    """Each scale's detections may find every face, so that the metrics of scales do not add up to that of all."""
    outputs = outputs_of(dataset)
    evaluator = WiderFaceEvaluator(NAME)
    evaluator.process(dataset, outputs)
    metrics = evaluator.evaluate()["wider_face"]
    ground_truth = WiderGroundTruth.from_boxes(
        IDS, [d["gt_boxes"] for d in dataset], [d["attributes"] for d in dataset]
    )
    for scale in NOISE:
        detections = {}
        for image_id, output in zip(IDS, outputs, strict=True):
            found = output["instances_by_scale"]
            found = found[found.anchor_scales.round() == scale]
            x1, y1, x2, y2 = found.pred_boxes.tensor.double().unbind(dim=1)
            rows = torch.stack([x1, y1, x2 - x1, y2 - y1, found.scores.double()], dim=1)
            detections[image_id] = np.concatenate([rows[:, :4].numpy().round(3), rows[:, 4:].numpy().round(8)], axis=1)
        assert metrics[f"all@{scale}"] == 100 * evaluate_wider_face(ground_truth, detections).curves["all"].ap
    assert sum(metrics[f"all@{scale}"] for scale in NOISE) > 150


def test_a_detector_of_one_scale_has_the_total_there(dataset):
    outputs = outputs_of(dataset)
    for output in outputs:
        output["instances"].anchor_scales = torch.full((10,), 16.0)
        output["instances_by_scale"] = output["instances"]
    evaluator = WiderFaceEvaluator(NAME)
    evaluator.process(dataset, outputs)
    metrics = evaluator.evaluate()["wider_face"]
    assert list(metrics) == ["all", "all_valid", "all@16"] and metrics["all@16"] == metrics["all"] > 0


@pytest.mark.parametrize("which", ["none", "one missing"])
def test_no_metrics_of_scales_rather_than_wrong_ones(dataset, tmp_path, caplog, which):
    """The final detections tell scales, too, but there a face has survived in one of them only."""
    outputs = outputs_of(dataset, with_scales=which != "none")
    assert outputs[4]["instances"].has("anchor_scales")
    outputs[4].pop("instances_by_scale", None)
    evaluator = WiderFaceEvaluator(NAME, str(tmp_path))
    with caplog.at_level(logging.INFO):
        evaluator.process(dataset, outputs)
        metrics = evaluator.evaluate()["wider_face"]
    assert list(metrics) == ["all", "all_valid"] and metrics["all"] > 0
    assert "@" not in (tmp_path / "results.json").read_text() and "@16" not in caplog.text


def test_nan_in_one_scale_is_refused_with_the_image(dataset):
    outputs = outputs_of(dataset[:1])
    outputs[0]["instances_by_scale"].pred_boxes.tensor[7, 2] = float("inf")
    with pytest.raises(ValueError, match="0--Event/image_0: 1 detections"):
        WiderFaceEvaluator(NAME).process(dataset[:1], outputs)


def test_float_boxes_become_official_rows(dataset, tmp_path):
    evaluator = WiderFaceEvaluator(NAME, str(tmp_path / "out"))
    instances = Instances((100, 100), pred_boxes=Boxes(torch.tensor([[1.25, 2.0, 11.5, 32.125]])))
    instances.scores = torch.tensor([0.5])
    evaluator.process([{"image_id": IDS[0]}], [{"instances": instances}])
    evaluator.evaluate()
    lines = (tmp_path / "out" / "predictions" / f"{IDS[0]}.txt").read_text().splitlines()
    assert lines == ["image_0", "1", "1.250 2.000 10.250 30.125 0.50000000"]


def test_images_not_processed_are_reported(dataset, caplog):
    evaluator = WiderFaceEvaluator(NAME)
    evaluator.process(dataset[:4], outputs_of(dataset)[:4])
    metrics = evaluator.evaluate()["wider_face"]
    assert "5 of 9 images" in caplog.text
    full = WiderFaceEvaluator(NAME)
    full.process(dataset, outputs_of(dataset))
    assert metrics["all"] < full.evaluate()["wider_face"]["all"]


def test_no_detection_at_all(dataset):
    evaluator = WiderFaceEvaluator(NAME)
    empty = Instances((100, 100), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    evaluator.process(dataset, [{"instances": empty}] * len(dataset))
    assert evaluator.evaluate()["wider_face"] == {"all": 0.0, "all_valid": 0.0}


def test_nan_is_refused_with_the_image(dataset):
    outputs = outputs_of(dataset[:1])
    outputs[0]["instances"].scores[3] = float("nan")
    with pytest.raises(ValueError, match="0--Event/image_0: 1 detections"):
        WiderFaceEvaluator(NAME).process(dataset[:1], outputs)


def test_official_subsets_on_the_mini_set(shared_data, dataset):
    """Through the evaluator, the published predictions give the expected metrics."""
    ground_truth_dir = shared_data / "mini_wider" / "widerface" / "ground_truth"
    MetadataCatalog.remove(NAME)
    MetadataCatalog.get(NAME).set(ground_truth_dir=str(ground_truth_dir))
    ground_truth = WiderGroundTruth.from_mat_files(ground_truth_dir)
    zip_path = shared_data / "mini_wider" / "predictions_detector_a.zip"
    evaluator = WiderFaceEvaluator(NAME, distributed=False)
    predictions = read_wider_predictions(zip_path, ground_truth.image_ids).detections
    for image_id, rows in predictions.items():
        boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)
        instances = Instances((800, 800), pred_boxes=Boxes(torch.tensor(boxes)))
        instances.scores = torch.tensor(rows[:, 4])
        alone = instances[:3]
        alone.anchor_scales = torch.full((len(alone),), 32.0)
        evaluator.process([{"image_id": image_id}], [{"instances": instances, "instances_by_scale": alone}])
    metrics = evaluator.evaluate()["wider_face"]
    subsets = ["easy", "medium", "hard", "all"]
    assert list(metrics) == [*subsets, "all_valid", *(f"{name}@32" for name in subsets)]
    alone = evaluate_wider_face(ground_truth, {image_id: rows[:3] for image_id, rows in predictions.items()})
    for name in subsets:
        assert metrics[f"{name}@32"] == pytest.approx(100 * alone.curves[name].ap, abs=0.05)  # from float32
    expected = json.loads((shared_data / "expected_ap.json").read_text())["mini_wider/predictions_detector_a.zip"]
    for name, ap in expected.items():
        assert metrics[name] == pytest.approx(100 * ap, abs=1e-4)


def test_official_files_of_other_images_are_not_used(shared_data, dataset):
    MetadataCatalog.remove(NAME)
    MetadataCatalog.get(NAME).set(ground_truth_dir=str(shared_data / "mini_wider/widerface/ground_truth"))
    evaluator = WiderFaceEvaluator(NAME)
    evaluator.process(dataset, outputs_of(dataset, with_scales=False))
    metrics = evaluator.evaluate()["wider_face"]
    assert list(metrics) == ["all", "all_valid"] and metrics["all"] > 0


def test_the_test_set_gives_a_submission(tmp_path):
    dicts = [{"image_id": image_id} for image_id in IDS]
    DatasetCatalog.register(NAME, lambda: dicts)
    try:
        evaluator = WiderFaceEvaluator(NAME, str(tmp_path))
        evaluator.process(dicts, outputs_of(dataset_dicts()))
        assert evaluator.evaluate() == {}
    finally:
        DatasetCatalog.remove(NAME)
    submission = read_wider_predictions(tmp_path / "submission.zip", IDS)
    folder = read_wider_predictions(tmp_path / "predictions", IDS)
    assert submission.missing == [] and not (tmp_path / "results.json").exists()
    for image_id in IDS:
        assert len(submission.detections[image_id]) == 10
        np.testing.assert_array_equal(submission.detections[image_id], folder.detections[image_id])


def test_a_submission_without_all_images_warns(tmp_path, caplog):
    dicts = [{"image_id": image_id} for image_id in IDS]
    DatasetCatalog.register(NAME, lambda: dicts)
    try:
        evaluator = WiderFaceEvaluator(NAME, str(tmp_path))
        evaluator.process(dicts[1:], outputs_of(dataset_dicts())[1:])
        evaluator.evaluate()
    finally:
        DatasetCatalog.remove(NAME)
    assert f"1 of {len(IDS)} images of {NAME} were not processed" in caplog.text and IDS[0] in caplog.text


def _run_process(rank, port, output_dir, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dicts = dataset_dicts()
    DatasetCatalog.register(NAME, lambda: dicts)
    evaluator = WiderFaceEvaluator(NAME, output_dir)
    outputs = outputs_of(dicts)
    evaluator.process(dicts[rank::2], outputs[rank::2])
    queue.put((rank, evaluator.evaluate()))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads, which Detectron2 keeps a group of, now and then abort an orderly exit


def test_two_processes_give_the_metrics_of_one(dataset, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (port, str(tmp_path / "two"), queue)
    torch.multiprocessing.start_processes(_run_process, arguments, nprocs=2, start_method="spawn")
    results = dict(queue.get() for _ in range(2))
    evaluator = WiderFaceEvaluator(NAME, str(tmp_path / "one"))
    evaluator.process(dataset, outputs_of(dataset))
    assert results == {0: evaluator.evaluate(), 1: {}}
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.txt"))
    assert len(names) == 9
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
