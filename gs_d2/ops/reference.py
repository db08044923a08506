"""Slow, readable torch versions of the three ops: what the kernels are tested against, bit for bit.

They build the M x N matrix and sort, on one image; arguments and results are those of :mod:`gs_d2.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LN2 = float.fromhex("0x1.62e430p-1")
_LOG1P = [  # log1p(f) = f + f^2 p(f), highest power first
    float.fromhex(c)
    for c in (
        "0x1.6614fcp-4",
        "-0x1.251634p-3",
        "0x1.31806cp-3",
        "-0x1.535ad4p-3",
        "0x1.98d2eap-3",
        "-0x1.0004a6p-2",
        "0x1.5556f4p-2",
        "-0x1.fffffap-2",
    )
]
_MASK = 0xFFFFFFFF


def canonical_boxes(boxes: Tensor) -> Tensor:
    """Boxes [M, 4] as float32, those that can match nothing replaced by the empty box at the origin."""
    boxes = boxes.float()
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = w * h
    valid = (w > 0) & (h > 0) & (area > 0) & (area <= torch.finfo(torch.float32).max)
    return torch.where(valid[:, None], boxes, torch.zeros_like(boxes))


def _intersection_and_areas(boxes1: Tensor, boxes2: Tensor):
    a, b = canonical_boxes(boxes1)[:, None], canonical_boxes(boxes2)[None]
    inter_wh = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inter_wh = inter_wh.clamp(min=0)
    area1 = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area2 = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    return inter_wh[..., 0] * inter_wh[..., 1], area1, area2


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    inter, area1, area2 = _intersection_and_areas(boxes1, boxes2)
    union = (area1 + area2) - inter
    return torch.where(union > 0, inter / union, torch.zeros_like(inter))


def two_pass_match(
    gt_boxes: Tensor,
    anchors: Tensor,
    *,
    low: float = 0.4,
    high: float = 0.6,
    second_pass: str = "best",
    ignore_boxes: Tensor | None = None,
    ignore_thresh: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    num_gts, num_anchors = len(gt_boxes), len(anchors)
    matched_idxs = torch.zeros(num_anchors, dtype=torch.int64, device=anchors.device)
    max_ious = torch.zeros(num_anchors, device=anchors.device)
    if num_gts > 0 and num_anchors > 0:
        ious = box_iou(gt_boxes, anchors)
        max_ious = ious.max(dim=0).values
        matched_idxs = (ious == max_ious).int().argmax(dim=0)  # argmax of 0/1 takes the first

    low, high = torch.tensor([low, high], dtype=torch.float32)
    labels = torch.zeros(num_anchors, dtype=torch.int8, device=anchors.device)
    labels[max_ious >= low] = -1
    labels[max_ious >= high] = 1
    first_pass = labels.clone()

    for j in range(num_gts) if second_pass != "none" else ():
        mine = matched_idxs == j
        if ((first_pass == 1) & mine).any():
            continue
        candidates = torch.nonzero((first_pass == -1) & mine)[:, 0]
        if second_pass == "best" and len(candidates) > 0:
            best = max_ious[candidates].max()
            candidates = candidates[max_ious[candidates] == best][:1]
        labels[candidates] = 1

    if ignore_boxes is not None and len(ignore_boxes) > 0 and num_anchors > 0:
        inter, anchor_area, _ = _intersection_and_areas(anchors, ignore_boxes)
        thresh = torch.tensor(ignore_thresh, dtype=torch.float32)
        swallowed = ((inter > 0) & (inter >= thresh * anchor_area)).any(dim=1)
        labels[swallowed & (labels == 0)] = -1
    return matched_idxs, labels, max_ious


def philox4x32_10(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 on four int64 tensors that hold 32-bit words; returns four such tensors."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # int64 wraps; all 64 bits are right
        x0, x1, x2, x3 = (
            ((product1 >> 32) & _MASK) ^ x1 ^ key0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ x3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return [x0, x1, x2, x3]


def draw_bits(seed: int, image_idx: int, num_anchors: int) -> Tensor:
    """32 random bits for each anchor of an image, as int64 [N]: word i % 4 of the counter (i // 4, image, 0, 0)."""
    quad = torch.arange((num_anchors + 3) // 4)
    zero = torch.zeros_like(quad)
    words = philox4x32_10([quad, zero + image_idx, zero, zero], (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=1).flatten()[:num_anchors]


def neg_log_uniform(bits: Tensor) -> Tensor:
    """-log((2 bits + 1) / 2^33) in float32, by the arithmetic of csrc/math/reservoir.h."""
    odd = 2 * bits + 1
    exponent = torch.tensor([int(v).bit_length() - 1 for v in odd.tolist()], dtype=torch.int64)
    fraction = (odd - (1 << exponent)) << (32 - exponent)  # f * 2^32
    fold = fraction >= 0x6A000000
    f = torch.where(fold, ((1 << 32) - fraction).float() * -(2.0**-33), fraction.float() * 2.0**-32)
    p = torch.full_like(f, _LOG1P[0])
    for coefficient in _LOG1P[1:]:
        p = p * f + coefficient
    log1p = f + (f * f) * p
    return (33 - exponent - fold.long()).float() * _LN2 - log1p


def sort_keys(method: str, bits: Tensor, losses: Tensor | None) -> Tensor:
    """The order of sampling within a (group, label): smallest first; int64 [N]."""
    if method == "random":
        return _MASK - bits
    losses = torch.nan_to_num(losses.float(), nan=0.0).clamp(0, 1e6) + 0.0  # + 0.0: -0 becomes 0
    if method == "wrs":
        return (neg_log_uniform(bits) / (losses + torch.tensor(1e-6))).view(torch.int32).long()
    return _MASK - losses.view(torch.int32).long()


def group_subsample(
    match_labels: Tensor,
    group_idxs: Tensor,
    *,
    num_groups: int,
    num_per_group: int,
    positive_fraction: float = 0.25,
    method: str = "random",
    losses: Tensor | None = None,
    seed: int = 0,
    first_image: int = 0,
) -> Tensor:
    keys = sort_keys(method, draw_bits(seed, first_image, len(match_labels)), losses)
    sampled = torch.full_like(match_labels, -1)
    for group in range(num_groups):
        positive, negative = ((match_labels == label) & (group_idxs == group) for label in (1, 0))
        if method == "ohem_all":
            competitions = [(positive | negative, num_per_group)]
        else:
            competitions = [(positive, int(num_per_group * positive_fraction)), (negative, num_per_group)]
        num_sampled = 0
        for competing, wanted in competitions:
            members = torch.nonzero(competing)[:, 0]
            chosen = members[torch.sort(keys[members], stable=True).indices[: max(wanted - num_sampled, 0)]]
            sampled[chosen] = match_labels[chosen]
            num_sampled += len(chosen)
    return sampled
