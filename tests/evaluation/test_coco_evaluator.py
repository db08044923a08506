"""COCO's evaluators on files and dicts as people have them: the annotations as detections give 100, or one line."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances

from gs_d2.data.catalog import load_records
from gs_d2.data.records import faces_of
from gs_d2.evaluation import CocoEvaluator, CocoRecallEvaluator

NAME = "coco_evaluator_test"
KINDS = [CocoRecallEvaluator, CocoEvaluator]


@pytest.fixture(autouse=True)
def temporary():
    yield
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
    if NAME in MetadataCatalog.list():
        MetadataCatalog.remove(NAME)


def content(change=lambda annotation, index: None):
    """Four images of two objects each, of three classes; the annotations may be changed in place."""
    images = [{"id": i + 1, "file_name": f"{i}.jpg", "height": 96, "width": 128} for i in range(4)]
    annotations = []
    for i in range(4):
        for k in range(2):
            box = [10 + 50 * k, 20 + 5 * i, 40, 50]
            entry = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": k + 1, "bbox": box}
            annotations.append({**entry, "area": 2000, "iscrowd": 0})
    for index, annotation in enumerate(annotations):
        change(annotation, index)
    categories = [{"id": i, "name": f"c{i}"} for i in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}


def registered(tmp_path, given):
    (tmp_path / "a.json").write_text(json.dumps(given))
    register_coco_instances(NAME, {}, str(tmp_path / "a.json"), str(tmp_path))


def perfect(kind, **options):
    """The metrics for the data set's own boxes as detections."""
    arguments = (NAME, ("bbox",)) if kind is CocoEvaluator else (NAME,)
    fast = {"use_fast_impl": False} if kind is CocoEvaluator else {}
    evaluator = kind(*arguments, distributed=False, **fast, **options)
    evaluator.reset()
    for record in load_records(NAME, for_training=False):
        faces = faces_of(record)
        found = Instances((96, 128), pred_boxes=Boxes(torch.as_tensor(faces.boxes, dtype=torch.float32)))
        found.scores = torch.linspace(0.9, 0.8, len(faces.boxes))
        found.pred_classes = torch.as_tensor(faces.classes)
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": found}])
    (metrics,) = evaluator.evaluate().values()
    return metrics["AP" if kind is CocoEvaluator else "AR@100"]


def remove(key):
    return lambda annotation, index: annotation.pop(key)


CHANGES = {
    "plain": lambda annotation, index: None,
    "ids from 0": lambda annotation, index: annotation.update(id=index),
    "the same id": lambda annotation, index: annotation.update(id=3),
    "no id": remove("id"),
    "no area": remove("area"),
    "no iscrowd": remove("iscrowd"),
    "ignore": lambda annotation, index: annotation.update(ignore=int(index == 0)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_the_annotations_are_found(tmp_path, kind, change):
    registered(tmp_path, content(CHANGES[change]))
    assert perfect(kind) == pytest.approx(100)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_refused_when_the_evaluator_is_built(tmp_path, kind):
    registered(tmp_path, content(lambda annotation, index: annotation.update(bbox=None)))
    with pytest.raises(ValueError, match=r"a\.json: annotations\[0\] \(id 1\): bbox must be four numbers .* got None"):
        kind(NAME, distributed=False)


@pytest.mark.parametrize("kind", KINDS)
def test_without_annotations(tmp_path, kind):
    given = content()
    del given["annotations"]
    registered(tmp_path, given)
    if kind is CocoRecallEvaluator:
        with pytest.raises(ValueError, match=r"a\.json has no annotations, without which there is no recall"):
            kind(NAME)
    else:
        evaluator = kind(NAME, ("bbox",), distributed=False, output_dir=str(tmp_path / "out"))
        evaluator.reset()
        found = Instances((96, 128), pred_boxes=Boxes(torch.tensor([[1.0, 2, 3, 4]])), scores=torch.tensor([0.5]))
        found.pred_classes = torch.tensor([1])
        evaluator.process([{"image_id": 1}], [{"instances": found}])
        assert evaluator.evaluate() == {}
        (written,) = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
        assert written == {"image_id": 1, "category_id": 2, "bbox": [1, 2, 2, 2], "score": 0.5}


def standard_dicts(**changes):
    """Detectron2's standard dicts of two images, without `height` and `width`; ids of numpy and text."""
    annotation = {"bbox": [10, 20, 40, 50], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, **changes}
    other = {"bbox": np.array([5.0, 6, 30, 40]), "bbox_mode": 0, "category_id": np.int64(0)}
    return [
        {"file_name": "a.jpg", "image_id": "event/a", "annotations": [annotation, other]},
        {"file_name": "b.jpg", "image_id": "b", "annotations": []},
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [None, ["face", "head"]])
def test_standard_dicts_without_a_file(kind, names):
    DatasetCatalog.register(NAME, standard_dicts)
    MetadataCatalog.get(NAME).set(evaluator_type="coco", **({"thing_classes": names} if names else {}))
    assert perfect(kind) == pytest.approx(100)


@pytest.mark.parametrize("kind", KINDS)
def test_dicts_of_other_images_than_the_file(tmp_path, kind):
    (tmp_path / "a.json").write_text(json.dumps(content()))
    DatasetCatalog.register(NAME, lambda: [{"file_name": "x.jpg", "image_id": 77, "annotations": []}])
    MetadataCatalog.get(NAME).set(evaluator_type="coco", json_file=str(tmp_path / "a.json"))
    with pytest.raises(ValueError, match=r"image_id 77 \(x\.jpg\) is of no image of .*a\.json"):
        kind(NAME)


def test_classes_that_the_data_set_does_not_have_are_left_out(tmp_path, caplog):
    registered(tmp_path, content())
    evaluator = CocoEvaluator(NAME, ("bbox",), distributed=False, use_fast_impl=False)
    evaluator.reset()
    found = Instances((96, 128), pred_boxes=Boxes(torch.tensor([[10.0, 20, 50, 70], [0, 0, 9, 9]])))
    found.scores, found.pred_classes = torch.tensor([0.5, 0.9]), torch.tensor([0, 50])
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(100 * 26 / 101 / 2)  # one of four, one class of two
    assert "detections of class 50 and others, of which coco_evaluator_test has 3" in caplog.text


def test_a_detection_of_nan_is_named(tmp_path):
    registered(tmp_path, content())
    evaluator = CocoEvaluator(NAME, ("bbox",), distributed=False)
    found = Instances((96, 128), pred_boxes=Boxes(torch.tensor([[0, 0, 1, float("nan")]])), scores=torch.ones(1))
    found.pred_classes = torch.tensor([0])
    with pytest.raises(ValueError, match="1: 1 detections have NaN or infinity"):
        evaluator.process([{"image_id": 1}], [{"instances": found}])


def test_registered_classes_that_are_not_the_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(content()))
    register_coco_instances(NAME, {"thing_classes": ["face"]}, str(tmp_path / "a.json"), str(tmp_path))
    with pytest.raises(ValueError, match=r"categories are \['c1', 'c2', 'c3'\], and .* thing_classes \['face'\]"):
        load_records(NAME, for_training=True)
