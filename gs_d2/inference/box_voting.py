"""Box voting: a kept box moves to the score-weighted mean of the candidates that overlap it."""

import torch
from torch import Tensor

from gs_d2 import ops

_MAX_PAIRS = 1 << 22  # IoUs in memory at a time: 16 MB


def vote_boxes(boxes: Tensor, candidates: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """Moves each box to the score-weighted mean of the candidates that overlap it.

    Args:
        boxes (Tensor[K, 4]): the boxes that NMS kept, XYXY.
        candidates (Tensor[N, 4]): the input of NMS, which contains `boxes`.
        scores (Tensor[N]): scores of the candidates, not negative.
        iou_thresh: a candidate counts for a box if their IoU is at least this threshold.

    Returns:
        float32 Tensor[K, 4]. A box with score 0 or without area does not move.
    """
    voted = []
    for part in boxes.split(max(1, _MAX_PAIRS // max(1, len(candidates)))):
        weights = (ops.box_iou(part, candidates) >= iou_thresh) * scores
        total = weights.sum(dim=1, keepdim=True)
        mean = weights @ candidates / total.clamp(min=torch.finfo(total.dtype).tiny)
        voted.append(torch.where(total > 0, mean, part))
    return torch.cat(voted)
