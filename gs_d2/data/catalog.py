"""Registered data sets, as all parts of this project load them: checked, whoever registered them."""

import traceback
from collections import Counter

from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data.coco import has_coco_file, load_coco
from gs_d2.data.records import check_image_id, check_record


def load_records(dataset_name: str, *, for_training: bool) -> list[dict]:
    """The dataset dicts of a registered data set, as its function gives them; COCO's files are read by
    :func:`gs_d2.data.coco.load_coco`, whose dicts have what Detectron2's have but for masks and keypoints.

    Args:
        for_training: they must have boxes. Otherwise they must have an `image_id` each, a number or text, no two the
            same; boxes, where there are any, are checked too.

    Raises:
        FileNotFoundError, ValueError: the data set cannot be read, has no image, or a dict cannot be used; names the
            data set and the image.
    """
    if dataset_name not in DatasetCatalog.list():
        raise ValueError(f"the data set {dataset_name!r} is not registered")
    records = load_coco(dataset_name) if has_coco_file(dataset_name) else _call(dataset_name)
    if not isinstance(records, (list, tuple)):
        raise ValueError(f"{dataset_name}: its function must give a list of dicts, got {type(records).__name__}")
    if not records:
        raise ValueError(f"{dataset_name}: it has no image")
    names = class_names(dataset_name)
    for i, record in enumerate(records):
        try:
            faces = check_record(record, for_training)
            if not for_training:
                check_image_id(record.get("image_id"))
            if names and faces is not None and len(faces.classes) and faces.classes.max() >= len(names):
                raise ValueError(
                    f"it has class {faces.classes.max()}, and thing_classes of the data set's metadata names "
                    f"{len(names)} (classes count from 0)"
                )
        except ValueError as error:
            raise ValueError(f"{dataset_name}, {_which(record, i)}: {error}") from error
    if not for_training:
        _check_unique(dataset_name, records)
    return list(records)


def _call(dataset_name):
    try:
        return DatasetCatalog.get(dataset_name)
    except (AssertionError, AttributeError, LookupError, TypeError) as error:  # files that the function did not expect
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{dataset_name}: its function failed in line {last.lineno} of {last.filename}: "
            f"{type(error).__name__}: {error}"
        ) from error


def class_names(dataset_name: str) -> list[str] | None:
    """`thing_classes` of its metadata; None where they are not known, before it is loaded or at all."""
    names = MetadataCatalog.get(dataset_name).get("thing_classes")
    return None if names is None else list(names)


def _which(record, index) -> str:
    name = record.get("file_name") if isinstance(record, dict) else None
    return f"dict {index}" + (f" ({name})" if isinstance(name, str) else "")


def _check_unique(dataset_name, records):
    # As text, since they become names of files.
    ((first, count),) = Counter(str(record["image_id"]) for record in records).most_common(1)
    if count > 1:
        same = [str(record.get("file_name")) for record in records if str(record["image_id"]) == first]
        raise ValueError(
            f"{dataset_name}: image_id {first!r} is that of {count} images, {same[0]} and {same[1]}: each needs its own"
        )
