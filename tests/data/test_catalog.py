"""Data sets of one's own and of several kinds: loaded, trained on, evaluated and shown, or refused before it begins."""

import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

from gs_d2.config import add_gs_config
from gs_d2.data import CocoDatasetMapper, FaceDatasetMapper, build_test_loader, build_training_views
from gs_d2.data.catalog import load_records
from gs_d2.engine.checks import check_classes
from gs_d2.engine.trainer import Trainer

NAMES = MINE, COCO = "catalog_test_mine", "catalog_test_coco"


@pytest.fixture(autouse=True)
def temporary():
    yield
    for name in NAMES:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


def register(tmp_path, change=lambda record, index: record, evaluator_type="wider_face", **metadata):
    """Three images of two faces."""
    records = []
    for i in range(3):
        Image.new("RGB", (128, 96), (i, 9, 9)).save(tmp_path / f"{i}.png")
        record = {
            "file_name": str(tmp_path / f"{i}.png"),
            "image_id": f"e/{i}",
            "gt_boxes": np.float32([[10, 20, 50, 70], [60, 20, 90, 60]]),
            "gt_ignore": np.zeros(2, dtype=bool),
        }
        records.append(change(record, i))
    DatasetCatalog.register(MINE, lambda: records)
    MetadataCatalog.get(MINE).set(evaluator_type=evaluator_type, thing_classes=["face"], **metadata)


