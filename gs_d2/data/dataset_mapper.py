"""From a dataset dict to what the detectors take: augmented image, faces, and regions to ignore."""

import copy

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from gs_d2.data.augmentation import ScaleJitterCrop
from gs_d2.formats.images import as_rgb

_LEAST_SHOWN = 0.25  # of a box's area; one around a face and its centre in the image shows at least this


class BadDataError(ValueError):
    """An image, or its annotation, cannot be used; names the file."""


class FaceDatasetMapper:
    """Reads and augments one image of a face data set (see :func:`gs_d2.data.load_wider_face` for its dicts).

    Regions where no anchor may be a negative sample: boxes flagged invalid, and faces smaller than `min_face_size`
    after augmentation. Left out are boxes without area, and those that cannot belong to the image
    (:func:`off_the_image`).
    """

    @configurable
    def __init__(self, *, is_train: bool, augmentations, image_format: str, min_face_size: float = 8.0):
        """
        Args:
            is_train: whether boxes are wanted.
            augmentations (list of Augmentation): applied in order.
            image_format: as :func:`detectron2.data.detection_utils.read_image`.
            min_face_size: sqrt(w * h) in pixels.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.min_face_size = float(min_face_size)

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        if is_train:
            augmentations = [ScaleJitterCrop(cfg.INPUT.GS.SCALES, cfg.INPUT.GS.MAX_CROP_SIZE)]
            if cfg.INPUT.RANDOM_FLIP != "none":
                augmentations.append(
                    T.RandomFlip(
                        horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                        vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
                    )
                )
        else:
            augmentations = [T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
        return {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "min_face_size": cfg.INPUT.GS.MIN_FACE_SIZE,
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Returns:
            dict: the input's file_name and image_id, with height and width of the file; image (uint8 Tensor[3, H, W]);
            in training also instances (gt_boxes, gt_classes all 0) and ignore_boxes (Boxes), in pixels of `image`.

        Raises:
            FileNotFoundError: there is no such image.
            BadDataError: the image cannot be read (see :func:`gs_d2.formats.images.as_rgb`), has not the `height` and
                `width` that the dict gives, or the boxes have NaN or infinity; names the file. Nothing random has been
                drawn by then. :func:`gs_d2.data.build_train_loader` takes another image in its place.
        """
        result = {key: copy.copy(dataset_dict[key]) for key in ("file_name", "image_id") if key in dataset_dict}
        image = self._read(dataset_dict)
        result["height"], result["width"] = image.shape[:2]
        if not self.is_train:
            image = self._augment(image)[0]
        else:
            image, faces, ignored = self.augment(image, dataset_dict)
            instances = Instances(image.shape[:2])
            instances.gt_boxes = Boxes(torch.from_numpy(faces))
            instances.gt_classes = torch.zeros(len(faces), dtype=torch.int64)
            result["instances"] = instances
            result["ignore_boxes"] = Boxes(torch.from_numpy(ignored))
        # Not np.ascontiguousarray, which leaves the negative stride of a flipped side of one pixel; torch refuses it.
        result["image"] = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return result

    def _read(self, dataset_dict) -> np.ndarray:
        try:
            image = utils.convert_PIL_to_numpy(as_rgb(dataset_dict["file_name"]), self.image_format)
            utils.check_image_size(dict(dataset_dict), image)
        except ValueError as error:
            raise BadDataError(str(error)) from error
        if self.is_train and not np.isfinite(dataset_dict["gt_boxes"]).all():
            raise BadDataError(f"{dataset_dict['file_name']}: its annotated boxes have NaN or infinity")
        return image

    def augment(self, image: np.ndarray, dataset_dict: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One training view: the augmented image, boxes to train on and boxes to ignore, float32 [n, 4] in its pixels.

        Whoever wants only the boxes passes a blank image [H, W] of the file's size.
        """
        file_size = image.shape[:2]
        image, transforms = self._augment(image)
        return image, *self._split_boxes(dataset_dict, transforms, file_size, image.shape[:2])

    def _augment(self, image):
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        return aug_input.image, transforms

    def _split_boxes(self, dataset_dict, transforms, file_size, image_size):
        """Boxes to train on and boxes to ignore, float32 [n, 4], transformed and clipped to the image."""
        boxes = dataset_dict["gt_boxes"]
        ignore = dataset_dict["gt_ignore"]
        usable = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & ~off_the_image(boxes, *file_size)
        boxes, ignore = transforms.apply_box(boxes[usable]), ignore[usable]
        height, width = image_size
        limits = np.array([width, height, width, height])
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres >= 0) & (centres < limits[:2])).all(axis=1)
        boxes = np.clip(boxes, 0, limits).astype(np.float32)
        size = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
        visible = (size > 0).all(axis=1)
        ignore = ignore | (np.sqrt(size.prod(axis=1)) < self.min_face_size)
        # A face whose centre the crop cuts off is dropped; a region to ignore counts wherever it is still seen.
        return boxes[~ignore & inside & visible], boxes[ignore & visible]


def off_the_image(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which boxes [n, 4] (XYXY) cannot be of an image of this size, bool [n]: less than a quarter of their area is in
    it, as when they lie beyond the image or are far larger. Boxes without area are none of them.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    shown = np.clip(boxes, 0, [width, height, width, height])
    area, shown_area = (np.maximum(b[:, 2:] - b[:, :2], 0).prod(axis=1) for b in (boxes, shown))
    return shown_area < _LEAST_SHOWN * area
