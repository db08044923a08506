"""From a dataset dict to what the detectors take: augmented image, faces, and regions to ignore."""

import copy
import time

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image

from gs_d2.data.augmentation import FaceCrop, ScaleJitterCrop
from gs_d2.data.records import faces_of
from gs_d2.formats.images import TransientReadError, as_rgb

_WAITS = (0.2, 1.0, 4.0)  # seconds, before a drive that does not answer is asked again
_LEAST_SHOWN = 0.25  # of a box's area; one around a face and its centre in the image shows at least this


class BadDataError(ValueError):
    """An image, or its annotation, cannot be used; names the file."""


def _read_patiently(path) -> Image.Image:
    """:func:`as_rgb`, tried again where the drive does not answer."""
    for seconds in _WAITS:
        try:
            return as_rgb(path)
        except TransientReadError:
            time.sleep(seconds)
    return as_rgb(path)


class FaceDatasetMapper:
    """Reads and augments one image of a data set; its dicts are what :func:`gs_d2.data.records.faces_of` reads.

    Regions where no anchor may be a negative sample: boxes flagged invalid, and faces smaller than `min_face_size`
    after augmentation. Left out are boxes without area, and those that cannot belong to the image
    (:func:`off_the_image`).
    """

    @configurable
    def __init__(self, *, is_train: bool, augmentations, image_format: str, min_face_size: float = 8.0):
        """
        Args:
            is_train: whether boxes are wanted.
            augmentations (list of Augmentation): applied in order. In training they can ask for `image`, `boxes`
                (the dict's, [n, 4]) and `is_face` (bool [n]: neither flagged nor left out) by these names.
            image_format: as :func:`detectron2.data.detection_utils.read_image`.
            min_face_size: sqrt(w * h) in pixels.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.min_face_size = float(min_face_size)

    @classmethod
    def from_config(cls, cfg, is_train: bool = True, resize: T.Augmentation | None = None):
        """`resize` takes the place of the paper's resizing and cropping of WIDER FACE in training."""
        if is_train:
            gs = cfg.INPUT.GS
            resize = resize or ScaleJitterCrop(gs.SCALES, gs.MAX_CROP_SIZE)
            if gs.FACE_CROP_PROB != 0:
                resize = FaceCrop(
                    resize, gs.FACE_CROP_PROB, gs.FACE_CROP_SCALES, gs.FACE_CROP_SIZE, gs.FACE_CROP_MAX_UPSCALE
                )
            augmentations = [resize]
            if cfg.INPUT.RANDOM_FLIP != "none":
                augmentations.append(
                    T.RandomFlip(
                        horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                        vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
                    )
                )
            augmentations += _color_jitter(gs.COLOR_JITTER)
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
            in training also instances (gt_boxes, gt_classes: the input's, or all 0) and ignore_boxes (Boxes), in pixels
            of `image`.

        Raises:
            FileNotFoundError: there is no such image.
            TransientReadError: the drive did not answer, also after a few seconds.
            BadDataError: the image cannot be read (see :func:`gs_d2.formats.images.as_rgb`), has not the `height` and
                `width` that the dict gives, or the boxes have NaN or infinity; names the file. No random number
                has been used by then. :func:`gs_d2.data.loaders.TrainingViews` takes another image in its place.
        """
        result = {key: copy.copy(dataset_dict[key]) for key in ("file_name", "image_id") if key in dataset_dict}
        image = self._read(dataset_dict)
        result["height"], result["width"] = image.shape[:2]
        if not self.is_train:
            test_input = T.AugInput(image)
            self.augmentations(test_input)
            image = test_input.image
        else:
            faces = faces_of(dataset_dict)
            if not np.isfinite(faces.boxes).all():
                raise BadDataError(f"{dataset_dict['file_name']}: its annotated boxes have NaN or infinity")
            image, boxes, train, ignore = self._augment(image, faces)
            instances = Instances(image.shape[:2])
            instances.gt_boxes = Boxes(torch.from_numpy(boxes[train]))
            instances.gt_classes = torch.from_numpy(faces.classes[train])
            result["instances"] = instances
            result["ignore_boxes"] = Boxes(torch.from_numpy(boxes[ignore]))
        # Not np.ascontiguousarray, which leaves the negative stride of a flipped side of one pixel; torch refuses it.
        result["image"] = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return result

    def _read(self, dataset_dict) -> np.ndarray:
        try:
            image = utils.convert_PIL_to_numpy(_read_patiently(dataset_dict["file_name"]), self.image_format)
            utils.check_image_size(dict(dataset_dict), image)
        except ValueError as error:
            raise BadDataError(str(error)) from error
        return image

    def augment(self, image: np.ndarray, dataset_dict: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One training view: the augmented image, boxes to train on and boxes to ignore, float32 [n, 4] in its pixels.

        Whoever wants only the boxes passes a blank image of the file's size: [H, W, 3], or [H, W] where no augmentation
        is of colours (INPUT.GS.COLOR_JITTER 0).
        """
        image, boxes, train, ignore = self._augment(image, faces_of(dataset_dict))
        return image, boxes[train], boxes[ignore]

    def _augment(self, image, faces):
        """The view; the boxes, float32 [n, 4], transformed and clipped to it; which of them to train on and which to
        ignore, bool [n]."""
        boxes, ignore = faces.boxes, faces.ignore
        usable = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & ~off_the_image(boxes, *image.shape[:2])
        view = T.AugInput(image, boxes=boxes)
        view.is_face = usable & ~ignore
        self.augmentations(view)
        boxes = view.boxes
        height, width = view.image.shape[:2]
        limits = np.array([width, height, width, height])
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres >= 0) & (centres < limits[:2])).all(axis=1)
        boxes = np.clip(boxes, 0, limits).astype(np.float32)
        size = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
        visible = usable & (size > 0).all(axis=1)
        ignore = ignore | (np.sqrt(size.prod(axis=1)) < self.min_face_size)
        # A face whose centre the crop cuts off is dropped; a region to ignore counts wherever it is still seen.
        return view.image, boxes, ~ignore & inside & visible, ignore & visible


def _color_jitter(strength: float) -> list[T.Augmentation]:
    if not 0 <= strength <= 1:
        raise ValueError(f"INPUT.GS.COLOR_JITTER must be in [0, 1], got {strength}")
    kinds = (T.RandomBrightness, T.RandomContrast, T.RandomSaturation) if strength else ()
    return [kind(1 - strength, 1 + strength) for kind in kinds]


def off_the_image(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which boxes [n, 4] (XYXY) cannot be of an image of this size, bool [n]: less than a quarter of their area is in
    it, as when they lie beyond the image or are far larger. Boxes without area are none of them.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    shown = np.clip(boxes, 0, [width, height, width, height])
    area, shown_area = (np.maximum(b[:, 2:] - b[:, :2], 0).prod(axis=1) for b in (boxes, shown))
    return shown_area < _LEAST_SHOWN * area
