"""From ground truth to the loss of eq. 2: matching, groups, the draw and its cost, for every detector here.

Shape shorthand: B images, R boxes (anchors or proposals) of an image, G groups, K classes.
"""

from collections.abc import Callable

import torch
from detectron2.structures import Boxes
from torch import Tensor

from gs_d2.modeling.criterion import GroupCriterion, log_group_statistics
from gs_d2.modeling.matcher import TwoPassMatcher
from gs_d2.modeling.nms import prune_overlapping
from gs_d2.sampling import GroupSampler, group_by_scale


class GroupLoss:
    """What a detector needs to train by group sampling: it predicts, this says which predictions cost what.

    Detectors that predict for every anchor call :meth:`match` and :meth:`dense`. A second stage, which predicts only
    for boxes that were drawn, calls the steps: :meth:`match`, :meth:`group`, :meth:`draw`, then `criterion`.

    Args:
        matcher: which boxes are positive and negative.
        sampler: which of them are trained on: a :class:`GroupSampler`, or any callable of match_labels, group_idxs and
            losses that returns what :meth:`draw` does and has `num_groups`. It may also have `needs_losses` (False
            spares the losses, which then are 0) and `max_positives` (int: the most positives of one image, so that box
            regression looks at so many rows instead of at all boxes); without them it needs losses and has no limit.
        criterion: what those cost.
        group_scales: the scales, in pixels, that define the groups; statistics are kept by them even where the sampler
            has a single group.
        ohem_nms_thresh: OHEM's pruning before the draw: of boxes that compete (those of one group and label, or with
            "ohem_all" of one group) and overlap by more, only the one of highest loss can be drawn. 1 is none; less
            makes the label path wait for the GPU.
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
            criterion: what of :class:`GroupCriterion` is the stage's own.
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`TwoPassMatcher.match_images`: match_labels, matched_gt_idxs, all_gt_boxes."""
        return self.matcher.match_images(boxes, gt_boxes, ignore_boxes, image_sizes)

    def group(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Of each of Tensor[..., 4] the index of its scale in `group_scales`, and the group it is sampled in: int64.

        They differ where the sampler has a single group.
        """
        scale_idxs = group_by_scale((boxes[..., 2:] - boxes[..., :2]).prod(dim=-1).sqrt(), self.group_scales)
        return scale_idxs, scale_idxs if self.sampler.num_groups > 1 else torch.zeros_like(scale_idxs)

    @property
    def needs_losses(self) -> bool:
        """Whether the draw depends on the losses: unless the sampler says that it does not, it does."""
        return getattr(self.sampler, "needs_losses", True)

    def draw(self, match_labels: Tensor, group_idxs: Tensor, cls_losses: Tensor, boxes: Callable[[], Tensor]) -> Tensor:
        """Which boxes are trained on.

        Args:
            match_labels (int8 Tensor[B, R]), group_idxs (int64 Tensor[R] or [B, R])
            cls_losses (Tensor[B, R]): looked at where the sampler goes by losses, as :func:`gs_d2.ops.group_subsample`
                does: infinity is the hardest sample, NaN the easiest.
            boxes: gives the boxes [B, R, 4] that OHEM's pruning compares; called only if there is any.

        Returns:
            int8 Tensor[B, R]: 1 or 0 where drawn, -1 elsewhere.
        """
        cls_losses = cls_losses.detach()
        if self.ohem_nms_thresh < 1 and getattr(self.sampler, "method", None) in ("ohem", "ohem_all"):
            match_labels = prune_overlapping(
                match_labels, group_idxs, self.sampler.num_groups, boxes(), cls_losses, self.ohem_nms_thresh,
                self.sampler.num_per_group, self.sampler.labels_compete,
            )  # fmt: skip
        return self.sampler(match_labels, group_idxs, cls_losses)

    def log(self, scale_idxs: Tensor, match_labels: Tensor, sampled_labels: Tensor, cls_losses: Tensor):
        """:func:`log_group_statistics` of this stage."""
        log_group_statistics(self.name, self.group_scales, scale_idxs, match_labels, sampled_labels, cls_losses)

    def all_groups(self, group_idxs: Tensor, num_images: int) -> tuple[Tensor, dict[str, int]]:
        """Numbers the groups of all images through, for :class:`GroupCriterion`.

        Args:
            group_idxs (int64 Tensor[R] or [B, R])

        Returns:
            int64 Tensor[B, R], and the criterion's arguments `num_groups` and `num_images`.
        """
        num_groups = self.sampler.num_groups
        first_group = torch.arange(num_images, device=group_idxs.device)[:, None] * num_groups
        return group_idxs + first_group, {"num_groups": num_images * num_groups, "num_images": num_images}

    def dense(
        self,
        anchors: Tensor,
        matches: tuple[Tensor, Tensor, Tensor],
        pred_logits: Tensor,
        pred_deltas: Tensor,
        cross_entropy: Callable[[Tensor], Tensor],
        targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Eq. 2 for predictions of every anchor: the sum over groups of the mean losses of the samples drawn from each,
        averaged over images.

        Only samples reach the losses and their gradients: what is predicted for an anchor that is not drawn may be
        infinite or NaN.

        Args:
            anchors (Tensor[R, 4])
            matches: what :meth:`match` returns for them.
            pred_logits (Tensor[B, R, C]), pred_deltas (Tensor[B, R, 4])
            cross_entropy: of logits [B, R, C] the losses [B, R], or [B, R, K] if each class has a cross entropy of its
                own.
            targets (bool Tensor[B, R, K]): which classes are present; only for losses [B, R, K].

        Returns:
            The classification and the regression term, scalars.
        """
        match_labels, matched_gt_idxs, all_gt_boxes = matches
        num_images, num_anchors = match_labels.shape
        scale_idxs, group_idxs = self.group(anchors)
        all_losses = pred_logits.new_zeros(num_images, num_anchors)
        if self.needs_losses:
            with torch.no_grad():
                all_losses = _of_anchors(cross_entropy(pred_logits), targets)
        sampled_labels = self.draw(
            match_labels, group_idxs, all_losses, lambda: self._decode(pred_deltas.detach(), anchors)
        )
        # Of the logits, not of the losses: a weight of 0 would make NaN of an infinite loss, and of its gradient.
        cls_losses = cross_entropy(torch.where((sampled_labels >= 0)[..., None], pred_logits, 0.0))
        self.log(scale_idxs, match_labels, sampled_labels, _of_anchors(cls_losses, targets))

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
            all_gt_boxes[matched_gt_idxs.flatten()[rows]],
            valid,
            group_idxs[rows],
            **counts,
        )
        return loss_cls, loss_loc

    def _decode(self, pred_deltas: Tensor, anchors: Tensor) -> Tensor:
        return torch.stack([self.criterion.box2box_transform.apply_deltas(deltas, anchors) for deltas in pred_deltas])

    def _positive_rows(self, sampled_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the positives among all images' anchors, filled up to a fixed number (no wait for their count), and
        which of the rows are positives. All rows, where the sampler states no limit."""
        positive = (sampled_labels == 1).flatten()
        limit = getattr(self.sampler, "max_positives", None)
        if limit is None:
            return torch.arange(len(positive), device=positive.device), positive
        size = min(len(sampled_labels) * limit, len(positive))
        if positive.device.type == "cpu" and positive.sum() > size:  # a GPU would have to be waited for
            raise ValueError(
                f"{type(self.sampler).__name__} drew {int(positive.sum())} positives from {len(sampled_labels)} images,"
                f" more than its max_positives of {limit} each"
            )
        rows = torch.nonzero_static(positive, size=size, fill_value=-1)[:, 0]
        return rows.clamp(min=0), rows >= 0


def _of_anchors(cls_losses: Tensor, targets: Tensor | None) -> Tensor:
    """[B, R] of [B, R], or of [B, R, K] where there are targets."""
    return cls_losses if targets is None else cls_losses.sum(dim=-1)
