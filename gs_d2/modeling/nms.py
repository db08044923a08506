"""Non-maximum suppression that looks at no more boxes than it takes, and whose memory grows with those kept."""

from collections.abc import Iterator

import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import nms

from gs_d2 import ops
from gs_d2.sampling import first_of_each_group

# Boxes compared with each other at a time. torchvision's CUDA kernel takes n^2 / 8 bytes, 8 MB of these, where 400,000
# boxes would take 20 GB; its CPU kernel takes many times as long for a pair as our IoU, which compares chunks.
_CHUNK = {"cuda": 8192, "cpu": 512}


def top_nms(boxes: Tensor, scores: Tensor, iou_thresh: float, max_kept: int, classes: Tensor | None = None) -> Tensor:
    """The first `max_kept` boxes that ``torchvision.ops.nms`` would keep, by falling score.

    Boxes are taken in chunks of falling score. Whether a box stays depends only on kept boxes of higher score, so the
    result is the same (on a GPU up to rounding of an IoU that equals `iou_thresh`), and boxes that score too low to
    matter are never looked at.

    Args:
        boxes (float32 Tensor[N, 4]): XYXY.
        scores (Tensor[N]): without NaN, in any order.
        iou_thresh: a box is dropped if its IoU with a kept one is greater.
        max_kept: at least 0; of all classes together.
        classes (int64 Tensor[N]): from 0 on; boxes of different classes do not suppress each other. None is one class.

    Returns:
        int64 Tensor[K]: K <= max_kept indices; of equal scores the lower index comes first.
    """
    kept = scores.new_zeros(0, dtype=torch.int64)
    for kept in _kept_by_chunks(boxes, scores, iou_thresh, classes):
        if len(kept) >= max_kept:
            break
    return kept[:max_kept]


def top_nms_of_groups(
    boxes: Tensor,
    scores: Tensor,
    iou_thresh: float,
    max_kept: int,
    group_idxs: Tensor,
    num_groups: int,
    max_per_group: int,
) -> Tensor:
    """Of the boxes that ``torchvision.ops.nms`` would keep the first `max_per_group` of each group, by falling score.

    Boxes of different groups suppress each other. As :func:`top_nms` it stops when it has what is asked for; a group
    that has fewer boxes than asked for makes it look at all.

    Args:
        boxes, scores, iou_thresh: as :func:`top_nms`.
        max_kept: of all groups together, those of the highest scores.
        group_idxs (int64 Tensor[N]): in [0, num_groups).

    Returns:
        int64 Tensor[K]: K <= min(max_kept, num_groups * max_per_group) indices; of equal scores the lower comes first.
    """
    kept = group_idxs[:0]
    for kept in _kept_by_chunks(boxes, scores, iou_thresh):
        counts = torch.bincount(group_idxs[kept], minlength=num_groups).clamp(max=max_per_group)
        if counts.sum() >= min(max_kept, num_groups * max_per_group):
            break
    return kept[first_of_each_group(group_idxs[kept], num_groups, max_per_group)][:max_kept]


def select_detections(candidates: Instances, num_classes: int, iou_thresh: float, max_kept: int) -> Instances:
    """Of an image's candidates those that NMS within each class keeps, the best `max_kept`.

    Args:
        candidates: with `pred_boxes`, `scores` (probabilities) and `pred_classes`, in [0, num_classes), in any order,
            and any other fields. They are ranked by their `logits`, where they have such a field: the probability of
            every logit above 17 is exactly 1.

    Returns:
        Instances: the detections by falling score, without `logits`. Of equal scores the higher logit comes first, of
        equal logits the first candidate.
    """
    classes = candidates.pred_classes if num_classes > 1 else None
    ranks = candidates.logits if candidates.has("logits") else candidates.scores
    detections = candidates[top_nms(candidates.pred_boxes.tensor, ranks, iou_thresh, max_kept, classes)]
    if detections.has("logits"):
        detections.remove("logits")
    # Scores of close logits may fall otherwise, by the rounding of the sigmoid.
    return detections[detections.scores.sort(descending=True, stable=True).indices]


def _kept_by_chunks(
    boxes: Tensor, scores: Tensor, iou_thresh: float, classes: Tensor | None = None
) -> Iterator[Tensor]:
    """What NMS keeps, by falling score: of the first chunk of boxes, of the first two, and so on."""
    if classes is not None:
        boxes, scores = _apart(boxes, classes), scores.double()
    order = scores.sort(descending=True, stable=True).indices
    kept = order[:0]
    for chunk in order.split(_CHUNK[boxes.device.type]):
        if classes is None:
            overlaps = ops.two_pass_match(boxes[kept], boxes[chunk], second_pass="none").max_ious
            # In float64, as torchvision compares them: float32 has another 0.7.
            chunk = chunk[overlaps.double() <= iou_thresh]
            kept = torch.cat([kept, chunk[nms(boxes[chunk], scores[chunk], iou_thresh)]])
        else:
            pool = torch.cat([kept, chunk])
            kept = pool[nms(boxes[pool], scores[pool], iou_thresh)]
        yield kept


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
    """OHEM's pruning: of overlapping boxes of one image, group and label, only that of highest loss can be sampled.

    Args:
        match_labels (int8 Tensor[B, R]): 1, 0, or -1 for what cannot be sampled anyway.
        group_idxs (int64 Tensor[R] or [B, R]): in [0, num_groups).
        boxes (Tensor[B, R, 4])
        losses (Tensor[B, R]): NaN is 0, as for the op that samples.
        iou_thresh: a box is dropped if its IoU with a kept one is greater.
        max_kept: of each image, group and label; no more can be sampled.
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
