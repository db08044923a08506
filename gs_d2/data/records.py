"""What a dataset dict may hold, as this project makes it or anybody else: read in one way, and checked."""

import numbers
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image

_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


class Faces(NamedTuple):
    """The annotated boxes of an image.

    Attributes:
        boxes (float [n, 4]): XYXY pixels.
        ignore (bool [n]): regions where no anchor is a negative.
        classes (int64 [n]): from 0 on.
    """

    boxes: np.ndarray
    ignore: np.ndarray
    classes: np.ndarray


class Record(dict):
    """A dataset dict of a list's image, for the detectors here and for Detectron2's own mappers and evaluators.

    `annotations` are :class:`Annotations`. `record["height"]` and `record["width"]` are read from the image's file when
    they are asked for, where the list does not have them; `in` and `get` do not know them before.
    """

    def __init__(self, *, gt_boxes, gt_ignore, gt_classes=None, **fields):
        """
        Args:
            gt_boxes, gt_ignore, gt_classes: as :class:`Faces`; without classes all are 0, and the key is left out.
            fields: `file_name`, `image_id` and what else the data set has.
        """
        classes = np.zeros(len(gt_boxes), dtype=np.int64) if gt_classes is None else gt_classes
        super().__init__(fields, gt_boxes=gt_boxes, gt_ignore=gt_ignore)
        if gt_classes is not None:
            self["gt_classes"] = gt_classes
        self["annotations"] = Annotations(Faces(gt_boxes, gt_ignore, classes))

    def __missing__(self, key):
        if key not in ("height", "width"):
            raise KeyError(key)
        with Image.open(self["file_name"]) as image:
            size = image.size
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # orientation: boxes are of the upright image
        self["width"], self["height"] = reversed(size) if turned else size
        return self[key]

    def __reduce__(self):
        return _record, (dict(self),)


def _record(fields: dict) -> Record:
    record = Record.__new__(Record)
    record.update(fields)
    return record


class Annotations(Sequence):
    """Detectron2's `annotations` of an image, each made when it is asked for: dicts of all faces would take a hundred
    times the memory of their boxes. `copy.deepcopy`, with which Detectron2's mapper begins, gives a list of dicts.

    Regions to ignore are crowds, which Detectron2 trains on in no way.
    """

    def __init__(self, faces: Faces):
        self._faces = faces

    def __len__(self):
        return len(self._faces.boxes)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        boxes, ignore, classes = self._faces
        return {
            "bbox": boxes[index].tolist(),
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": int(classes[index]),
            "iscrowd": int(ignore[index]),
        }

    def __deepcopy__(self, memo):
        return list(self)

    def __eq__(self, other):
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None


def faces_of(record: dict) -> Faces:
    """The annotated boxes of a dataset dict.

    Args:
        record: with `gt_boxes` [n, 4] XYXY and optionally `gt_ignore` [n] and `gt_classes` [n], as arrays, tensors or
            lists; or with Detectron2's `annotations`: dicts with `bbox`, `bbox_mode` (XYXY_ABS or XYWH_ABS),
            `category_id` and optionally `iscrowd`. Numbers may be NaN or infinite.

    Raises:
        ValueError: it has neither, or they are anything else; in words, without the image's name.
    """
    if "gt_boxes" in record:
        return _of_arrays(record)
    if "annotations" in record:
        return _of_annotations(record["annotations"])
    raise ValueError("it has neither gt_boxes nor annotations")


