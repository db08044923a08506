"""What torch needs to know of the ops besides their kernels: result shapes, autograd and autocast."""

import torch
from torch.library import Library, fallthrough_kernel, register_autocast, register_fake

_OPS = ("box_iou", "two_pass_match", "group_subsample")


@register_fake("gs_d2::box_iou")
def _(boxes1, boxes2):
    _check_boxes("box_iou", "boxes1", boxes1)
    _check_boxes("box_iou", "boxes2", boxes2)
    return boxes1.new_empty(boxes1.shape[0], boxes2.shape[0])


@register_fake("gs_d2::two_pass_match")
def _(gt_boxes, anchors, gt_offsets, ignore_boxes, ignore_offsets, low, high, second_pass, ignore_thresh):
    _check_boxes("two_pass_match", "gt_boxes", gt_boxes)
    torch._check(
        anchors.dim() in (2, 3) and anchors.shape[-1] == 4,
        lambda: (
            f"two_pass_match: anchors must have shape (N, 4), or (B, N, 4) with gt_offsets, got {tuple(anchors.shape)}"
        ),
    )
    _check_dtype("two_pass_match", "anchors", anchors, torch.float32)
    shape = anchors.shape[-2:-1] if gt_offsets is None else (gt_offsets.shape[0] - 1, anchors.shape[-2])
    return (
        anchors.new_empty(shape, dtype=torch.int64),
        anchors.new_empty(shape, dtype=torch.int8),
        anchors.new_empty(shape),
    )


@register_fake("gs_d2::group_subsample")
def _(
    match_labels,
    group_idxs,
    losses,
    seed_tensor,
    seed,
    first_image,
    num_groups,
    num_per_group,
    fraction,
    method,
):
    _check_dtype("group_subsample", "match_labels", match_labels, torch.int8)
    _check_dtype("group_subsample", "group_idxs", group_idxs, torch.int64)
    torch._check(
        match_labels.dim() in (1, 2),
        lambda: f"group_subsample: match_labels must have shape (N,) or (B, N), got {tuple(match_labels.shape)}",
    )
    return torch.empty_like(match_labels, memory_format=torch.contiguous_format)


def _check_boxes(op, name, boxes):
    torch._check(
        boxes.dim() == 2 and boxes.shape[1] == 4,
        lambda: f"{op}: {name} must have shape (M, 4), got {tuple(boxes.shape)}",
    )
    _check_dtype(op, name, boxes, torch.float32)


def _check_dtype(op, name, tensor, dtype):
    need = str(dtype).removeprefix("torch.")
    torch._check(tensor.dtype == dtype, lambda: f"{op}: {name} must be {need}, got {tensor.dtype}")


_library = Library("gs_d2", "IMPL")
for _op in _OPS:
    # Labels and draws have no gradient: inputs that require one pass through, results never do.
    _library.impl(_op, fallthrough_kernel, "Autograd")
    for _device in ("cpu", "cuda"):
        register_autocast(f"gs_d2::{_op}", _device, torch.float32)
