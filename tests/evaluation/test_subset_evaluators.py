"""Evaluators on a subset of a data set: as on a data set that has no other images."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from test_coco_recall_evaluator import noisy_detections
from test_wider_face_evaluator import IDS, dataset_dicts, outputs_of

from gs_d2.data import register_subset
from gs_d2.evaluation import CocoEvaluator, CocoRecallEvaluator, WiderFaceEvaluator, WiderGroundTruth


@pytest.fixture
def temporary():
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("chosen", [[], [0], [2, 5, 8], list(range(9))])
def test_ground_truth_of_images(chosen):
    dicts = dataset_dicts()
    for i, image in enumerate(dicts):  # of different numbers of faces, one of none
        image["gt_boxes"], image["attributes"] = image["gt_boxes"][: i % 4], {"invalid": np.arange(i % 4) == 1}

    def of(dicts):
        fields = ([d["image_id"] for d in dicts], [d["gt_boxes"] for d in dicts], [d["attributes"] for d in dicts])
        return WiderGroundTruth.from_boxes(*fields)

    found = of(dicts).of_images([IDS[i] for i in reversed(chosen)] + ["0--Event/unknown"])
    expected = of([dicts[i] for i in chosen])
    assert found.image_ids == expected.image_ids
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    for name, mask in expected.subsets.items():
        np.testing.assert_array_equal(found.subsets[name], mask)


def test_wider_face_with_the_official_files(temporary, monkeypatch, tmp_path, caplog):
    """They list all images, of which only the subset's count."""
    dicts = dataset_dicts()
    whole = WiderGroundTruth.from_boxes(IDS, [d["gt_boxes"] for d in dicts], [d["attributes"] for d in dicts])
    whole.subsets["hard"] = whole.subsets["all"].copy()
    monkeypatch.setattr(WiderGroundTruth, "from_mat_files", lambda folder: whole)
    (tmp_path / "wider_face_val.mat").touch()
    DatasetCatalog.register("wider_subset_test", lambda: dicts)
    MetadataCatalog.get("wider_subset_test").set(ground_truth_dir=str(tmp_path))
    name = register_subset("wider_subset_test", 3)
    DatasetCatalog.register("wider_only_test", lambda: dicts[::3])
    metrics = {}
    for dataset in (name, "wider_only_test"):
        if dataset == "wider_only_test":
            (tmp_path / "wider_face_val.mat").unlink()
            MetadataCatalog.get(dataset).set(ground_truth_dir=str(tmp_path))
        evaluator = WiderFaceEvaluator(dataset, str(tmp_path / dataset))
        outputs = outputs_of(dicts)
        for image, output in list(zip(dicts, outputs, strict=True))[::3]:
            evaluator.process([image], [output])
        metrics[dataset] = evaluator.evaluate()["wider_face"]
    assert metrics[name]["hard"] == metrics[name]["all"] > 0
    without_hard = {key: value for key, value in metrics[name].items() if not key.startswith("hard")}
    assert without_hard == metrics["wider_only_test"]
    assert "were not processed" not in caplog.text
    assert json.loads((tmp_path / name / "results.json").read_text())["num_images"] == 3


@pytest.mark.parametrize("kind", [CocoRecallEvaluator, CocoEvaluator])
def test_coco(temporary, coco_toy, tmp_path, caplog, kind):
    name = register_subset("coco_toy_val", 2)
    image_ids = MetadataCatalog.get(name).image_ids
    content = json.loads(open(MetadataCatalog.get("coco_toy_val").json_file).read())
    content["images"] = [x for x in content["images"] if x["id"] in image_ids]
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in image_ids]
    (tmp_path / "only.json").write_text(json.dumps(content))
    register_coco_instances("coco_only_test", {}, str(tmp_path / "only.json"), "")
    DatasetCatalog.get("coco_only_test")
    assert len(image_ids) == 2 and content["annotations"]

    def metrics(evaluator):
        evaluator.reset()
        detections = noisy_detections(30)
        for image_id in image_ids:
            evaluator.process([{"image_id": image_id}], [{"instances": detections[image_id]}])
        return evaluator.evaluate()

    if kind is CocoRecallEvaluator:
        found, expected = (metrics(kind(dataset, distributed=False)) for dataset in (name, "coco_only_test"))
    else:
        options = {"distributed": False, "use_fast_impl": False}
        found = metrics(kind(name, ("bbox",), **options))
        expected = metrics(COCOEvaluator("coco_only_test", ("bbox",), **options))
    for task in expected:
        assert found[task] == pytest.approx(expected[task], nan_ok=True)
        assert any(value > 0 for value in found[task].values())
    assert "were not processed" not in caplog.text
