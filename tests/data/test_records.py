"""Dataset dicts: in every form that people have read alike, or refused in words; ours serve Detectron2's mapper."""

import copy
import pickle

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.structures import Boxes, BoxMode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gs_d2.data.records import Annotations, Faces, Record, check_image_id, check_record, faces_of, name_of

BOXES, IGNORE, CLASSES = [[10, 20, 50, 70], [60, 20, 90, 60.5]], [False, True], [2, 0]
FIELDS = ("gt_boxes", "gt_ignore", "gt_classes")
FORMS = {
    "arrays": {"gt_boxes": np.float32(BOXES), "gt_ignore": np.array(IGNORE), "gt_classes": np.array(CLASSES)},
    "lists": {"gt_boxes": BOXES, "gt_ignore": IGNORE, "gt_classes": CLASSES},
    "tensors": {
        "gt_boxes": torch.tensor(BOXES),
        "gt_ignore": torch.tensor(IGNORE),
        "gt_classes": torch.tensor(CLASSES),
    },
    "Boxes, and 0 and 1": {
        "gt_boxes": Boxes(torch.tensor(BOXES)),
        "gt_ignore": [0, 1],
        "gt_classes": np.uint8(CLASSES),
    },
    "annotations": {
        "annotations": [
            {"bbox": [10, 20, 50, 70], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2},
            {"bbox": np.array([60, 20, 30, 40.5]), "bbox_mode": 1, "category_id": np.int64(0), "iscrowd": True},
        ]
    },
    "our own": Record(gt_boxes=np.float32(BOXES), gt_ignore=np.array(IGNORE), gt_classes=np.array(CLASSES)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_alike(form):
    boxes, ignore, classes = check_record({"file_name": "a.jpg", **FORMS[form]}, for_training=True)
    assert boxes.tolist() == BOXES and boxes.dtype in (np.float32, np.float64)
    assert ignore.tolist() == IGNORE and ignore.dtype == bool
    assert classes.tolist() == CLASSES and classes.dtype == np.int64


@pytest.mark.parametrize("fields", [{"gt_boxes": []}, {"gt_boxes": np.zeros((0, 4))}, {"annotations": []}])
def test_no_boxes_and_defaults(fields):
    boxes, ignore, classes = faces_of(fields)
    assert boxes.shape == (0, 4) and ignore.shape == classes.shape == (0,)
    boxes, ignore, classes = faces_of({"gt_boxes": np.int64([[1, 2, 3, 4]])})
    assert boxes.dtype == np.float64 and ignore.tolist() == [False] and classes.tolist() == [0]


WRONG = [
    ({}, "it has neither gt_boxes nor annotations"),
    ({"gt_boxes": None}, "gt_boxes must be of numbers"),
    ({"gt_boxes": [1, 2, 3, 4]}, r"gt_boxes must be of shape \[n, 4\], got \[4\]"),
    ({"gt_boxes": [[1, 2, 3]]}, r"gt_boxes must be of shape \[n, 4\], got \[1, 3\]"),
    ({"gt_boxes": [[1, 2, 3, 4], [1, 2]]}, "gt_boxes is no array"),
    ({"gt_boxes": [["1", "2", "3", "4"]]}, "gt_boxes must be of numbers, got text"),
    ({"gt_boxes": [[1, 2, 3, None]]}, "gt_boxes must be of numbers, got objects"),
    ({"gt_boxes": [[True, True, False, False]]}, "gt_boxes must be of numbers, got True and False"),
    ({"gt_boxes": BOXES, "gt_ignore": [False]}, "gt_ignore must have one entry for each of 2 boxes"),
    ({"gt_boxes": BOXES, "gt_ignore": [0, 2]}, "gt_ignore must be of True and False"),
    ({"gt_boxes": BOXES, "gt_ignore": ["no", "yes"]}, "gt_ignore must be of whole numbers, got text"),
    ({"gt_boxes": BOXES, "gt_classes": [0, -1]}, "gt_classes must not be negative, got -1"),
    ({"gt_boxes": BOXES, "gt_classes": [0.5, 1]}, "gt_classes must be of whole numbers, got fractions"),
    ({"gt_boxes": BOXES, "gt_classes": [[0, 1]]}, "gt_classes must have one entry for each of 2 boxes"),
    ({"gt_boxes": BOXES, "attributes": {"blur": [1]}}, r"attributes has 'blur' of shape \(1,\) for 2 boxes"),
    ({"gt_boxes": BOXES, "attributes": [1, 2]}, "attributes must be a dict of arrays, got list"),
    ({"annotations": None}, "annotations must be a list, got NoneType"),
    ({"annotations": "none"}, "annotations must be a list, got str"),
    ({"annotations": [None]}, r"annotations\[0\] must be a dict"),
    ({"annotations": [{"bbox_mode": 0, "category_id": 0}]}, r"annotations\[0\]: bbox must be four numbers"),
    ({"annotations": [{"bbox": [1, 2, 3, 4, 30], "bbox_mode": 4, "category_id": 0}]}, "bbox must be four numbers"),
    ({"annotations": [{"bbox": [1, 2, 3, 4], "category_id": 0}]}, "bbox_mode must be BoxMode.XYXY_ABS or BoxMode.XYWH"),
    ({"annotations": [{"bbox": [0, 0, 1, 1], "bbox_mode": 2, "category_id": 0}]}, "bbox_mode must be"),
    ({"annotations": [{"bbox": [1, 2, 3, 4], "bbox_mode": 0}]}, "category_id must be a class from 0 on, got None"),
    ({"annotations": [{"bbox": [1, 2, 3, 4], "bbox_mode": 0, "category_id": -1}]}, "category_id must be a class"),
    (
        {"annotations": [{"bbox": [1, 2, 3, 4], "bbox_mode": 0, "category_id": 0, "iscrowd": 2}]},
        "iscrowd must be 0 or 1, got 2",
    ),
    ({"gt_boxes": BOXES, "height": 0}, "height must be a whole number above 0, got 0"),
    ({"gt_boxes": BOXES, "width": "128"}, "width must be a whole number above 0, got '128'"),
    ({"gt_boxes": BOXES, "file_name": None}, "file_name must be a path, got None"),
    ({"gt_boxes": BOXES, "file_name": 3}, "file_name must be a path, got 3"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_anything_else_is_refused_in_words(fields, message):
    with pytest.raises(ValueError, match=message):
        check_record({"file_name": "a.jpg", **fields}, for_training=True)


def test_boxes_of_nan_can_be_trained_on_but_not_tested_on():
    record = {"file_name": "a.jpg", "gt_boxes": [[1, 2, 3, float("nan")]]}
    assert len(check_record(record, for_training=True).boxes) == 1
    with pytest.raises(ValueError, match="NaN or infinity"):
        check_record(record, for_training=False)
    assert check_record({"file_name": "a.jpg"}, for_training=False) is None


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([0, 1, np.int8(1)]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)
KEYS = ["file_name", "height", "width", "gt_boxes", "gt_ignore", "gt_classes", "annotations", "attributes"]


@given(st.sampled_from(list(FORMS)), st.dictionaries(st.sampled_from(KEYS), ANY, min_size=1), st.booleans())
def test_any_value_of_any_key_is_read_or_refused(form, changes, for_training):
    try:
        faces = check_record({"file_name": "a.jpg", **FORMS[form], **changes}, for_training)
    except ValueError:
        return
    n = len(faces.boxes)
    assert faces.boxes.shape == (n, 4) and faces.ignore.shape == faces.classes.shape == (n,)


@given(st.sampled_from(["bbox", "bbox_mode", "category_id", "iscrowd"]), ANY)
def test_any_value_of_an_annotations_key_is_read_or_refused(key, value):
    annotation = {"bbox": [1, 2, 3, 4], "bbox_mode": 0, "category_id": 0, "iscrowd": 0, key: value}
    try:
        faces = faces_of({"annotations": [annotation]})
    except ValueError as error:
        assert "annotations[0]" in str(error)
        return
    assert faces.boxes.shape == (1, 4) and faces.classes[0] >= 0


@pytest.mark.parametrize("image_id", ["a", "a/b/c", 0, 7, np.int64(3), -1])
def test_ids(image_id):
    check_image_id(image_id)


@pytest.mark.parametrize("image_id", [None, "", 1.5, True, (1, 2), ["a"], {}, b"a"])
def test_what_is_no_id(image_id):
    with pytest.raises(ValueError, match="image_id must be text or a whole number, got"):
        check_image_id(image_id)


def test_names_of_pictures():
    assert [name_of({"image_id": x}) for x in ("e/a", "a.b", 0)] == ["a", "a.b", "0"]
    assert name_of({"file_name": "x/b.c.jpg"}) == "b.c"


def own_record(tmp_path, orientation=None):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (100, 80), (9, 99, 199)).save(tmp_path / "a.jpg", exif=exif)
    boxes, ignore = np.float32([[10, 20, 50, 70], [60, 20, 60, 60]]), np.array([False, True])
    return Record(file_name=str(tmp_path / "a.jpg"), image_id="a", gt_boxes=boxes, gt_ignore=ignore)


@pytest.mark.parametrize("of", [lambda x: x, lambda x: pickle.loads(pickle.dumps(x)), copy.copy])
@pytest.mark.parametrize(("orientation", "size"), [(None, (80, 100)), (6, (100, 80)), (3, (80, 100))])
def test_our_records_know_the_size_of_the_image_when_asked(tmp_path, of, orientation, size):
    record = of(own_record(tmp_path, orientation))
    assert type(record) is Record and "height" not in record and record.get("width") is None
    assert (record["height"], record["width"]) == size and record["height"] == record.get("height")
    with pytest.raises(KeyError, match="depth"):
        record["depth"]


def test_our_records_serve_detectron2s_mapper(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (160,), "INPUT.RANDOM_FLIP", "none"])
    record = own_record(tmp_path)
    for _ in range(2):
        view = DatasetMapper(cfg, is_train=True)(record)
        assert view["instances"].gt_boxes.tensor.tolist() == [[20, 40, 100, 140]]
        assert view["instances"].gt_classes.tolist() == [0] and (view["height"], view["width"]) == (80, 100)
    assert "annotations" not in DatasetMapper(cfg, is_train=False)(record)
    assert len(record["annotations"]) == 2, "the data set's dict is left alone"


def test_annotations_are_a_list_of_dicts():
    annotations = Annotations(Faces(np.float32(BOXES), np.array(IGNORE), np.array(CLASSES)))
    dicts = [
        {"bbox": [10, 20, 50, 70], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2, "iscrowd": 0},
        {"bbox": [60, 20, 90, 60.5], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1},
    ]
    assert list(annotations) == dicts == annotations and annotations[-1] == dicts[1] and annotations[:1] == dicts[:1]
    copied = copy.deepcopy(annotations)
    assert type(copied) is list and copied == dicts
    assert annotations != 3 and not annotations == dicts[:1]
    with pytest.raises(IndexError):
        annotations[2]
