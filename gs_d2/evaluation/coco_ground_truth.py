"""The annotations of a data set as pycocotools takes them, whether from a file of COCO's or from dataset dicts."""

import contextlib
import io

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO

from gs_d2.data.catalog import load_records
from gs_d2.data.coco import has_coco_file, set_classes
from gs_d2.data.records import check_record
from gs_d2.formats.coco import CocoAnnotations, read_coco


def coco_ground_truth(dataset_name: str) -> COCO:
    """The images, categories and, where they are public, annotations of a registered data set, checked.

    Regions to ignore of dataset dicts are crowds, and the area of a box is w * h.

    Raises:
        FileNotFoundError, ValueError: the file of the metadata's `json_file`, or the data set where there is none,
            cannot be used (:func:`gs_d2.formats.coco.read_coco`, :func:`gs_d2.data.catalog.load_records`); or the data
            set has images that the file has not.
    """
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is None:
        content = _of_records(dataset_name)
    else:
        content = read_coco(json_file)
        if has_coco_file(dataset_name):
            set_classes(dataset_name, content)
        else:
            _check_images(dataset_name, json_file, content)
    ground_truth = COCO()
    ground_truth.dataset = {"info": {}, "images": content.images, "categories": content.categories}
    if content.annotations is not None:
        ground_truth.dataset["annotations"] = content.annotations
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth.createIndex()
    return ground_truth


def _check_images(dataset_name, json_file, content):
    known = {image["id"] for image in content.images}
    for record in load_records(dataset_name, for_training=False):
        if record["image_id"] not in known:
            raise ValueError(
                f"{dataset_name}: image_id {record['image_id']!r} ({record.get('file_name')}) is of no image of "
                f"{json_file}, the json_file of its metadata"
            )


def _of_records(dataset_name) -> CocoAnnotations:
    metadata = MetadataCatalog.get(dataset_name)
    category_of = {new: old for old, new in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
    images, annotations, num_classes, is_annotated = [], [], 1, False
    for record in load_records(dataset_name, for_training=False):
        images.append({"id": record["image_id"]})
        faces = check_record(record, for_training=False)
        if faces is None:
            continue
        is_annotated = True
        for (x1, y1, x2, y2), ignore, index in zip(*(values.tolist() for values in faces), strict=True):
            num_classes = max(num_classes, index + 1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": category_of.get(index, index),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": max(x2 - x1, 0) * max(y2 - y1, 0),
                    "iscrowd": int(ignore),
                }
            )
    names = metadata.get("thing_classes") or [f"class {i}" for i in range(num_classes)]
    categories = [{"id": category_of.get(i, i), "name": name} for i, name in enumerate(names)]
    return CocoAnnotations(images, annotations if is_annotated else None, categories)
