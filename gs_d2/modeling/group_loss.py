"""From ground truth to the loss of eq. 2, for every detector here: match, group, sample, loss.

Shape shorthand in this module:

    B: number of images in the batch
    R: number of boxes of an image: anchors, or proposals
    G: number of groups of an image
    K: number of classes

Naming convention:

    match: which ground truth a box belongs to, and its label: 1 (positive), 0 (negative) or -1 (ignored).

    scale: the size, in pixels, that a box belongs to: the nearest of `group_scales`.

    group: the boxes that compete with each other for being sampled. With group sampling there is one group for each
    scale, without it one for all.

    sample: a box that the sampler has chosen to train on. Sampled labels are match labels, with -1 for all other boxes.
"""

from collections.abc import Callable

import torch
from detectron2.structures import Boxes
from torch import Tensor

from gs_d2.modeling.criterion import GroupCriterion, log_group_statistics
from gs_d2.modeling.matcher import Matches, TwoPassMatcher
from gs_d2.modeling.nms import prune_overlapping
from gs_d2.sampling import GroupSampler, group_by_scale


class GroupLoss:
    """All that a detector needs to train by group sampling: matching, groups, sampler and loss.

    Detectors that predict for every anchor call :meth:`match` and :meth:`dense`. A second stage, which predicts only
    for sampled boxes, calls the steps: :meth:`match`, :meth:`group`, :meth:`sample`, then `criterion`.

    Args:
        matcher: which boxes are positive and negative.
        sampler: chooses which of them are trained on: a :class:`GroupSampler`, or any callable of match_labels,
            group_idxs and losses that returns what :meth:`sample` does and has `num_groups`. It may also have two
            attributes. `needs_losses`: False spares computing the losses, which then are 0; without it they are
            computed. `max_positives` (int): the most positives of one image, so that box regression gathers that many
            rows; without it, all boxes are computed and masked.
        criterion: the loss of the samples.
        group_scales: the scales, in pixels, that define the groups. Statistics are logged for each of them even where
            the sampler has a single group.
        ohem_nms_thresh: OHEM's pruning before sampling. Among boxes that compete (those of one group and label, or with
            "ohem_all" of one group) and overlap by more than this IoU, only the one with the highest loss can be
            sampled. 1 turns pruning off; with less, the label path waits for the GPU.
        name: prefix of the curves in TensorBoard.
    """

    def __init__(
        self,
        *,
        matcher: TwoPassMatcher,
        sampler: GroupSampler,
        criterion: GroupCriterion,
        group_scales: list[float],
        ohem_nms_thresh: float = 1.0,
        name: str = "groups",
    ):
        if not 0 < ohem_nms_thresh <= 1:
            raise ValueError(f"OHEM_NMS_THRESH must be in (0, 1], got {ohem_nms_thresh}")
        if not group_scales:
            raise ValueError("group_scales must have at least one scale")
        if sampler.num_groups not in (1, len(group_scales)):
            raise ValueError(
                f"sampler must have 1 group or as many as group_scales ({len(group_scales)}), got {sampler.num_groups}"
            )
        self.matcher = matcher
        self.sampler = sampler
        self.criterion = criterion
        self.group_scales = list(group_scales)
        self.ohem_nms_thresh = ohem_nms_thresh
        self.name = name

    @classmethod
    def from_config(
        cls,
        cfg,
        gs,
        scales,
        *,
        iou_thresholds,
        iou_labels=(0, -1, 1),
        batch_size_per_image,
        positive_fraction,
        name="groups",
        **criterion,
    ):
        """
        Args:
            gs: the stage's keys GROUP_SCALES, GROUP_SAMPLING, SAMPLER and CLS_LOSS_TYPE: MODEL.GS or MODEL.GS.ROI.
            scales: of the stage's anchors, or its reference scales, in pixels: the groups, unless GROUP_SCALES names
                others. Regions to ignore are enlarged to the smallest.
            iou_thresholds, iou_labels, batch_size_per_image, positive_fraction: the stage's Detectron2 keys of these
                names.
            criterion: the stage's own arguments of :class:`GroupCriterion`.
        """
        group_scales = list(gs.GROUP_SCALES) or list(scales)
        return cls(
            matcher=TwoPassMatcher(
                iou_thresholds,
                iou_labels,
                second_pass=cfg.MODEL.GS.SECOND_PASS,
                ignore_thresh=cfg.MODEL.GS.IGNORE_THRESH,
                min_ignore_size=min(scales, default=0),
            ),
            sampler=GroupSampler(
                len(group_scales) if gs.GROUP_SAMPLING else 1, batch_size_per_image, positive_fraction, gs.SAMPLER
            ),
            criterion=GroupCriterion(
                cls_loss_type=gs.CLS_LOSS_TYPE,
                focal_alpha=cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA,
                focal_gamma=cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA,
                **criterion,
            ),
            group_scales=group_scales,
            ohem_nms_thresh=cfg.MODEL.GS.OHEM_NMS_THRESH,
            name=name,
        )

    def match(
        self,
        boxes: Tensor,
        gt_boxes: list[Boxes],
        ignore_boxes: list[Boxes] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
    ) -> Matches:
        """:meth:`TwoPassMatcher.match_images`."""
        return self.matcher.match_images(boxes, gt_boxes, ignore_boxes, image_sizes)

    def group(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and groups of boxes.

        Args:
            boxes (Tensor[..., 4]): XYXY.

        Returns:
            scale_idxs (int64 Tensor[...]): index into `group_scales` of each box's scale.
            group_idxs (int64 Tensor[...]): the group it is sampled in: `scale_idxs`, or 0 where the sampler has a
                single group.
        """
        scale_idxs = group_by_scale((boxes[..., 2:] - boxes[..., :2]).prod(dim=-1).sqrt(), self.group_scales)
        return scale_idxs, scale_idxs if self.sampler.num_groups > 1 else torch.zeros_like(scale_idxs)

    @property
    def needs_losses(self) -> bool:
        """Whether the sampler needs losses. A sampler that does not say so is given them."""
        return getattr(self.sampler, "needs_losses", True)

    def sample(
        self, match_labels: Tensor, group_idxs: Tensor, cls_losses: Tensor, boxes: Callable[[], Tensor]
    ) -> Tensor:
        """Chooses the boxes to train on.

        Args:
            match_labels (int8 Tensor[B, R]), group_idxs (int64 Tensor[R] or [B, R])
            cls_losses (Tensor[B, R]): read if the sampler needs losses, as by :func:`gs_d2.ops.group_subsample`:
                infinity is the hardest sample, NaN the easiest.
            boxes: returns the boxes [B, R, 4] that OHEM's pruning compares; called only if pruning is on.

        Returns:
            int8 Tensor[B, R]: 1 or 0 where sampled, -1 elsewhere.
        """
        cls_losses = cls_losses.detach()
        if self.ohem_nms_thresh < 1 and getattr(self.sampler, "method", None) in ("ohem", "ohem_all"):
            match_labels = prune_overlapping(
                match_labels, group_idxs, self.sampler.num_groups, boxes(), cls_losses, self.ohem_nms_thresh,
                self.sampler.num_per_group, self.sampler.labels_compete,
            )  # fmt: skip
        return self.sampler(match_labels, group_idxs, cls_losses)

    def log(self, scale_idxs: Tensor, match_labels: Tensor, sampled_labels: Tensor, cls_losses: Tensor):
        """Logs this stage's :func:`log_group_statistics`."""
        log_group_statistics(self.name, self.group_scales, scale_idxs, match_labels, sampled_labels, cls_losses)

    def all_groups(self, group_idxs: Tensor, num_images: int) -> tuple[Tensor, dict[str, int]]:
        """Gives the groups of all images consecutive numbers, for :class:`GroupCriterion`.

        Args:
            group_idxs (int64 Tensor[R] or [B, R])

        Returns:
            int64 Tensor[B, R], and a dict of the criterion's arguments `num_groups` and `num_images`.
        """
        num_groups = self.sampler.num_groups
        first_group = torch.arange(num_images, device=group_idxs.device)[:, None] * num_groups
        return group_idxs + first_group, {"num_groups": num_images * num_groups, "num_images": num_images}

    def dense(
        self,
        anchors: Tensor,
        matches: Matches,
        pred_logits: Tensor,
        pred_deltas: Tensor,
        cross_entropy: Callable[..., Tensor],
        targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Eq. 2 for predictions of every anchor: the sum over groups of the mean loss of each group's samples, averaged
        over images.

        Only samples reach the losses and their gradients: the predictions of other anchors may be infinite or NaN.

        Args:
            anchors (Tensor[R, 4])
            matches: of :meth:`match`.
            pred_logits (Tensor[B, R, C]), pred_deltas (Tensor[B, R, 4])
            cross_entropy: maps logits [B, R, C] to losses [B, R], or to [B, R, K] if each class has its own cross
                entropy. If the criterion is IoU-aware, it is also called with quality [B, R] as a second argument: the
                target of a positive's score, in [0, 1], in place of 1.
            targets (bool Tensor[B, R, K]): which classes are present; only for losses [B, R, K].

        Returns:
            The classification and the regression term, scalars.
        """
        num_images, num_anchors = matches.labels.shape
        scale_idxs, group_idxs = self.group(anchors)
        quality = ()
        if self.criterion.iou_aware:
            of_anchors = self.criterion.quality(
                pred_deltas.flatten(0, 1),
                anchors.repeat(num_images, 1),
                matches.gt_boxes[matches.gt_idxs.flatten()],
                (matches.labels == 1).flatten(),
            )
            quality = (of_anchors.view(num_images, num_anchors),)
        all_losses = pred_logits.new_zeros(num_images, num_anchors)
        if self.needs_losses:
            with torch.no_grad():
                all_losses = _of_anchors(cross_entropy(pred_logits, *quality), targets)
        sampled_labels = self.sample(
            matches.labels, group_idxs, all_losses, lambda: self._decode(pred_deltas.detach(), anchors)
        )
        # Mask logits, not losses: a weight of 0 times an infinite loss is NaN, and so is its gradient.
        logits = torch.where((sampled_labels >= 0)[..., None], pred_logits, 0.0)
        cls_losses = cross_entropy(logits)  # without quality, as scores are logged, which follow from it
        self.log(scale_idxs, matches.labels, sampled_labels, _of_anchors(cls_losses, targets))
        if quality:
            cls_losses = cross_entropy(logits, *quality)

        group_idxs, counts = self.all_groups(group_idxs, num_images)
        group_idxs = group_idxs.flatten()
        loss_cls = self.criterion.classification(
            cls_losses.flatten(0, 1),
            sampled_labels.flatten(),
            group_idxs,
            targets=None if targets is None else targets.flatten(0, 1),
            **counts,
        )
        rows, valid = self._positive_rows(sampled_labels)
        loss_loc = self.criterion.box_regression(
            pred_deltas.flatten(0, 1)[rows],
            anchors[rows % num_anchors],
            matches.gt_boxes[matches.gt_idxs.flatten()[rows]],
            valid,
            group_idxs[rows],
            **counts,
        )
        return loss_cls, loss_loc

    def _decode(self, pred_deltas: Tensor, anchors: Tensor) -> Tensor:
        return torch.stack([self.criterion.box2box_transform.apply_deltas(deltas, anchors) for deltas in pred_deltas])

    def _positive_rows(self, sampled_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the positives among the anchors of all images, padded to a fixed number so that nothing waits for
        their count, and which of these rows are positives. All rows, if the sampler states no limit."""
        positive = (sampled_labels == 1).flatten()
        limit = getattr(self.sampler, "max_positives", None)
        if limit is None:
            return torch.arange(len(positive), device=positive.device), positive
        size = min(len(sampled_labels) * limit, len(positive))
        if positive.device.type == "cpu" and positive.sum() > size:  # on a GPU this check would wait for it
            raise ValueError(
                f"{type(self.sampler).__name__} sampled {int(positive.sum())} positives in {len(sampled_labels)} "
                f"images, more than its max_positives of {limit} each"
            )
        rows = torch.nonzero_static(positive, size=size, fill_value=-1)[:, 0]
        return rows.clamp(min=0), rows >= 0


def _of_anchors(cls_losses: Tensor, targets: Tensor | None) -> Tensor:
    """[B, R] of [B, R], or of [B, R, K] where there are targets."""
    return cls_losses if targets is None else cls_losses.sum(dim=-1)
