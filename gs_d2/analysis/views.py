"""Annotated images as training sees them, and a config's anchors on them: boxes and sizes, no net and no pixels."""

import inspect
import os

import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_proposal_generator
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes
from PIL import Image
from torch import Tensor

from gs_d2.config import load_config
from gs_d2.data import FaceDatasetMapper
from gs_d2.data.catalog import load_records
from gs_d2.data.records import faces_of
from gs_d2.modeling import GroupSamplingRPN

ASSUMED_SIZE = (768, 1024)  # height, width in pixels
SIZE_RULE = "1024 x 768 px, or taller where boxes reach further down"


class ViewAnchors:
    """A config's augmentation, anchors and matching: all of a single-stage detector's real parts but the net."""

    def __init__(self, config_file, opts=()):
        """
        Args:
            config_file: path of a config.
            opts: config overrides, keys and values in turn.

        Raises:
            ValueError: the detector's anchors are not those of a GroupSamplingRPN.
        """
        self.cfg = cfg = load_config(config_file, [*opts, "INPUT.GS.COLOR_JITTER", 0.0])  # there are no pixels
        rpn = PROPOSAL_GENERATOR_REGISTRY.get(cfg.MODEL.PROPOSAL_GENERATOR.NAME)
        if not _has_proposal_generator(cfg.MODEL.META_ARCHITECTURE) or not issubclass(rpn, GroupSamplingRPN):
            raise ValueError(
                f"{config_file}: only detectors with a {GroupSamplingRPN.__name__} can be counted, not "
                f"{cfg.MODEL.META_ARCHITECTURE} with MODEL.PROPOSAL_GENERATOR.NAME {rpn.__name__}"
            )
        with torch.device("meta"):  # strides are all that is wanted of it: no memory, no weights
            backbone = build_backbone(cfg)
        self.shapes = backbone.output_shape()
        self.size_divisibility = max(backbone.size_divisibility, 1)
        self.rpn = build_proposal_generator(cfg, self.shapes)
        self.augment = FaceDatasetMapper(cfg, is_train=True).augment

    def map_sizes(self, image_size) -> list[tuple[int, int]]:
        """Height and width of each feature map for an image of that height and width, padded as in training."""
        step = self.size_divisibility
        padded = [-(-side // step) * step for side in image_size]
        strides = [self.shapes[name].stride for name in self.rpn.in_features]
        return [tuple(-(-side // stride) for side in padded) for stride in strides]

    def anchors(self, image_size) -> Tensor:
        """Anchors [R, 4] of an image of that height and width, XYXY."""
        maps = [torch.empty(1, 0, *size) for size in self.map_sizes(image_size)]
        return Boxes.cat(self.rpn.anchor_generator(maps)).tensor


def _has_proposal_generator(meta_architecture: str) -> bool:
    classes = META_ARCH_REGISTRY.get(meta_architecture).__mro__
    return any("proposal_generator" in inspect.signature(x.__init__).parameters for x in classes)


def annotated_records(dataset: str, num_images: int | None, seed: int) -> tuple[list[dict], list[int]]:
    """All records of a data set that can be trained on, and the indices of a random subset, in rising order.

    Args:
        num_images: in the subset; None, or more than there are: all.

    Raises:
        ValueError: the data set has no annotated faces.
    """
    records = load_records(dataset, for_training=True)
    if not any(len(faces_of(record).boxes) for record in records):
        raise ValueError(f"{dataset} has no annotated faces")
    idxs = range(len(records))
    if num_images is not None and num_images < len(records):
        idxs = sorted(np.random.default_rng(seed).choice(len(records), num_images, replace=False).tolist())
    return records, list(idxs)


def blank_image(record: dict) -> tuple[np.ndarray, bool]:
    """A record's image without its pixels, uint8 [H, W] of zeros, and whether its size was read from the file.

    Where there is no file, the size is assumed (SIZE_RULE).
    """
    size = file_size(record["file_name"])
    return np.zeros(size or assumed_size(faces_of(record).boxes), np.uint8), size is not None


def file_size(file_name) -> tuple[int, int] | None:
    """Height and width in pixels as read for training, from the file's header; None if there is no file."""
    if not os.path.isfile(file_name):
        return None
    with Image.open(file_name) as image:
        width, height = image.size
        lies = image.getexif().get(0x0112, 1) > 4  # the camera was held upright
    return (width, height) if lies else (height, width)


def assumed_size(boxes) -> tuple[int, int]:
    """Height and width of a file that is not there (SIZE_RULE), from its boxes [n, 4] in pixels."""
    height, width = ASSUMED_SIZE
    return max(height, int(np.ceil(boxes[:, 3].max(initial=0)))), width