def check_record(record, for_training: bool) -> Faces | None:
    """The boxes of a dataset dict that can be trained on or tested on; None where it has none, as test sets may.

    To be evaluated it needs no `file_name`, as where somebody else's loader reads the image.

    Raises:
        ValueError: it cannot be, in words. Boxes of NaN or infinity can be trained on: the image is left out then.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is no dict but of type {type(record).__name__}")
    file_name = record.get("file_name")
    if (for_training or file_name is not None) and not (isinstance(file_name, (str, os.PathLike)) and str(file_name)):
        raise ValueError(f"file_name must be a path, got {file_name!r}")
    for key in ("height", "width"):
        value = record.get(key)
        if value is not None and (not _is_whole(value) or value < 1):
            raise ValueError(f"{key} must be a whole number above 0, got {value!r}")
    if not for_training and not ("gt_boxes" in record or "annotations" in record):
        return None
    faces = faces_of(record)
    if not for_training and not np.isfinite(faces.boxes).all():
        raise ValueError("its boxes have NaN or infinity")
    attributes = record.get("attributes", {})
    if not isinstance(attributes, dict):
        raise ValueError(f"attributes must be a dict of arrays, got {type(attributes).__name__}")
    for name, values in attributes.items():
        if np.shape(values) != (len(faces.boxes),):
            raise ValueError(f"attributes has {name!r} of shape {np.shape(values)} for {len(faces.boxes)} boxes")
    return faces


def name_of(record: dict) -> str:
    """What a picture of an image or of one of its views is called: the last part of its id or, without, of its file."""
    image_id = record.get("image_id")
    return os.path.basename(os.path.splitext(os.fspath(record["file_name"]))[0] if image_id is None else str(image_id))


def check_image_id(image_id) -> None:
    """Raises ValueError unless it can identify an image: text, or a whole number."""
    if not ((isinstance(image_id, str) and image_id) or _is_whole(image_id)):
        raise ValueError(f"image_id must be text or a whole number, got {image_id!r}")


def _of_arrays(record) -> Faces:
    boxes = _array(record, "gt_boxes", "iuf", np.float64)
    if boxes.size == 0:
        boxes = boxes.reshape(-1, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"gt_boxes must be of shape [n, 4], got {list(boxes.shape)}")
    ignore, classes = np.zeros(len(boxes), dtype=bool), np.zeros(len(boxes), dtype=np.int64)
    if record.get("gt_ignore") is not None:
        ignore = _array(record, "gt_ignore", "biu", bool)
        given = np.asarray(record["gt_ignore"])
        if given.dtype != bool and not np.isin(given, (0, 1)).all():
            raise ValueError("gt_ignore must be of True and False")
    if record.get("gt_classes") is not None:
        classes = _array(record, "gt_classes", "iu", np.int64)
        if (classes < 0).any():
            raise ValueError(f"gt_classes must not be negative, got {classes.min()}")
    for key, values in (("gt_ignore", ignore), ("gt_classes", classes)):
        if values.shape != (len(boxes),):
            raise ValueError(f"{key} must have one entry for each of {len(boxes)} boxes, got shape {values.shape}")
    return Faces(boxes, ignore, classes)


def _array(record, key, kinds, dtype) -> np.ndarray:
    """A field as an array of `dtype`; float32 stays what it is."""
    value = record[key]
    value = getattr(value, "tensor", value)  # Detectron2's Boxes
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # of lists of several lengths; of tensors on a GPU
        raise ValueError(f"{key} is no array: {' '.join(str(error).split())}") from error
    if array.size and array.dtype.kind not in kinds:
        raise ValueError(f"{key} must be of {'numbers' if 'f' in kinds else 'whole numbers'}, got {_kind(array)}")
    return array if array.dtype == np.float32 and dtype is np.float64 else array.astype(dtype)


def _kind(array):
    names = {"U": "text", "O": "objects", "b": "True and False", "f": "fractions"}
    return names.get(array.dtype.kind, str(array.dtype))


def _of_annotations(annotations) -> Faces:
    if isinstance(annotations, (str, bytes)) or not isinstance(annotations, Sequence):
        raise ValueError(f"annotations must be a list, got {type(annotations).__name__}")
    boxes, ignore, classes = [], [], []
    for i, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            raise ValueError(f"annotations[{i}] must be a dict, got {type(annotation).__name__}")
        boxes.append(_box(annotation, f"annotations[{i}]"))
        category, crowd = annotation.get("category_id"), annotation.get("iscrowd", 0)
        if not _is_whole(category) or not 0 <= category < 2**31:
            raise ValueError(f"annotations[{i}]: category_id must be a class from 0 on, got {category!r}")
        if not isinstance(crowd, (numbers.Real, np.bool_)) or crowd not in (0, 1):
            raise ValueError(f"annotations[{i}]: iscrowd must be 0 or 1, got {crowd!r}")
        classes.append(int(category))
        ignore.append(bool(crowd))
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Faces(boxes, np.array(ignore, dtype=bool), np.array(classes, dtype=np.int64))


def _box(annotation, where) -> np.ndarray:
    box = annotation.get("bbox")
    try:
        values = np.asarray(box)
    except (ValueError, TypeError):
        values = np.zeros(0)
    if values.shape != (4,) or values.dtype.kind not in "iuf":
        raise ValueError(f"{where}: bbox must be four numbers, got {str(box)[:60]!r}")
    if annotation.get("bbox_mode") not in _MODES or isinstance(annotation["bbox_mode"], bool):
        names = " or ".join(f"BoxMode.{mode.name}" for mode in _MODES)
        raise ValueError(f"{where}: bbox_mode must be {names}, got {annotation.get('bbox_mode')!r}")
    values = values.astype(np.float64)
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        values[2:] += values[:2]
    return values


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
