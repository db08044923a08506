"""Two-pass matching of anchors to ground truth (paper, section 4.1)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from torch import Tensor

from gs_d2 import ops


class Matches(NamedTuple):
    """Which ground truth the boxes of a batch are matched to.

    Attributes:
        labels (int8 Tensor[B, R]): 1 positive, 0 negative, -1 ignored.
        gt_idxs (int64 Tensor[B, R]): row of the matched ground truth in `gt_boxes`; any valid row where the label is
            not 1.
        gt_boxes (Tensor[M, 4]): XYXY; of all images.
    """

    labels: Tensor
    gt_idxs: Tensor
    gt_boxes: Tensor


class TwoPassMatcher:
    """Labels anchors by two-pass matching; call it as Detectron2's ``Matcher``, or better, on boxes with :meth:`match`.

    Args:
        thresholds (list[float]): [low, high], 0 < low <= high <= 1; the paper's [0.4, 0.6] in the RPN and [0.5, 0.6]
            in Fast R-CNN.
        labels (list[int]): what the three ranges are called; only [0, -1, 1] is two-pass matching.
        second_pass: "best", "all" or "none"; see :func:`gs_d2.ops.two_pass_match`.
        ignore_thresh (float): see :func:`gs_d2.ops.two_pass_match`.
        min_ignore_size (float): regions to ignore are enlarged to this size, in pixels, before matching
            (:func:`enlarge_regions`): the scale of the smallest anchor, which nothing smaller could ever fill. 0 leaves
            them as they are.
    """

    def __init__(
        self, thresholds, labels=(0, -1, 1), *, second_pass="best", ignore_thresh=0.5, min_ignore_size: float = 0.0
    ):
        if len(thresholds) != 2 or not 0 < thresholds[0] <= thresholds[1] <= 1:
            raise ValueError(f"thresholds must be [low, high] with 0 < low <= high <= 1, got {list(thresholds)}")
        if list(labels) != [0, -1, 1]:
            raise ValueError(f"labels must be [0, -1, 1], got {list(labels)}")
        if second_pass not in ("best", "all", "none"):
            raise ValueError(f"second_pass must be best, all or none, got {second_pass!r}")
        self.low, self.high = (float(threshold) for threshold in thresholds)
        self.second_pass = second_pass
        if min_ignore_size < 0:
            raise ValueError(f"min_ignore_size must be at least 0, got {min_ignore_size}")
        self.ignore_thresh = ignore_thresh
        self.min_ignore_size = float(min_ignore_size)

    def match(
        self, gt_boxes: Tensor, anchors: Tensor, *, ignore_boxes: Tensor | None = None, **offsets
    ) -> ops.TwoPassMatch:
        """:func:`gs_d2.ops.two_pass_match` with this matcher's settings; no M x N matrix is made."""
        if ignore_boxes is not None:
            ignore_boxes = enlarge_regions(ignore_boxes, self.min_ignore_size)
        return ops.two_pass_match(
            gt_boxes,
            anchors,
            low=self.low,
            high=self.high,
            second_pass=self.second_pass,
            ignore_boxes=ignore_boxes,
            ignore_thresh=self.ignore_thresh,
            **offsets,
        )

    @torch.no_grad()
    def match_images(
        self,
        anchors: Tensor,
        gt_boxes: list[Boxes],
        ignore_boxes: list[Boxes] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
    ) -> Matches:
        """Matches a batch in one call.

        Args:
            anchors (Tensor[R, 4] or [B, R, 4]): shared by all images, or of each.
            gt_boxes, ignore_boxes: boxes of each image; any number, none included.
            image_sizes: (height, width) of each image before padding. A label-0 anchor whose centre is not in
                [0, width) x [0, height) becomes -1. None: no anchor is on padding.

        Returns:
            Matches; a last row of zeros in its `gt_boxes` makes every index valid even without any ground truth.
        """
        all_gts, gt_offsets = _concatenate(gt_boxes, anchors)
        ignores = {}
        if ignore_boxes is not None:
            ignores["ignore_boxes"], ignores["ignore_offsets"] = _concatenate(ignore_boxes, anchors)
        matched_idxs, match_labels, _ = self.match(all_gts, anchors, gt_offsets=gt_offsets, **ignores)
        if image_sizes is not None:
            match_labels.masked_fill_((match_labels == 0) & _centre_outside(anchors, image_sizes), -1)
        return Matches(match_labels, matched_idxs + gt_offsets[:-1, None], F.pad(all_gts, (0, 0, 0, 1)))

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Matches on a given matrix, as Detectron2's ``Matcher`` does.

        Args:
            match_quality_matrix (Tensor[M, N]): IoU of each ground truth (row) with each anchor (column), in [0, 1].

        Returns:
            matches (int64 Tensor[N]), match_labels (int8 Tensor[N]): as :func:`gs_d2.ops.two_pass_match`; all zeros
            where M = 0.
        """
        num_gts, num_anchors = match_quality_matrix.shape
        matches = match_quality_matrix.new_zeros(num_anchors, dtype=torch.int64)
        match_labels = match_quality_matrix.new_zeros(num_anchors, dtype=torch.int8)
        if match_quality_matrix.numel() == 0:
            return matches, match_labels
        ious, matches = match_quality_matrix.max(dim=0)
        # max() may name any row of a tie; the first is wanted.
        matches = (match_quality_matrix == ious).to(torch.int8).argmax(dim=0)
        positive, ignored = ious >= self.high, (ious >= self.low) & (ious < self.high)
        match_labels[ignored] = -1
        match_labels[positive] = 1
        if self.second_pass == "none":
            return matches, match_labels

        taken = ious.new_zeros(num_gts, dtype=torch.bool).index_fill_(0, matches[positive], True)
        candidates = ignored & ~taken[matches]
        if self.second_pass == "best":
            offers = torch.where(candidates, ious, ious.new_tensor(-1.0))
            best = ious.new_full((num_gts,), -1.0).scatter_reduce_(0, matches, offers, "amax")
            candidates &= ious == best[matches]
            idxs = torch.arange(num_anchors, device=ious.device)
            first = idxs.new_full((num_gts,), num_anchors)
            first.scatter_reduce_(0, matches, torch.where(candidates, idxs, num_anchors), "amin")
            candidates &= idxs == first[matches]
        match_labels[candidates] = 1
        return matches, match_labels


def enlarge_regions(boxes: Tensor, size: float) -> Tensor:
    """Regions to ignore, enlarged about their centres so that the nearest anchors of scale `size` lie in them by half.

    A side shorter than `size` gets that length; beside a side of at least twice `size` it gets three quarters of it,
    because a strip as wide as `size` would also be half of an anchor of twice the scale. So, at the default
    IGNORE_THRESH of 0.5, a region is half of each square anchor of that scale whose centre is within a quarter of
    `size` of its own in x and y (the nearest one is, up to a stride of half of `size`), and enlarging alone makes it
    half of no anchor of twice the scale or more.

    Args:
        boxes (Tensor[K, 4]): XYXY, in pixels. One without area, or with NaN, stays as it is: it matches nothing.
        size (float): in pixels, at least 0.

    Returns:
        Tensor[K, 4]
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    least = torch.where(sides.amax(dim=1, keepdim=True) < 2 * size, size, 0.75 * size)
    grown = (least - sides).clamp(min=0) / 2
    enlarged = torch.cat([boxes[:, :2] - grown, boxes[:, 2:] + grown], dim=1)
    return torch.where((sides > 0).all(dim=1, keepdim=True), enlarged, boxes)


def _concatenate(boxes: list[Boxes], like: Tensor) -> tuple[Tensor, Tensor]:
    """All boxes [M, 4] one after another, and where each image's begin: int64 [B + 1]."""
    offsets = torch.tensor([0] + [len(x) for x in boxes]).cumsum(0)
    return torch.cat([x.tensor for x in boxes]), _without_waiting(offsets, like.device)


def _centre_outside(anchors: Tensor, image_sizes: list[tuple[int, int]]) -> Tensor:
    """Which of anchors [R, 4] or [B, R, 4] have their centre outside of an image of that (height, width): [B, R]."""
    widths_heights = torch.tensor([(width, height) for height, width in image_sizes], dtype=anchors.dtype)
    widths_heights = _without_waiting(widths_heights, anchors.device)[:, None]
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    return ((centres < 0) | (centres >= widths_heights)).any(dim=-1)


def _without_waiting(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host, copied to a device that the host does not wait for."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
