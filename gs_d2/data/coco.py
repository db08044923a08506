"""COCO for the detectors here: Detectron2's registered data sets, with crowds as regions to ignore."""

import logging
import os

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T

from gs_d2.data.augmentation import ShortSideCrop
from gs_d2.data.dataset_mapper import FaceDatasetMapper
from gs_d2.data.records import Record
from gs_d2.formats.coco import CocoAnnotations, read_coco

_logger = logging.getLogger(__name__)


class CocoDatasetMapper(FaceDatasetMapper):
    """:class:`FaceDatasetMapper` for COCO's dataset dicts (Detectron2's standard ones): all classes, crowds ignored.

    Training images are resized to a short side of INPUT.MIN_SIZE_TRAIN and cropped to INPUT.GS.MAX_CROP_SIZE, or with
    MAX_CROP_SIZE 0 resized as Detectron2 does.
    """

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        resize = T.ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        )
        if cfg.INPUT.GS.MAX_CROP_SIZE > 0:
            resize = ShortSideCrop(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.GS.MAX_CROP_SIZE)
        return super().from_config(cfg, is_train, resize)


def dataset_mapper_of(dataset_name: str) -> type[FaceDatasetMapper]:
    """The mapper class for a registered data set: :class:`CocoDatasetMapper` where its evaluator_type is "coco"."""
    is_coco = MetadataCatalog.get(dataset_name).get("evaluator_type") == "coco"
    return CocoDatasetMapper if is_coco else FaceDatasetMapper


def has_coco_file(dataset_name: str) -> bool:
    """Whether it is Detectron2's own reading of COCO's format that a data set is registered with."""
    return getattr(DatasetCatalog[dataset_name], "__module__", None) == "detectron2.data.datasets.coco"


def load_coco(dataset_name: str) -> list[dict]:
    """Dataset dicts of a data set that :func:`has_coco_file`, in place of Detectron2's, by a checked file.

    Sets `thing_classes` and `thing_dataset_id_to_contiguous_id` of its metadata, as Detectron2 does: the file's
    categories by their ids.

    Returns:
        For each image, by its id, a :class:`gs_d2.data.records.Record` with `file_name`, `image_id`, `height`, `width`,
        `gt_boxes` (float64 [n, 4], XYXY pixels), `gt_classes` (int64 [n], from 0 on) and `gt_ignore` (bool [n]:
        crowds); without boxes where the file has no annotations.

    Raises:
        FileNotFoundError, ValueError: as :func:`gs_d2.formats.coco.read_coco`; or the metadata has other classes.
    """
    metadata = MetadataCatalog.get(dataset_name)
    content = read_coco(metadata.json_file)
    if content.notes:
        _logger.info(f"{metadata.json_file}: {'; '.join(content.notes)}")
    class_of = set_classes(dataset_name, content)
    of_images = content.of_images()
    records = []
    for image in sorted(content.images, key=lambda image: image["id"]):
        annotations = of_images[image["id"]]
        boxes = np.array([x["bbox"] for x in annotations], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        record = Record(
            file_name=os.path.join(metadata.image_root, image["file_name"]),
            height=image["height"],
            width=image["width"],
            image_id=image["id"],
            gt_boxes=boxes,
            gt_ignore=np.array([x["iscrowd"] for x in annotations], dtype=bool),
            gt_classes=np.array([class_of[x["category_id"]] for x in annotations], dtype=np.int64),
        )
        if content.annotations is None:
            record = {key: record[key] for key in ("file_name", "height", "width", "image_id")}
        records.append(record)
    return records


def set_classes(dataset_name: str, content: CocoAnnotations) -> dict[int, int]:
    """Category id -> class, from 0 on; writes it and the classes' names into the metadata.

    Raises:
        ValueError: the metadata has other ones.
    """
    metadata = MetadataCatalog.get(dataset_name)
    categories = sorted(content.categories, key=lambda category: category["id"])
    class_of = {category["id"]: i for i, category in enumerate(categories)}
    names = [category["name"] for category in categories]
    for key, value in (("thing_classes", names), ("thing_dataset_id_to_contiguous_id", class_of)):
        before = metadata.get(key, value)
        if (list(before) if isinstance(value, list) else before) != value:
            raise ValueError(
                f"{metadata.json_file}: its categories are {_short(value)}, and {dataset_name} is registered with "
                f"{key} {_short(before)}: leave {key} out, or correct the file"
            )
        if metadata.get(key) is None:
            metadata.set(**{key: value})
    return class_of


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
