"""From the predictions of an image to its boxes, by arithmetic that tracing and torch.export record."""

import math
from collections.abc import Callable

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


def best_boxes(
    anchors: Tensor,
    logits: Tensor,
    deltas: Tensor,
    image_size: tuple,
    *,
    box2box_transform: Box2BoxTransform,
    topk: int,
    score_thresh: float,
    min_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`top_boxes` of anchors.

    Args:
        anchors (Tensor[R, 4]): XYXY.
        logits (Tensor[R, 2]): background and face; the score is their difference.
        deltas (Tensor[R, 4]): as `box2box_transform` takes them.
        image_size, topk, score_thresh, min_size: as :func:`top_boxes`.

    Returns:
        As :func:`top_boxes`; rows are those of the anchors.
    """
    return top_boxes(
        logits[:, 1] - logits[:, 0],
        lambda rows: box2box_transform.apply_deltas(deltas[rows], anchors[rows]),
        image_size,
        topk=topk,
        score_thresh=score_thresh,
        min_size=min_size,
    )


def top_boxes(
    scores: Tensor,
    decode: Callable[[Tensor], Tensor],
    image_size: tuple,
    *,
    topk: int,
    score_thresh: float,
    min_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes of one image: top-k by score, decode, clip, drop small and improbable ones.

    Args:
        scores (Tensor[R]): logits of the face probabilities; where one is not finite, the box is dropped.
        decode: of rows (int64 Tensor[n]) their boxes (Tensor[n, 4], XYXY); what is no finite box is dropped.
        image_size: (height, width) in pixels, numbers or what tracing has in their place; boxes are clipped to it.
        topk: boxes considered, those of the highest scores.
        score_thresh: face probability below which a box is dropped.
        min_size: boxes with a side not above this many pixels are dropped.

    Returns:
        boxes (Tensor[n, 4]), the logits of their probabilities (Tensor[n], falling) and their rows
        (int64 Tensor[n]); n is 0 where nothing is left. Of equal logits the lower row comes first, also where `topk`
        cuts, so that equal predictions give the same boxes on every device and in exported graphs.
    """
    # What a diverged model predicts is dropped here; in training its loss stops the run.
    scores = scores.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    # Of equal scores topk takes any, and others on another device: it only says how low to go. (A stable sort of all
    # takes four times as long.)
    best = scores.topk(_at_most(scores.shape[0], topk), sorted=False).values
    lowest = torch.cat((best, best.new_full((1,), math.inf))).amin(dim=0)  # of none: infinity
    rows = torch.nonzero(scores >= lowest)[:, 0]
    scores, order = scores[rows].sort(descending=True, stable=True)
    scores, rows = scores[:topk], rows[order[:topk]]
    boxes = decode(rows)
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
    boxes = torch.where(finite[:, None], boxes, torch.zeros_like(boxes))
    height, width = image_size
    x, y = boxes[:, 0::2].clamp(min=0, max=width), boxes[:, 1::2].clamp(min=0, max=height)
    boxes = torch.stack((x, y), dim=2).flatten(1)
    large = (boxes[:, 2:] - boxes[:, :2] > min_size).all(dim=1)
    keep = torch.nonzero(finite & large & (scores >= logit(score_thresh)))[:, 0]
    return boxes[keep], scores[keep], rows[keep]


def _at_most(count, limit: int):
    """The lesser of a number and a size, which in tracing is a tensor and in torch.export a symbol."""
    return count.clamp(max=limit) if isinstance(count, Tensor) else torch.sym_min(count, limit)


def logit(probability: float) -> float:
    """What the sigmoid makes a probability of; infinite at 0 and 1, and beyond them."""
    if not 0 < probability < 1:
        return math.inf if probability >= 1 else -math.inf
    return math.log(probability) - math.log1p(-probability)
