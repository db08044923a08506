"""Multi-scale testing: an image pyramid whose levels are merged by one NMS (paper, section 5, "WIDER FACE").

One level is in memory at a time, or a batch of small views of up to 2 megapixels. The candidates of all levels stay on
the CPU, 36 bytes each. Levels run one by one, because one large level fills a GPU: with factors 0.25 n, n = 1..8, the
two largest levels have 55 % of the pixels. Small views are batched, because launching kernels costs more than running
them. A batch has views of one factor with equal padded shapes, mirrored or of several images.

Images are padded to the backbone's own stride only. More padding would let shapes repeat, but it would change the
features along the border, and so the results. WIDER FACE images are all 1,024 px wide, so few shapes occur anyway. In
other projects, cuDNN's search for the fastest algorithm for every new shape made memory grow; it is off here.
"""

import contextlib
import ctypes
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.transforms import ResizeTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gs_d2.config import check_pyramid
from gs_d2.inference.box_voting import vote_boxes
from gs_d2.inference.tiling import TiledPredictor

_MAX_BATCH_PIXELS = 2 << 20
_MODEL_MEMBERS = ("predict_candidates", "select_detections", "size_divisibility", "tile_geometry")


@dataclass(frozen=True)
class Level:
    """One size at which an image is tested."""

    factor: float
    height: int
    width: int
    is_smallest: bool
    is_largest: bool


@dataclass(frozen=True)
class View:
    """One forward pass of one image."""

    image: int
    level: Level
    flip: bool


def pyramid_levels(height: int, width: int, scales: list[float], max_size: int) -> list[Level]:
    """Computes the levels of an image, smallest factor first.

    Args:
        height, width: size of the image in pixels.
        scales: factors. A factor that makes a side longer than `max_size` is left out.
        max_size: pixels. If all factors are left out, there is one level with this longer side.
    """
    sizes = []
    for scale in sorted(scales):
        size = tuple(max(1, round(side * scale)) for side in (height, width))
        if max(size) <= max_size:
            sizes.append((scale, *size))
    if not sizes:
        scale = max_size / max(height, width)
        sizes.append((scale, *(max(1, round(side * scale)) for side in (height, width))))
    return [Level(*size, size is sizes[0], size is sizes[-1]) for size in sizes]


