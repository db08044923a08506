"""The loss of eq. 2, for both stages: the weight of each sample, classification and box regression.

Shape shorthand: S boxes of all images one after another, G groups of an image, B images.
"""

from collections.abc import Sequence

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.events import get_event_storage
from torch import Tensor

from gs_d2.modeling.losses import (
    BOX_REG_LOSS_TYPES,
    box_regression_loss,
    focal_weights,
    group_mean_weights,
    group_sums,
    paired_iou,
)

CLS_LOSS_TYPES = ("softmax", "focal", "focal_normalized")
_LOG_PERIOD = 20  # iterations between two writes of the group statistics, which wait for the GPU


class GroupCriterion:
    """Eq. 2: the sum over groups of the mean loss of each group's samples, averaged over images.

    Args:
        box2box_transform: eq. 13.
        cls_loss_type: the weight of a sample in its group. "softmax": all alike. "focal": focal loss's factor, divided
            by the number of positives (at least 1), as in RetinaNet. "focal_normalized": that factor, divided by its
            sum over the group, so that the loss is a weighted mean: the paper's Focal*.
        focal_alpha, focal_gamma: of focal loss.
        box_reg_loss_type, smooth_l1_beta: see :func:`gs_d2.modeling.losses.box_regression_loss`.
        iou_aware: empty, or the two IoUs of :meth:`quality`, 0 <= low < high <= 1; only with "softmax".
    """

    def __init__(
        self,
        box2box_transform: Box2BoxTransform,
        *,
        cls_loss_type: str = "softmax",
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
        iou_aware: Sequence[float] = (),
    ):
        if cls_loss_type not in CLS_LOSS_TYPES:
            raise ValueError(f"CLS_LOSS_TYPE must be one of {', '.join(CLS_LOSS_TYPES)}, got {cls_loss_type!r}")
        if box_reg_loss_type not in BOX_REG_LOSS_TYPES:
            raise ValueError(
                f"BBOX_REG_LOSS_TYPE must be one of {', '.join(BOX_REG_LOSS_TYPES)}, got {box_reg_loss_type!r}"
            )
        if iou_aware and not (len(iou_aware) == 2 and 0 <= iou_aware[0] < iou_aware[1] <= 1):
            raise ValueError(f"IOU_AWARE must be empty or two rising IoUs in [0, 1], got {list(iou_aware)}")
        if iou_aware and cls_loss_type != "softmax":
            raise ValueError(f'IOU_AWARE needs CLS_LOSS_TYPE "softmax", got {cls_loss_type!r}')
        self.box2box_transform = box2box_transform
        self.cls_loss_type = cls_loss_type
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        self.iou_aware = tuple(iou_aware)

    def classification(
        self,
        cls_losses: Tensor,
        sampled_labels: Tensor,
        group_idxs: Tensor,
        num_groups: int,
        num_images: int,
        targets: Tensor | None = None,
    ) -> Tensor:
        """The classification term, a scalar.

        Args:
            cls_losses (Tensor[S], or [S, K] with `targets`): cross entropy of each box, or of each class of each box,
                which then are summed. Losses of boxes that are not sampled may be infinite or NaN.
            sampled_labels (int8 Tensor[S]): 1 positive, 0 negative, -1 not sampled.
            group_idxs (int64 Tensor[S]): in [0, num_groups); boxes of two images are never in one group.
            num_groups (int): B G.
            num_images (int): B.
            targets (bool Tensor[S, K]): which classes are present.
        """
        sampled, positive = sampled_labels >= 0, sampled_labels == 1
        if targets is None:
            cls_losses, targets = cls_losses[:, None], positive[:, None]
        cls_losses = torch.where(sampled[:, None], cls_losses, 0.0)
        if self.cls_loss_type == "softmax":
            weights = group_mean_weights(sampled, group_idxs, num_groups)[:, None]
        else:
            weights = focal_weights(cls_losses, targets, self.focal_alpha, self.focal_gamma) * sampled[:, None]
            if self.cls_loss_type == "focal":
                total = group_sums(positive, group_idxs, num_groups).clamp(min=1)
            else:
                total = group_sums(weights.detach().sum(dim=1), group_idxs, num_groups)
                total = total.clamp(min=torch.finfo(torch.float32).tiny)
            weights = weights / total[group_idxs, None]
        return (cls_losses * weights).sum() / num_images

    @torch.no_grad()
    def quality(self, pred_deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, valid: Tensor) -> Tensor:
        """What a positive's score should be when scores say how good a box is: the IoU of the predicted box with its
        ground truth, from 0 at the lower IoU of `iou_aware` (or less) to 1 at the higher (or more).

        Args:
            pred_deltas, boxes, gt_boxes, valid: as :meth:`box_regression`.

        Returns:
            float32 Tensor[P] in [0, 1]; 1 where not `valid`. No gradient flows through it.
        """
        low, high = self.iou_aware
        pred_deltas = torch.where(valid[:, None], pred_deltas, 0.0).float()
        ious = paired_iou(self.box2box_transform.apply_deltas(pred_deltas, boxes), gt_boxes)
        return torch.where(valid, ((ious - low) / (high - low)).clamp(0, 1), 1.0)

    def box_regression(
        self,
        pred_deltas: Tensor,
        boxes: Tensor,
        gt_boxes: Tensor,
        valid: Tensor,
        group_idxs: Tensor,
        num_groups: int,
        num_images: int,
    ) -> Tensor:
        """The regression term, a scalar; 0, but part of the graph, where there is no positive.

        Args:
            pred_deltas, boxes, gt_boxes (Tensor[P, 4]): of boxes that are positive, and of any others.
            valid (bool Tensor[P]): which are positive. The others have no loss, whatever their deltas.
            group_idxs, num_groups, num_images: as :meth:`classification`.
        """
        losses = box_regression_loss(
            torch.where(valid[:, None], pred_deltas, 0.0),
            boxes,
            torch.where(valid[:, None], gt_boxes, boxes),
            self.box2box_transform,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        return (losses * group_mean_weights(valid, group_idxs, num_groups)).sum() / num_images


def log_group_statistics(
    name: str, scales: list[float], scale_idxs: Tensor, match_labels: Tensor, sampled_labels: Tensor, cls_losses: Tensor
):
    """Writes to TensorBoard, for each scale: boxes matched and sampled per image, and the mean loss of the samples.

    Also three values of the samples' scores, the foreground probabilities that follow from the losses: "pos_score" and
    "neg_score" (means over positives and negatives) and "distinct_scores" (the number of different scores, to 1e-6, by
    the number of samples). A scale without such samples has no value.

    Args:
        name: prefix of the curves, "groups" for the first stage.
        scale_idxs (int64 Tensor[R] or [B, R]), match_labels, sampled_labels (int8 Tensor[B, R]), cls_losses
            (Tensor[B, R])
    """
    storage = get_event_storage()
    # In the iterations whose end is when Detectron2 writes, and in the first, for runs that are shorter.
    if storage.iter != 0 and (storage.iter + 1) % _LOG_PERIOD != 0:
        return
    statistics = {
        label: group_sums(mask, scale_idxs, len(scales)).mean(dim=0)
        for label, mask in {
            "pos_matched": match_labels == 1,
            "neg_matched": match_labels == 0,
            "pos_sampled": sampled_labels == 1,
            "neg_sampled": sampled_labels == 0,
        }.items()
    }
    sampled = sampled_labels >= 0
    weights = group_mean_weights(sampled, scale_idxs, len(scales))
    loss = torch.where(sampled, cls_losses.detach(), 0) * weights
    statistics["loss_cls"] = group_sums(loss, scale_idxs, len(scales)).mean(dim=0)
    values = torch.stack(list(statistics.values())).tolist()
    for label, row in zip(statistics, values, strict=True):
        for scale, value in zip(scales, row, strict=True):
            storage.put_scalar(f"{name}/{label}@{scale:g}", value, smoothing_hint=False)
    rows = torch.nonzero(sampled.flatten())[:, 0]
    of_rows = [x.expand_as(sampled).flatten()[rows] for x in (scale_idxs, sampled_labels, cls_losses.detach())]
    for label, value in _score_statistics(scales, *(x.cpu() for x in of_rows)).items():
        storage.put_scalar(f"{name}/{label}", value, smoothing_hint=False)


def _score_statistics(scales: list[float], scale_idxs: Tensor, labels: Tensor, losses: Tensor) -> dict[str, float]:
    """Score statistics of S samples."""
    positive = labels == 1
    scores = torch.where(positive, torch.exp(-losses), -torch.expm1(-losses))
    statistics = {}
    for i, scale in enumerate(scales):
        of_scale = scale_idxs == i
        if of_scale.any():
            different = torch.unique((scores[of_scale] * 1e6).round()).numel()
            statistics[f"distinct_scores@{scale:g}"] = different / int(of_scale.sum())
        for label, mask in (("pos_score", of_scale & positive), ("neg_score", of_scale & ~positive)):
            if mask.any():
                statistics[f"{label}@{scale:g}"] = float(scores[mask].mean())
    return statistics
