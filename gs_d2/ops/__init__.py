"""The three ops for CPU and CUDA. They need torch only: importing this does not import Detectron2 or initialise CUDA.

Shape shorthand: M ground-truth boxes, N anchors (or proposals), B images, G groups.

Boxes are ``(x1, y1, x2, y2)`` in absolute pixels, with ``x2 > x1`` and ``y2 > y1``. The area has no +1. A box has IoU 0
with every box if it is empty, inverted, NaN, infinite, or too large for a float32 area.

Results are equal bit by bit on every device and for any number of threads. The ops are not differentiable. They run in
float32 under autocast. Output shapes do not depend on values. The ops never synchronise with the host.

Errors:

- A wrong argument raises ``RuntimeError`` (an unknown `method` or `second_pass`, or a `seed` beyond int64:
  ``ValueError``). The message is "<op>: <argument> must ..., got ...".
- If memory runs out, the error is the same as in torch's own ops. On a GPU it is ``torch.OutOfMemoryError`` with
  "CUDA out of memory. ", on the CPU ``RuntimeError`` with "DefaultCPUAllocator: can't allocate memory". Code from
  ``torch.compile`` calls the ops directly; there the GPU's error is a ``RuntimeError`` with the same words.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from gs_d2 import _C  # noqa: F401  (registers torch.ops.gs_d2)
except ImportError as error:
    raise ImportError(
        f"gs_d2's extension is not built or does not load ({error}). "
        "Build it with: pip install --no-build-isolation -e . (in the gs_d2 folder, with torch installed)"
    ) from error

from gs_d2.ops import fake as _fake  # noqa: F401  (shapes for torch.compile, autograd and autocast)

__all__ = ["TwoPassMatch", "box_iou", "group_subsample", "two_pass_match"]

_SECOND_PASS = {"none": 0, "best": 1, "all": 2}
_METHOD = {"random": 0, "wrs": 1, "ohem": 2, "ohem_all": 3}


class TwoPassMatch(NamedTuple):
    """Result of :func:`two_pass_match`. Each field is [N], or [B, N] for a batch.

    Attributes:
        matched_idxs (int64): index of the ground truth with the highest IoU; the lowest index on ties; 0 if M = 0. In a
            batch, each image counts from its own first ground truth.
        match_labels (int8): 1 positive, 0 negative, -1 ignored.
        max_ious (float32): the highest IoU, in [0, 1].
    """

    matched_idxs: Tensor
    match_labels: Tensor
    max_ious: Tensor


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Computes the IoU of every pair of boxes.

    Args:
        boxes1 (Tensor[M, 4]), boxes2 (Tensor[N, 4]): floating point; the op computes in float32.

    Returns:
        float32 Tensor[M, N] in [0, 1]; it is empty if ``M = 0`` or ``N = 0``.

    Example:
        >>> box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 2, 1], [2.0, 0, 4, 2]]))
        tensor([[0.5000, 0.0000]])
    """
    return _call(torch.ops.gs_d2.box_iou.default, _float32(boxes1), _float32(boxes2))


def two_pass_match(
    gt_boxes: Tensor,
    anchors: Tensor,
    *,
    low: float = 0.4,
    high: float = 0.6,
    second_pass: str = "best",
    ignore_boxes: Tensor | None = None,
    ignore_thresh: float = 0.5,
    gt_offsets: Tensor | None = None,
    ignore_offsets: Tensor | None = None,
) -> TwoPassMatch:
    """Labels anchors by two-pass matching (paper, eq. 1 and section 4.1), without an M x N matrix.

    First pass: the label is 1 if an anchor's highest IoU is at least `high`, -1 if it is in [`low`, `high`), else 0.
    Second pass: a ground truth without a positive anchor gets one of the anchors labelled -1 whose best ground truth it
    is. The one with the highest IoU (lowest index on ties) becomes positive.

    Args:
        gt_boxes (Tensor[M, 4]): ground truth. With `gt_offsets`, the boxes of all images one after another.
        anchors (Tensor[N, 4]): shared by all images; or Tensor[B, N, 4], one set per image.
        low, high (float): thresholds, 0 < low <= high <= 1.
        second_pass: "best" as above; "all" makes every such anchor positive; "none" skips the second pass.
        ignore_boxes (Tensor[K, 4]): regions to ignore. An anchor with label 0 becomes -1 if at least the fraction
            `ignore_thresh` of its area, in (0, 1], lies in one of these boxes.
        gt_offsets (int64 Tensor[B + 1]): image b has gt_boxes[gt_offsets[b]:gt_offsets[b + 1]]; results are then
            [B, N]. The offsets must rise from 0 to M. On the CPU wrong offsets raise an error; on the GPU they are
            clamped, because a check would wait for the device.
        ignore_offsets (int64 Tensor[B + 1]): the same for `ignore_boxes`; required if `gt_offsets` and `ignore_boxes`
            are given.

    Example:
        >>> faces = torch.tensor([[0.0, 0, 10, 10]])
        >>> anchors = torch.tensor([[0.0, 0, 10, 9], [0.0, 0, 10, 5], [20.0, 0, 30, 10]])
        >>> two_pass_match(faces, anchors).match_labels
        tensor([ 1, -1,  0], dtype=torch.int8)
    """
    return TwoPassMatch(
        *_call(
            torch.ops.gs_d2.two_pass_match.default,
            _float32(gt_boxes),
            _float32(anchors),
            gt_offsets,
            _float32(ignore_boxes),
            ignore_offsets,
            low,
            high,
            _choice("two_pass_match: second_pass", second_pass, _SECOND_PASS),
            ignore_thresh,
        )
    )


