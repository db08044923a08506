"""Non-maximum suppression whose memory grows with the number of boxes kept, not of those looked at."""

import torch
from torch import Tensor
from torchvision.ops import nms

_CHUNK = 8192  # torchvision's CUDA kernel takes n^2 / 8 bytes: 8 MB of a chunk, where 400,000 boxes would take 20 GB


def top_nms(boxes: Tensor, scores: Tensor, iou_thresh: float, max_kept: int, classes: Tensor | None = None) -> Tensor:
    """The first `max_kept` boxes that ``torchvision.ops.nms`` would keep, by falling score.

    Boxes are taken in chunks of falling score. Whether a box stays depends only on kept boxes of higher score, so the
    result is the same, and boxes that score too low to matter are never looked at.

    Args:
        boxes (Tensor[N, 4]): XYXY.
        scores (Tensor[N]): without NaN, in any order.
        iou_thresh: a box is dropped if its IoU with a kept one is greater.
        max_kept: at least 0; of all classes together.
        classes (int64 Tensor[N]): from 0 on; boxes of different classes do not suppress each other. None is one class.

    Returns:
        int64 Tensor[K]: K <= max_kept indices; of equal scores the lower index comes first.
    """
    if classes is not None:
        boxes, scores = _apart(boxes, classes), scores.double()
    order = scores.sort(descending=True, stable=True).indices
    kept = order[:0]
    for chunk in order.split(_CHUNK):
        pool = torch.cat([kept, chunk])
        kept = pool[nms(boxes[pool], scores[pool], iou_thresh)][:max_kept]
        if len(kept) == max_kept:
            break
    return kept


def _apart(boxes: Tensor, classes: Tensor) -> Tensor:
    """Each class's boxes moved to a place of their own; in float64, where that does not change their overlaps."""
    boxes = boxes.double()
    if boxes.numel() == 0:
        return boxes
    return boxes + (classes * (boxes.max() - boxes.min() + 1))[:, None]


@torch.no_grad()
def prune_overlapping(
    match_labels: Tensor,
    group_idxs: Tensor,
    num_groups: int,
    boxes: Tensor,
    losses: Tensor,
    iou_thresh: float,
    max_kept: int,
    labels_compete: bool = False,
) -> Tensor:
    """OHEM's pruning: of overlapping boxes of one image, group and label, only that of highest loss can be drawn.

    Args:
        match_labels (int8 Tensor[B, R]): 1, 0, or -1 for what cannot be drawn anyway.
        group_idxs (int64 Tensor[R] or [B, R]): in [0, num_groups).
        boxes (Tensor[B, R, 4])
        losses (Tensor[B, R]): NaN is 0, as for the op that draws.
        iou_thresh: a box is dropped if its IoU with a kept one is greater.
        max_kept: of each image, group and label; no more can be drawn.
        labels_compete: True compares the boxes of both labels with each other; `max_kept` is then of each image and
            group.

    Returns:
        int8 Tensor[B, R]: `match_labels` where kept, -1 elsewhere.
    """
    pruned = torch.full_like(match_labels, -1)
    losses = torch.where(losses.isnan(), 0.0, losses)
    group_idxs = group_idxs.expand_as(match_labels)
    competitions = [match_labels >= 0] if labels_compete else [match_labels == 0, match_labels == 1]
    for b in range(len(match_labels)):
        for group in range(num_groups):
            for competing in competitions:
                rows = torch.nonzero(competing[b] & (group_idxs[b] == group))[:, 0]
                kept = rows[top_nms(boxes[b, rows], losses[b, rows], iou_thresh, max_kept)]
                pruned[b, kept] = match_labels[b, kept]
    return pruned
