"""Box voting: a kept box moves to the score-weighted mean of the candidates that overlap it."""

import torch
from torch import Tensor

from gs_d2 import ops

_MAX_PAIRS = 1 << 22  # IoUs in memory at a time: 16 MB


def vote_boxes(boxes: Tensor, candidates: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """
    Args:
        boxes (Tensor[K, 4]): kept by NMS, XYXY.
        candidates (Tensor[N, 4]): all boxes that NMS chose from; `boxes` are among them.
        scores (Tensor[N]): of the candidates, positive.
        iou_thresh: the candidates whose IoU with a box is at least this vote on it. A box of score 0, or without area,
            stays where it is.

    Returns:
        float32 Tensor[K, 4]
    """
    voted = []
    for part in boxes.split(max(1, _MAX_PAIRS // max(1, len(candidates)))):
        weights = (ops.box_iou(part, candidates) >= iou_thresh) * scores
        total = weights.sum(dim=1, keepdim=True)
        mean = weights @ candidates / total.clamp(min=torch.finfo(total.dtype).tiny)
        voted.append(torch.where(total > 0, mean, part))
    return torch.cat(voted)