def group_subsample(
    match_labels: Tensor,
    group_idxs: Tensor,
    *,
    num_groups: int,
    num_per_group: int,
    positive_fraction: float = 0.25,
    method: str = "random",
    losses: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_image: int = 0,
) -> Tensor:
    """Takes the same number of samples from every group (paper, section 4.2).

    Each group gives K+ = min(#positives, floor(num_per_group * positive_fraction)) positives and
    K- = min(#negatives, num_per_group - K+) negatives, without replacement. With "ohem_all" the labels compete: each
    group gives min(#positives + #negatives, num_per_group) samples of either label.

    Args:
        match_labels (int8 Tensor[N] or [B, N]): 1 positive, 0 negative; any other value is never sampled.
        group_idxs (int64 Tensor[N] or [B, N]): group of each anchor; a value outside [0, num_groups) is never sampled.
        num_groups (int): G, in [1, 1024].
        num_per_group (int): samples per group and image, in [0, 2^31).
        positive_fraction (float): largest fraction of positives, in [0, 1]; "ohem_all" does not use it.
        method: "random": uniform sampling. "wrs": weighted reservoir sampling, the K largest r^(1 / (l + 1e-6)) of
            eq. 3. "ohem": the K highest losses of each label, the lowest index on ties. "ohem_all": the num_per_group
            highest losses of both labels together (section 4.3), the lowest index on ties.
        losses (float Tensor, shape of match_labels): required by all methods except "random". Clamped to [0, 1e6]; NaN
            counts as 0.
        seed: int64, as an int or a 0-dim tensor on the inputs' device. None takes a seed from torch's default CPU
            generator. The random number of an anchor depends only on the seed, the image number and the index.
        first_image (int): image number of row 0. Image b of a batch gets the same samples as alone with
            ``first_image=b``.

    Returns:
        int8 Tensor of match_labels' shape: 1 or 0 where sampled, -1 elsewhere.

    Example:
        >>> labels = torch.tensor([1, 1, 0, 0, 0, 0, 1, 0], dtype=torch.int8)
        >>> groups = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
        >>> sampled = group_subsample(labels, groups, num_groups=2, num_per_group=4, seed=0)
        >>> [int((sampled[groups == group] >= 0).sum()) for group in (0, 1)]
        [4, 2]
    """
    if seed is None:
        seed = torch.empty((), dtype=torch.int64).random_()
        # A number goes along with the kernel's arguments; a tensor would be copied, and its value frozen in a graph of
        # torch.compile if it were a number there.
        seed = seed.to(match_labels.device) if torch.compiler.is_compiling() else int(seed)
    is_tensor = isinstance(seed, Tensor)
    if not is_tensor and not -(2**63) <= seed < 2**63:
        raise ValueError(f"group_subsample: seed must fit int64, got {seed}")
    return _call(
        torch.ops.gs_d2.group_subsample.default,
        match_labels,
        group_idxs,
        _float32(losses),
        seed if is_tensor else None,
        0 if is_tensor else seed,
        first_image,
        num_groups,
        num_per_group,
        positive_fraction,
        _choice("group_subsample: method", method, _METHOD),
    )


def __getattr__(name: str):
    if name == "reference":  # the tests' oracle: loaded only when somebody asks for it
        return import_module("gs_d2.ops.reference")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _call(op, *arguments):
    """Calls an op. The type of torch's error for lack of CUDA memory does not pass the stable ABI: here it is back."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        if "CUDA out of memory. " in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def _float32(value):
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _choice(name: str, value: str, choices: dict[str, int]) -> int:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return choices[value]