def register_coco(tmp_path, names=("face",), num_empty=1):
    """Two images of an object each, and some of none."""
    images = [{"id": i, "file_name": f"{i % 3}.png", "height": 96, "width": 128} for i in range(2 + num_empty)]
    annotations = [{"id": i, "image_id": i, "category_id": 4, "bbox": [10, 20, 40, 50]} for i in range(2)]
    categories = [{"id": 4 + i, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_instances(COCO, {}, str(tmp_path / "a.json"), str(tmp_path))


def config(*opts):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file("configs/quick/demo.yaml")
    cfg.merge_from_list(["DATASETS.TRAIN", (MINE,), "DATASETS.TEST", (MINE,), "DATALOADER.NUM_WORKERS", 0, *opts])
    return cfg


def standard(record, index):
    """Detectron2's standard dict of the same."""
    boxes = record.pop("gt_boxes").tolist()
    del record["gt_ignore"]
    return {
        **record,
        "height": 96,
        "width": 128,
        "annotations": [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for box in boxes],
    }


def lists(record, index):
    return record | {"gt_boxes": record["gt_boxes"].tolist(), "gt_ignore": [0, 0]}


WORKING = {
    "int": lambda record, index: record | {"image_id": index},
    "plain": lambda record, index: record | {"image_id": f"im{index}"},
    "nested": lambda record, index: record | {"image_id": f"a/b/c{index}"},
    "lists": lists,
    "no gt_ignore": lambda record, index: {key: value for key, value in record.items() if key != "gt_ignore"},
    "standard": standard,
}


@pytest.mark.parametrize("change", WORKING)
@pytest.mark.parametrize("evaluator_type", ["wider_face", "face_eval", "coco"])
def test_from_the_loader_to_the_figures(tmp_path, change, evaluator_type):
    """The data set's own boxes as detections: everything is found, and the files are written."""
    import torch
    from detectron2.structures import Boxes, Instances

    register(tmp_path, WORKING[change], evaluator_type)
    cfg = config("OUTPUT_DIR", str(tmp_path / "out"), "INPUT.MIN_SIZE_TEST", 0)
    Trainer.check_evaluation(cfg)
    views = build_training_views(cfg)
    assert len(views) == 3 and len(views[0]["instances"]) <= 2
    evaluator = Trainer.build_evaluator(cfg, MINE)
    evaluator.reset()
    for (image,) in build_test_loader(cfg, MINE):
        boxes = Boxes(torch.tensor([[10.0, 20, 50, 70], [60, 20, 90, 60]]))
        scores = torch.tensor([0.9, 0.8]) - 0.1 * int(str(image["image_id"])[-1])
        evaluator.process([image], [{"instances": Instances((96, 128), pred_boxes=boxes, scores=scores)}])
    (metrics,) = evaluator.evaluate().values()
    assert next(iter(metrics.values())) == pytest.approx(100, abs=0.2)
    written = {path.name for path in (tmp_path / f"out/inference/{MINE}").rglob("*")}
    assert "results.json" in written
    assert (
        len([name for name in written if name.endswith(".txt")])
        == {"wider_face": 3, "face_eval": 1, "coco": 0}[evaluator_type]
    )


REFUSED = {
    "no id": (lambda record, index: record | {"image_id": None}, "image_id must be text or a whole number, got None"),
    "one id": (lambda record, index: record | {"image_id": "e/same"}, "image_id 'e/same' is that of 3 images, .*0.png"),
    "ids alike": (lambda record, index: record | {"image_id": [1, "1", 2][index]}, "image_id '1' is that of 2 images"),
    "id that leaves": (lambda record, index: record | {"image_id": f"../{index}"}, "cannot name a file of predictions"),
    "length": (lambda record, index: record | {"gt_ignore": np.zeros(3, bool)}, r"dict 0 \(.*0\.png\): gt_ignore must"),
    "NaN": (lambda record, index: record | {"gt_boxes": np.full((2, 4), np.nan)}, "its boxes have NaN or infinity"),
    "class": (lambda record, index: record | {"gt_classes": [0, 1]}, "it has class 1, and thing_classes of .* names 1"),
    "no dict": (lambda record, index: [record], "dict 0: it is no dict but of type list"),
    "no file": (
        lambda record, index: record | {"file_name": f"/nowhere/{index}"},
        "3 of 3 images are missing, first /n",
    ),
    "nameless": (lambda record, index: record | {"file_name": None}, "3 of 3 dicts have no file_name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(tmp_path, case):
    change, message = REFUSED[case]
    register(tmp_path, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Trainer.check_evaluation(config("OUTPUT_DIR", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("evaluator_type", "change", "message"),
    [
        (None, lambda record, index: record, "There is no evaluator for catalog_test_mine, of evaluator_type None"),
        (
            "fddb",
            lambda record, index: record,
            r"catalog_test_mine, e/0: gt_ellipses must be an array \[n, 5\], got 'None'",
        ),
        ("fddb", lambda record, index: record | {"gt_ellipses": [[1, 2, 3]]}, "gt_ellipses must be an array"),
        ("fddb", lambda record, index: record | {"image_id": f"{index}\n"}, "must be one printable line"),
        ("face_eval", lambda record, index: record | {"image_id": f"my face {index}"}, "has blanks"),
    ],
)
def test_refused_by_the_evaluator_before_training(tmp_path, evaluator_type, change, message):
    register(tmp_path, change, evaluator_type)
    with pytest.raises(ValueError, match=message):
        Trainer.check_evaluation(config())


@pytest.mark.parametrize("given", [None, {}, "abc", [], iter([])])
def test_what_is_no_list_of_dicts(given):
    DatasetCatalog.register(MINE, lambda: given)
    with pytest.raises(ValueError, match=rf"{MINE}: (its function must give a list of dicts|it has no image)"):
        load_records(MINE, for_training=True)
    with pytest.raises(ValueError, match="'nothing' is not registered"):
        load_records("nothing", for_training=True)


def test_a_function_that_fails_is_named():
    DatasetCatalog.register(MINE, lambda: [{}["bbox"]])
    with pytest.raises(
        ValueError, match=rf"{MINE}: its function failed in line \d+ of .*test_catalog\.py: KeyError: 'bbox'"
    ):
        load_records(MINE, for_training=True)


def test_training_needs_no_ids_but_boxes(tmp_path):
    register(tmp_path, lambda record, index: {key: record[key] for key in ("file_name", "gt_boxes")})
    view = build_training_views(config())[0]
    assert "image_id" not in view and len(view["instances"]) + len(view["ignore_boxes"]) <= 2
    DatasetCatalog.remove(MINE)
    register(tmp_path, lambda record, index: {key: record[key] for key in ("file_name", "image_id")})
    with pytest.raises(ValueError, match=r"dict 0 \(.*0\.png\): it has neither gt_boxes nor annotations"):
        build_training_views(config())
    assert len(build_test_loader(config(), MINE)) == 3


@pytest.mark.parametrize("order", [(MINE, COCO), (COCO, MINE)])
def test_each_image_has_the_mapper_of_its_own_data_set(tmp_path, order, monkeypatch):
    register(tmp_path)
    register_coco(tmp_path)
    seen, call = [], FaceDatasetMapper.__call__

    def spy(self, record):
        seen.append((type(self), type(record["image_id"])))
        return call(self, record)

    monkeypatch.setattr(FaceDatasetMapper, "__call__", spy)
    views = build_training_views(config("DATASETS.TRAIN", order))
    assert len(views) == 5, "the image of COCO's without an object is left out, as Detectron2 does"
    for i in range(5):
        views[i]
    mine, coco = [(FaceDatasetMapper, str)] * 3, [(CocoDatasetMapper, int)] * 2
    assert seen == (mine + coco if order[0] == MINE else coco + mine)


def test_images_without_objects(tmp_path):
    register_coco(tmp_path, num_empty=1)
    register(tmp_path, lambda record, index: record | {"gt_boxes": [], "gt_ignore": []} if index else record)
    assert len(build_training_views(config("DATASETS.TRAIN", (MINE, COCO)))) == 3 + 2
    whole = config("DATASETS.TRAIN", (MINE, COCO), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    assert len(build_training_views(whole)) == 3 + 3


RETINANET = ("MODEL.META_ARCHITECTURE", "GroupSamplingRetinaNet", "DATASETS.TRAIN", (COCO,), "DATASETS.TEST", (COCO,))


@pytest.mark.parametrize("num_classes", [1, 2])
def test_classes_beyond_the_detectors_are_refused(tmp_path, num_classes):
    register_coco(tmp_path, names=("cat", "dog", "owl"))
    load_records(COCO, for_training=True)
    for opts in (RETINANET, ("MODEL.META_ARCHITECTURE", "GroupedFastRCNN", *RETINANET[2:])):
        key = "MODEL.RETINANET.NUM_CLASSES" if "RetinaNet" in opts[1] else "MODEL.ROI_HEADS.NUM_CLASSES"
        message = rf"{COCO} has 3 classes \(cat, dog, owl\) and {key} is {num_classes}, .*: set {key} 3"
        with pytest.raises(ValueError, match=message):
            check_classes(config(*opts, key, num_classes))
        with pytest.raises(ValueError, match=message):
            check_classes(config(*opts, key, num_classes, "DATASETS.TRAIN", ()), training=False)
        check_classes(config(*opts, key, 3))
    check_classes(config("DATASETS.TRAIN", (COCO,), "DATASETS.TEST", (COCO,)))  # takes all for one class


def test_classes_that_differ_between_data_sets(tmp_path, caplog):
    register(tmp_path)
    register_coco(tmp_path, names=("head",))
    load_records(COCO, for_training=True)
    both = ("DATASETS.TRAIN", (MINE, COCO))
    with pytest.raises(ValueError, match=f"{MINE} has the classes face and {COCO} has head: a detector that tells"):
        check_classes(config(*RETINANET, *both))
    check_classes(config(*both))
    assert f"{MINE} has the classes face and {COCO} has head: all are trained as one" in caplog.text
    with pytest.raises(ValueError, match=f"{MINE} has the classes face and {COCO} has head"):
        check_classes(config(*RETINANET, "DATASETS.TRAIN", (MINE,)))  # tested on COCO