class PyramidDetector(nn.Module):
    """Tests a detector on an image pyramid. Inputs and outputs are those of the detector at test.

    ``PyramidDetector(cfg, model)`` reads TEST.GS.*. With the single factor 1.0, the result equals the model's own, bit
    by bit.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        scales: list[float],
        max_size: int = 3000,
        flip: bool = False,
        topk_per_level: int = 50000,
        voting_thresh: float | None = None,
        level_box_size: list[float] | None = None,
        tile_margin: int = 256,
    ):
        """
        Args:
            model: a detector with the four members of :class:`gs_d2.modeling.BoxDetector`; it is not copied.
            scales: factors of the input image; positive and different.
            max_size: see :func:`pyramid_levels`.
            flip: True also tests every level mirrored.
            topk_per_level: largest number of candidates of a level that runs in tiles. Other levels keep the model's
                own number.
            voting_thresh: a candidate votes for a detection's box if their IoU is at least this. None: no box voting.
            level_box_size: [low, high]. A level keeps candidates with sqrt(w * h) in this range, in pixels of the
                level. The largest level has no lower limit, the smallest no upper limit. None keeps all.
            tile_margin: see :class:`TiledPredictor`.

        Raises:
            ValueError: a value is out of range, or the model lacks one of the four members.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel):
            model = model.module
        missing = [name for name in _MODEL_MEMBERS if not hasattr(type(model), name)]
        if missing:
            raise ValueError(f"{type(model).__name__} cannot be tested on a pyramid: it has no {', '.join(missing)}")
        if not scales or not all(0 < scale < math.inf for scale in scales) or len(set(scales)) < len(scales):
            raise ValueError(f"TEST.GS.SCALES must be different positive factors, at least one, got {list(scales)}")
        if max_size < 1:
            raise ValueError(f"TEST.GS.MAX_SIZE must be at least 1 pixel, got {max_size}")
        if level_box_size is not None and not (len(level_box_size) == 2 and 0 <= level_box_size[0] < level_box_size[1]):
            raise ValueError(f"TEST.GS.LEVEL_BOX_SIZE must be [] or [low, high] in pixels, got {list(level_box_size)}")
        if voting_thresh is not None and getattr(model, "num_classes", 1) > 1:
            raise ValueError("TEST.GS.BOX_VOTING knows no classes, and the model tells several apart: set it False")
        self.model = model
        self.scales = [float(scale) for scale in scales]
        self.max_size = max_size
        self.flip = flip
        self.voting_thresh = voting_thresh
        self.level_box_size = level_box_size
        self._predict = TiledPredictor(model, topk_per_level, tile_margin)
        self.training = model.training  # so that whoever restores the mode after evaluation restores the model's

    @classmethod
    def from_config(cls, cfg, model):
        check_pyramid(cfg)
        gs = cfg.TEST.GS
        detector = model.module if isinstance(model, DistributedDataParallel) else model
        return {
            "model": model,
            "scales": list(gs.SCALES),
            "max_size": gs.MAX_SIZE,
            "flip": gs.FLIP,
            "topk_per_level": getattr(detector, "max_candidates", cfg.MODEL.RPN.PRE_NMS_TOPK_TEST),
            "voting_thresh": detector.nms_thresh if gs.BOX_VOTING else None,
            "level_box_size": list(gs.LEVEL_BOX_SIZE) or None,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """
        Args:
            batched_inputs: one dict per image, with `image` (Tensor[3, H, W], 0..255; the factors apply to this size)
                and optionally `height` and `width`, the size that results are scaled to.

        Returns:
            One dict per image: {"instances": Instances}, with the model's fields, on the model's device.
            `anchor_scales` is in pixels of the level that found the face. If the model's `by_scale` is True, there is
            also "instances_by_scale": the outputs of all levels for each anchor scale, with a separate NMS per scale.
        """
        if self.training:
            raise RuntimeError("PyramidDetector only tests: call eval() first")
        found: list[list[Instances]] = [[] for _ in batched_inputs]
        with _no_cudnn_benchmark():
            for views in self._batches([x["image"] for x in batched_inputs]):
                images = [_render(batched_inputs[view.image]["image"], view) for view in views]
                name = f"Level {views[0].level.factor:g} of the pyramid"
                for view, candidates in zip(views, self._predict(images, name), strict=True):
                    image = batched_inputs[view.image]
                    size = image.get("height", image["image"].shape[1]), image.get("width", image["image"].shape[2])
                    found[view.image].append(self._map_back(candidates, view, size))
                if self.model.device.type == "cpu":
                    _return_freed_memory()
        return [self._result(Instances.cat(levels)) for levels in found]

    def _batches(self, images: list[Tensor]) -> Iterator[list[View]]:
        """Yields views that can run together: small views of one factor with equal padded shapes, the largest first.

        With the largest first, smaller levels reuse its freed memory. Otherwise memory would grow at every level.
        """
        views = [
            View(i, level, flip)
            for i, image in enumerate(images)
            for level in reversed(pyramid_levels(*image.shape[1:], self.scales, self.max_size))
            for flip in ((False, True) if self.flip else (False,))
        ]
        multiple = self.model.size_divisibility

        def shape(view: View):
            return view.level.factor, *(-(-side // multiple) for side in (view.level.height, view.level.width))

        for (_, rows, columns), group in itertools.groupby(sorted(views, key=shape, reverse=True), key=shape):
            group = list(group)
            length = max(1, _MAX_BATCH_PIXELS // (rows * columns * multiple**2))
            for start in range(0, len(group), length):
                yield group[start : start + length]

    def _map_back(self, candidates: Instances, view: View, size: tuple[int, int]) -> Instances:
        """Maps boxes from the view to the result. Drops boxes outside of TEST.GS.LEVEL_BOX_SIZE."""
        level = view.level
        if self.level_box_size is not None:
            low, high = self.level_box_size
            scale = candidates.pred_boxes.area().sqrt()
            keep = torch.ones_like(scale, dtype=torch.bool)
            if not level.is_largest:
                keep &= scale >= low
            if not level.is_smallest:
                keep &= scale <= high
            candidates = candidates[keep]
        fields = candidates.get_fields()
        boxes = fields.pop("pred_boxes").tensor
        if view.flip:
            boxes = torch.stack([level.width - boxes[:, 2], boxes[:, 1], level.width - boxes[:, 0], boxes[:, 3]], dim=1)
        boxes = Boxes(boxes.clone())
        boxes.scale(size[1] / level.width, size[0] / level.height)
        return Instances(size, pred_boxes=boxes, **fields)

    def _result(self, candidates: Instances) -> dict[str, Instances]:
        result = {"instances": self._merge(candidates)}
        if getattr(self.model, "by_scale", False):
            scales = self.model.split_by_scale(candidates)
            result["instances_by_scale"] = Instances.cat([self._merge(x) for x in scales])
        return result

    def _merge(self, candidates: Instances) -> Instances:
        detections = self.model.select_detections(candidates.to(self.model.device))
        if self.voting_thresh is not None:
            voted = vote_boxes(
                detections.pred_boxes.tensor.cpu(),
                candidates.pred_boxes.tensor,
                candidates.scores,
                self.voting_thresh,
            )
            detections.pred_boxes = Boxes(voted.to(self.model.device))
        # Not before NMS, as no detector clips there that does not clip its candidates.
        detections.pred_boxes.clip(detections.image_size)
        return detections[detections.pred_boxes.nonempty()]


@contextlib.contextmanager
def _no_cudnn_benchmark():
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


def _return_freed_memory():
    """Returns freed memory to the system. glibc keeps it for later allocations, but images of other sizes fit badly.

    Eight levels of four 800 px images peak 30 MB above one level. Without this they peak 450 MB above.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library may not have it
        if trim is not None:
            trim(0)


def _render(image: Tensor, view: View) -> Tensor:
    """Returns the view's pixels, resized as in the training augmentation, or the image itself if nothing changes."""
    level = view.level
    if tuple(image.shape[1:]) != (level.height, level.width):
        pixels = image.permute(1, 2, 0).cpu().numpy()
        resize = ResizeTransform(*pixels.shape[:2], level.height, level.width)
        resized = np.ascontiguousarray(resize.apply_image(np.ascontiguousarray(pixels)).transpose(2, 0, 1))
        image = torch.from_numpy(resized)
    return image.flip(2) if view.flip else image
