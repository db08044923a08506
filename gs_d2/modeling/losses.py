"""The arithmetic of eq. 2 and 5: losses of single boxes, and the weights that make a sum of per-group means of them.

Shape shorthand: P boxes, R boxes that are sampled from, G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_IOU = 1e-6  # -ln IoU of boxes that do not touch: finite, and without gradient


def paired_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Differentiable IoU of box i of one set with box i of the other; Tensor[P, 4] twice -> float32 Tensor[P].

    Identical boxes give exactly 1, boxes that do not touch or are both empty 0.
    """
    boxes1, boxes2 = boxes1.float(), boxes2.float()
    inter_wh = torch.minimum(boxes1[:, 2:], boxes2[:, 2:]) - torch.maximum(boxes1[:, :2], boxes2[:, :2])
    inter = inter_wh.clamp(min=0).prod(dim=1)
    area1 = (boxes1[:, 2:] - boxes1[:, :2]).prod(dim=1)
    area2 = (boxes2[:, 2:] - boxes2[:, :2]).prod(dim=1)
    union = area1 + area2 - inter
    return inter / union.clamp(min=torch.finfo(torch.float32).tiny)


def least_square_iou_loss(pred_boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """(1 - IoU)^2 of eq. 5, Tensor[P]; unlike -ln IoU its gradient is exactly 0 where IoU = 1."""
    return (1 - paired_iou(pred_boxes, gt_boxes)) ** 2


def iou_loss(pred_boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """-ln IoU (UnitBox), Tensor[P]; at most -ln 1e-6."""
    return -torch.log(paired_iou(pred_boxes, gt_boxes).clamp(min=_MIN_IOU))


_BOX_LOSSES = {"least_square_iou": least_square_iou_loss, "iou": iou_loss}
BOX_REG_LOSS_TYPES = ("smooth_l1", *_BOX_LOSSES)


def box_regression_loss(
    pred_deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    box2box_transform,
    *,
    loss_type: str,
    smooth_l1_beta: float,
) -> Tensor:
    """Regression loss of each box, in float32 even under autocast.

    Args:
        pred_deltas, anchors, gt_boxes (Tensor[P, 4]): prediction for each anchor and the box it is to become, which
            must have positive width and height.
        box2box_transform (Box2BoxTransform): eq. 13; its decoding clamps log sizes.
        loss_type: "smooth_l1" on the deltas, "iou" or "least_square_iou" on the decoded box.
        smooth_l1_beta (float): 0 is plain L1.

    Returns:
        float32 Tensor[P]; smooth-L1 is summed over the four deltas.
    """
    pred_deltas = pred_deltas.float()
    if loss_type == "smooth_l1":
        gt_deltas = _get_deltas(anchors, gt_boxes, box2box_transform.weights)
        if smooth_l1_beta < 1e-5:
            return F.l1_loss(pred_deltas, gt_deltas, reduction="none").sum(dim=1)
        return F.smooth_l1_loss(pred_deltas, gt_deltas, reduction="none", beta=smooth_l1_beta).sum(dim=1)
    if loss_type not in _BOX_LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(BOX_REG_LOSS_TYPES)}, got {loss_type!r}")
    return _BOX_LOSSES[loss_type](box2box_transform.apply_deltas(pred_deltas, anchors), gt_boxes)


def _get_deltas(boxes: Tensor, gt_boxes: Tensor, weights) -> Tensor:
    """``Box2BoxTransform.get_deltas``, whose assertion that boxes have a width waits for the GPU."""
    sizes, gt_sizes = boxes[:, 2:] - boxes[:, :2], gt_boxes[:, 2:] - gt_boxes[:, :2]
    centres, gt_centres = boxes[:, :2] + 0.5 * sizes, gt_boxes[:, :2] + 0.5 * gt_sizes
    wx, wy, ww, wh = weights
    dx, dy = ((gt_centres - centres) / sizes).unbind(dim=1)
    dw, dh = torch.log(gt_sizes / sizes).unbind(dim=1)
    return torch.stack((wx * dx, wy * dy, ww * dw, wh * dh), dim=1)


def focal_weights(cls_losses: Tensor, positive: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss's factor alpha_t (1 - p_t)^gamma of each cross entropy -ln p_t; any shape, that of bool `positive`."""
    alpha_t = torch.where(positive, alpha, 1 - alpha)
    return alpha_t * (1 - torch.exp(-cls_losses)) ** gamma


def group_sums(values: Tensor, group_idxs: Tensor, num_groups: int) -> Tensor:
    """Sums of values[..., R] over the members of each group; float32 Tensor[..., G].

    `group_idxs` is int64 [R] or of the values' shape, in [0, G).
    """
    sums = torch.zeros(*values.shape[:-1], num_groups, device=values.device)
    return sums.scatter_add_(-1, group_idxs.expand_as(values), values.float())


def group_mean_weights(mask: Tensor, group_idxs: Tensor, num_groups: int) -> Tensor:
    """Weights that turn a sum over the boxes of `mask` into eq. 2's sum over groups of per-group means.

    Args:
        mask (bool Tensor[..., R]): the samples that take part.
        group_idxs (int64 Tensor[R], or as mask): group of each box, in [0, num_groups).

    Returns:
        float32 Tensor[..., R]: 1 / |S| for the samples of a group S, 0 elsewhere. An empty group has no weight at all.
    """
    per_group = 1.0 / group_sums(mask, group_idxs, num_groups).clamp(min=1)
    return per_group.gather(-1, group_idxs.expand_as(mask)) * mask
