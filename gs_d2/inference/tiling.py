"""Runs a detector in overlapping tiles if an image does not fit into the GPU's memory."""

import itertools
import logging
import math
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

_logger = logging.getLogger(__name__)

_MIN_SHRINKAGE = 0.9  # more tiles than these are given up when they are not smaller by this factor


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in pixels. It covers [start, stop) and owns the boxes with centres in [low, high)."""

    start: int
    stop: int
    low: float
    high: float


def split_axis(size: int, count: int, alignment: int, context: int) -> list[Span]:
    """Divides an axis evenly into at most `count` tiles.

    Args:
        size: length of the axis in pixels.
        count: number of tiles; there are fewer if the axis is too short.
        alignment: tiles start at multiples of this many pixels.
        context: pixels that a tile covers beyond its owned part, at each cut; a multiple of `alignment`.

    Returns:
        Spans in order. Their owned parts have no gaps and no overlaps. The outer spans also own everything beyond the
        image.
    """
    cuts = sorted({round(i * size / count / alignment) * alignment for i in range(1, count)} - {0})
    cuts = [cut for cut in cuts if cut < size]
    bounds = [0, *cuts, size]
    return [
        Span(
            max(0, low - context),
            min(size, high + context),
            low if low > 0 else -math.inf,
            high if high < size else math.inf,
        )
        for low, high in itertools.pairwise(bounds)
    ]


def plan_tiles(height: int, width: int, count: int, alignment: int, context: int) -> list[tuple[Span, Span]]:
    """Divides an image into at most `count` tiles (rows, columns) so that the largest tile has the fewest pixels."""
    plans = []
    for rows in range(1, count + 1):
        if count % rows == 0:
            y = split_axis(height, rows, alignment, context)
            x = split_axis(width, count // rows, alignment, context)
            plans.append([(a, b) for a in y for b in x])
    return min(plans, key=_largest)


def _largest(tiles: list[tuple[Span, Span]]) -> int:
    return max((y.stop - y.start) * (x.stop - x.start) for y, x in tiles)


class TiledPredictor:
    """Runs ``model.predict_candidates`` on images of any size, and returns results on the CPU.

    If an image needs too much GPU memory, it is cut into 2, 4, 8, ... tiles until they fit. Each tile covers `context`
    pixels beyond its owned part. A candidate counts only in the tile that owns its centre, so no face is found twice.

    The result equals that of the whole image if features depend only on pixels within `context`. GroupNorm depends on
    the whole image, so its result is close but not equal. Later images of a size that did not fit are cut at once.
    """

    def __init__(self, model, topk: int, margin: int = 256):
        """
        Args:
            model: in eval mode, with `predict_candidates` and `tile_geometry`, as :class:`gs_d2.modeling.BoxDetector`.
            topk: largest number of candidates of a tiled image. An image without tiles keeps the model's own number.
            margin: pixels that a tile covers beyond the largest anchor. Half the receptive field of a ResNet-50 is
                about 240 px.
        """
        self.model = model
        self.topk = topk
        self.margin = margin
        self._too_large = math.inf  # pixels, of one image or of a batch together
        self._warned = set()

    def __call__(self, images: list[Tensor], name: str) -> list[Instances]:
        """
        Args:
            images (list[Tensor[3, H, W]]): any sizes. They run as one batch if that fits.
            name: a name of the images, for the warning. Each name has one warning.

        Returns:
            The candidates of each image as in ``predict_candidates``, on the CPU.

        Raises:
            torch.OutOfMemoryError: even small tiles do not fit.
        """
        results = self._try(images)
        if results is not None:
            return results
        if len(images) > 1:
            return [self([image], name)[0] for image in images]
        return [self._in_tiles(images[0], name)]

    def _try(self, images: list[Tensor]) -> list[Instances] | None:
        """Returns the candidates, or None if the images do not fit into memory."""
        pixels = sum(image.shape[1] * image.shape[2] for image in images)
        if pixels >= self._too_large:
            return None
        try:
            return [x.to("cpu") for x in self.model.predict_candidates([{"image": image} for image in images])]
        except torch.OutOfMemoryError:
            self._too_large = pixels
        # Only here has the exception let go of the frames, and they of their tensors.
        torch.cuda.empty_cache()
        return None

    def _in_tiles(self, image: Tensor, name: str) -> Instances:
        height, width = image.shape[1:]
        alignment, reach = self.model.tile_geometry
        context = math.ceil((self.margin + reach) / alignment) * alignment
        count, largest = 1, height * width
        while True:
            count *= 2
            tiles = plan_tiles(height, width, count, alignment, context)
            if _largest(tiles) > _MIN_SHRINKAGE * largest:
                raise torch.OutOfMemoryError(
                    f"{name} ({width} x {height} px) does not fit into memory, not even in tiles of {largest} pixels. "
                    "Free GPU memory, or set MODEL.DEVICE cpu"
                )
            largest = _largest(tiles)
            parts = self._run_tiles(image, tiles) if largest < self._too_large else None
            if parts is not None:
                break
        if name not in self._warned:
            self._warned.add(name)
            _logger.warning(
                f"{name} ({width} x {height} px) does not fit into GPU memory; it runs in {len(tiles)} overlapping "
                "tiles, which takes longer. Others like it do so silently"
            )
        candidates = Instances.cat(parts)
        order = candidates.scores.sort(descending=True, stable=True).indices
        return candidates[order[: self.topk]]

    def _run_tiles(self, image: Tensor, tiles: list[tuple[Span, Span]]) -> list[Instances] | None:
        parts = []
        for y, x in tiles:
            found = self._try([image[:, y.start : y.stop, x.start : x.stop]])
            if found is None:
                return None
            fields = found[0].get_fields()
            boxes = fields.pop("pred_boxes").tensor + torch.tensor([x.start, y.start] * 2)
            part = Instances(tuple(image.shape[1:]), pred_boxes=Boxes(boxes), **fields)
            cx, cy = part.pred_boxes.get_centers().unbind(dim=1)
            parts.append(part[(cx >= x.low) & (cx < x.high) & (cy >= y.low) & (cy < y.high)])
        return parts
