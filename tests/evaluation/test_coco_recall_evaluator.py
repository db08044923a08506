"""CocoRecallEvaluator: COCO's average recall, to the digit, by hand and against a slow literal version."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gs_d2.evaluation import CocoRecallEvaluator
from gs_d2.ops.reference import box_iou

THRESHOLDS = np.linspace(0.5, 0.95, 10)


def ground_truth():
    """image id -> (boxes XYXY float32 [n, 4], iscrowd [n]) of coco_toy_val."""
    content = json.loads(open(MetadataCatalog.get("coco_toy_val").json_file).read())
    result = {}
    for image in content["images"]:
        of_image = [x for x in content["annotations"] if x["image_id"] == image["id"]]
        boxes = np.array([x["bbox"] for x in of_image], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        result[image["id"]] = boxes, np.array([x["iscrowd"] for x in of_image], dtype=bool)
    return result


def noisy_detections(num, seed=0):
    """image id -> Instances: the objects shifted by up to a third of their size, and random boxes."""
    rng, result = np.random.default_rng(seed), {}
    for image_id, (boxes, _) in ground_truth().items():
        rows = []
        for _ in range(num):
            if len(boxes) and rng.random() < 0.8:
                box = boxes[rng.integers(len(boxes))]
                side = np.tile(box[2:] - box[:2], 2)
                rows.append(box + rng.uniform(-0.17, 0.17, 4) * side)
            else:
                corner = rng.uniform(0, 80, 2)
                rows.append([*corner, *(corner + rng.uniform(10, 60, 2))])
        instances = Instances((120, 160), pred_boxes=Boxes(torch.tensor(np.array(rows), dtype=torch.float32)))
        instances.scores = torch.tensor(rng.random(num), dtype=torch.float32)
        instances.pred_classes = torch.zeros(num, dtype=torch.int64)
        result[image_id] = instances
    return result


def evaluate(detections, **kwargs):
    evaluator = CocoRecallEvaluator("coco_toy_val", distributed=False, **kwargs)
    for image_id, instances in detections.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()["box_proposals"]


def literal_recall(detections, limit):
    """Best score first, each takes the free object it overlaps most; crowds are no objects."""
    recalls = []
    for threshold in THRESHOLDS:
        found = total = 0
        for image_id, (boxes, crowd) in ground_truth().items():
            boxes = boxes[~crowd]
            total += len(boxes)
            instances = detections[image_id]
            order = sorted(range(len(instances)), key=lambda i: -float(instances.scores[i]))[:limit]
            if len(boxes) == 0:
                continue
            ious = box_iou(instances.pred_boxes.tensor, torch.from_numpy(boxes)).double().numpy()
            free = set(range(len(boxes)))
            for i in order:
                candidates = [j for j in free if ious[i, j] >= threshold]
                if candidates:
                    free.remove(max(candidates, key=lambda j: ious[i, j]))
            found += len(boxes) - len(free)
        recalls.append(found / total)
    return 100 * float(np.mean(recalls))


@pytest.mark.parametrize("limits", [(3, 30), (100, 1000)])
def test_recall_is_the_protocol_written_out(coco_toy, limits):
    detections = noisy_detections(30)
    metrics = evaluate(detections, limits=limits)
    for limit in limits:
        assert metrics[f"AR@{limit}"] == pytest.approx(literal_recall(detections, limit), abs=1e-6)
    assert 5 < metrics[f"AR@{limits[0]}"] < 95


def test_metrics_are_the_official_apis_to_the_digit(coco_toy):
    """COCOeval fed through its own loadRes, as its users do."""
    detections, rows = noisy_detections(40, seed=1), []
    for image_id, instances in detections.items():
        for box, score in zip(instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), strict=True):
            x1, y1, x2, y2 = box
            rows.append({"image_id": image_id, "category_id": 2, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(MetadataCatalog.get("coco_toy_val").json_file)
        official = COCOeval(truth, truth.loadRes(rows), "bbox")
        official.params.useCats, official.params.maxDets = 0, [10, 100, 1000]
        official.evaluate()
        official.accumulate()
        official.summarize()
    metrics = evaluate(detections)
    assert list(metrics) == [f"AR{size}@{limit}" for limit in (100, 1000) for size in ("", "s", "m", "l")]
    recall = official.eval["recall"]
    for i, limit in ((1, 100), (2, 1000)):
        for a, size in enumerate(("", "s", "m", "l")):
            expected = recall[:, 0, a, i]
            if (expected == -1).all():
                assert np.isnan(metrics[f"AR{size}@{limit}"])
            else:
                assert metrics[f"AR{size}@{limit}"] == 100 * expected.mean()
    assert np.isnan(metrics["ARl@100"]) and metrics["ARs@100"] != metrics["ARm@100"]


def test_detectron2s_recall_is_another_rule(tmp_path):
    """Why there is an evaluator of our own. The better-scored detection takes the first object, which the other
    detection covers better; Detectron2 hands both out so that both objects are found."""
    name, objects = "coco_two_objects", [[0, 0, 100, 100], [0, 30, 100, 100]]
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 1e4, "iscrowd": 0}
        for i, box in enumerate(objects)
    ]
    images, categories = [{"id": 1, "file_name": "a", "height": 130, "width": 100}], [{"id": 1, "name": "object"}]
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories, "info": {}}))
    register_coco_instances(name, {}, str(path), "")
    try:
        # IoU 0.75 and 0.72 with the objects; 0.98 and 0.52.
        boxes, scores = Boxes(torch.tensor([[0.0, 14, 100, 114], [0, 0, 100, 98]])), torch.tensor([0.9, 0.8])
        ours = CocoRecallEvaluator(name, distributed=False)
        ours.process([{"image_id": 1}], [{"instances": Instances((130, 100), pred_boxes=boxes, scores=scores)}])
        theirs = COCOEvaluator(name, ("bbox",), distributed=False, use_fast_impl=False)
        theirs.reset()
        proposals = Instances((130, 100), proposal_boxes=boxes, objectness_logits=scores)
        theirs.process([{"image_id": 1}], [{"proposals": proposals}])
        assert ours.evaluate()["box_proposals"]["AR@100"] == pytest.approx(100 * (1 + 9 * 0.5) / 10)
        assert theirs.evaluate()["box_proposals"]["AR@100"] == pytest.approx(100 * (5 + 5 * 0.5) / 10)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_without_detections_the_recall_is_0(coco_toy, tmp_path):
    none = {image_id: instances[:0] for image_id, instances in noisy_detections(3).items()}
    metrics = evaluate(none, output_dir=str(tmp_path), setting={"NMS IoU": 0.7})
    assert metrics["AR@100"] == metrics["AR@1000"] == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["AR@100"] == 0 and written["setting"] == {"NMS IoU": 0.7}


def test_sizes_without_objects_are_null_in_the_json(coco_toy, tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    metrics = evaluate(noisy_detections(3), output_dir=str(tmp_path))
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert np.isnan(metrics["ARl@100"]) and written["ARl@100"] is None
    assert written.pop("setting") == {} and list(written) == list(metrics)


def test_perfect_detections_find_everything_but_crowds(coco_toy):
    perfect = {}
    for image_id, (boxes, crowd) in ground_truth().items():
        instances = Instances((120, 160), pred_boxes=Boxes(torch.from_numpy(boxes[~crowd])))
        instances.scores = torch.ones(len(instances.pred_boxes))
        perfect[image_id] = instances
    assert evaluate(perfect)["AR@100"] == pytest.approx(100)
