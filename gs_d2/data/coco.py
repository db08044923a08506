"""COCO for the detectors here: Detectron2's registered data sets, with crowds as regions to ignore."""

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from gs_d2.data.augmentation import ShortSideCrop
from gs_d2.data.dataset_mapper import FaceDatasetMapper


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

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: file_name and, for training, annotations with `bbox`, `bbox_mode`, `category_id` (from 0 on)
                and optionally `iscrowd`.

        Returns:
            As :meth:`FaceDatasetMapper.__call__`, with the annotations' classes.
        """
        if self.is_train:
            dataset_dict = {**dataset_dict, **_as_arrays(dataset_dict["annotations"])}
        return super().__call__(dataset_dict)


def dataset_mapper_of(dataset_name: str) -> type[FaceDatasetMapper]:
    """The mapper class for a registered data set: :class:`CocoDatasetMapper` where its evaluator_type is "coco"."""
    is_coco = MetadataCatalog.get(dataset_name).get("evaluator_type") == "coco"
    return CocoDatasetMapper if is_coco else FaceDatasetMapper


def _as_arrays(annotations: list[dict]) -> dict:
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
    return {
        "gt_boxes": np.array(boxes, dtype=np.float64).reshape(-1, 4),
        "gt_ignore": np.array([x.get("iscrowd", 0) for x in annotations], dtype=bool),
        "gt_classes": np.array([x["category_id"] for x in annotations], dtype=np.int64),
    }
