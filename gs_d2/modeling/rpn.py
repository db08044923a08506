"""GroupSamplingRPN: an RPN trained on the same number of samples at every scale.

Shape shorthand: B images, R anchors of an image over all feature maps, G groups, L feature maps.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, build_rpn_head
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from gs_d2.modeling.criterion import GroupCriterion, log_group_statistics
from gs_d2.modeling.decoding import best_boxes
from gs_d2.modeling.matcher import TwoPassMatcher
from gs_d2.modeling.nms import prune_overlapping, top_nms
from gs_d2.modeling.sampling import GroupSampler, first_of_each_group, group_by_scale


@PROPOSAL_GENERATOR_REGISTRY.register()
class GroupSamplingRPN(torch.nn.Module):
    """Two-pass matching, group sampling and the loss of eq. 2; proposals by one NMS over all scales.

    In place of Detectron2's ``RPN`` (``MODEL.PROPOSAL_GENERATOR.NAME: "GroupSamplingRPN"``): same call and return.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        head: torch.nn.Module,
        anchor_generator: torch.nn.Module,
        anchor_matcher: TwoPassMatcher,
        sampler: GroupSampler,
        criterion: GroupCriterion,
        group_scales: list[float],
        box2box_transform: Box2BoxTransform,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float = 0.5,
        score_thresh_test: float = 0.0,
        min_box_size: float = 0.0,
        loss_weight: dict[str, float] | None = None,
        ohem_nms_thresh: float = 1.0,
        proposal_scales: list[float] | None = None,
        group_post_nms_topk: tuple[int, int] = (0, 0),
    ):
        """
        Args:
            in_features: names of the feature maps used.
            head: as :class:`SoftmaxRPNHead`.
            anchor_generator: as :class:`ScaleStrideAnchorGenerator`.
            anchor_matcher, sampler: which anchors are positive and negative, and which of them are trained on.
            criterion: what those cost.
            group_scales: the scales, in pixels, that define the groups; statistics are kept by them even where the
                sampler has a single group.
            box2box_transform: eq. 13.
            pre_nms_topk, post_nms_topk: (training, test) boxes kept before and after NMS, over all feature maps.
            nms_thresh: IoU above which the lower-scored box is dropped.
            score_thresh_test: probability below which :meth:`predict_candidates` drops a box.
            min_box_size: boxes with a side not above this many pixels are dropped.
            loss_weight: factors of "loss_rpn_cls" and "loss_rpn_loc" (eta of eq. 2); None is 1 for both.
            ohem_nms_thresh: OHEM's pruning before the draw: of predicted boxes of one group and label that overlap by
                more, only the one of highest loss can be drawn. 1 is none; less makes the label path wait for the GPU.
            proposal_scales, group_post_nms_topk: with a count above 0 for (training, test), so many proposals are kept
                of each reference scale (eq. 4), in pixels, after an NMS over all, so that small ones survive;
                `post_nms_topk` then is the limit of all. None and 0: the best whatever their scale.
        """
        super().__init__()
        if not 0 < ohem_nms_thresh <= 1:
            raise ValueError(f"OHEM_NMS_THRESH must be in (0, 1], got {ohem_nms_thresh}")
        if max(group_post_nms_topk) > 0 and not proposal_scales:
            raise ValueError("GROUP_POST_NMS_TOPK needs the reference scales of proposals")
        self.in_features = in_features
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.sampler = sampler
        self.criterion = criterion
        self.group_scales = list(group_scales)
        self.box2box_transform = box2box_transform
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.score_thresh_test = score_thresh_test
        self.min_box_size = float(min_box_size)
        self.loss_weight = loss_weight or {}
        self.ohem_nms_thresh = ohem_nms_thresh
        self.proposal_scales = proposal_scales
        self.group_post_nms_topk = {True: group_post_nms_topk[0], False: group_post_nms_topk[1]}

    @classmethod
    def from_config(cls, cfg, input_shape):
        rpn, gs = cfg.MODEL.RPN, cfg.MODEL.GS
        shapes = [input_shape[name] for name in rpn.IN_FEATURES]
        anchor_generator = build_anchor_generator(cfg, shapes)
        group_scales = list(gs.GROUP_SCALES) or anchor_generator.scales
        box2box_transform = Box2BoxTransform(weights=rpn.BBOX_REG_WEIGHTS)
        return {
            "in_features": rpn.IN_FEATURES,
            "head": build_rpn_head(cfg, shapes),
            "anchor_generator": anchor_generator,
            "anchor_matcher": TwoPassMatcher(
                rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, second_pass=gs.SECOND_PASS, ignore_thresh=gs.IGNORE_THRESH
            ),
            "sampler": GroupSampler(
                len(group_scales) if gs.GROUP_SAMPLING else 1,
                rpn.BATCH_SIZE_PER_IMAGE,
                rpn.POSITIVE_FRACTION,
                gs.SAMPLER,
            ),
            "criterion": GroupCriterion(
                box2box_transform,
                cls_loss_type=gs.CLS_LOSS_TYPE,
                focal_alpha=cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA,
                focal_gamma=cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA,
                box_reg_loss_type=rpn.BBOX_REG_LOSS_TYPE,
                smooth_l1_beta=rpn.SMOOTH_L1_BETA,
            ),
            "group_scales": group_scales,
            "box2box_transform": box2box_transform,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "score_thresh_test": cfg.TEST.GS.SCORE_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "loss_weight": {
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT,
            },
            "ohem_nms_thresh": gs.OHEM_NMS_THRESH,
            "proposal_scales": list(gs.ROI.GROUP_SCALES),
            "group_post_nms_topk": (gs.GROUP_POST_NMS_TOPK_TRAIN, gs.GROUP_POST_NMS_TOPK_TEST),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
        ignore_boxes: list[Boxes] | None = None,
        with_proposals: bool = True,
    ):
        """
        Args:
            images: B images; only their sizes are used.
            features: feature maps by name, each [B, C, Hi, Wi].
            gt_instances: with `gt_boxes`; needed in training.
            ignore_boxes: regions of each image in which no anchor is a negative; None for none.
            with_proposals: False spares a single-stage detector decoding and NMS in training.

        Returns:
            proposals (list[Instances]): by falling score, with `proposal_boxes` (clipped to the image),
                `objectness_logits` (sigmoid is the face probability) and `anchor_scales` (pixels); empty list if
                `with_proposals` is False.
            losses (dict): "loss_rpn_cls" and "loss_rpn_loc" in training, else empty.
        """
        anchors, logits, deltas = self.predict(features)
        losses = {}
        if self.training:
            assert gt_instances is not None, "GroupSamplingRPN needs gt_instances in training"
            losses = self.losses(anchors, logits, deltas, [x.gt_boxes for x in gt_instances], ignore_boxes)
        proposals = []
        if with_proposals:
            proposals = [self._select(x) for x in self._decode(anchors, logits, deltas, images.image_sizes, 0.0)]
        return proposals, losses

    @torch.no_grad()
    def _select(self, candidates: Instances) -> Instances:
        boxes, scores = candidates.proposal_boxes.tensor, candidates.objectness_logits
        limit, per_scale = self.post_nms_topk[self.training], self.group_post_nms_topk[self.training]
        if per_scale == 0:
            return candidates[top_nms(boxes, scores, self.nms_thresh, limit)]
        candidates = candidates[top_nms(boxes, scores, self.nms_thresh, len(boxes))]
        scale_idxs = group_by_scale(candidates.proposal_boxes.area().sqrt(), self.proposal_scales)
        return candidates[first_of_each_group(scale_idxs, len(self.proposal_scales), per_scale)][:limit]

    def predict_candidates(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """What :meth:`forward` proposes before NMS: for detectors that merge several views of an image themselves.

        Args:
            images, features: as :meth:`forward`.

        Returns:
            For each image the boxes of the highest scores, at most PRE_NMS_TOPK, of a probability of at least
            `score_thresh_test`, with the fields of its proposals.
        """
        return self._decode(*self.predict(features), images.image_sizes, self.score_thresh_test)

    def predict(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors [R, 4], logits [B, R, 2] and deltas [B, R, 4], float32 also under autocast."""
        maps = [features[name] for name in self.in_features]
        anchors = Boxes.cat(self.anchor_generator(maps)).tensor
        logits, deltas = self.rpn_head(maps)
        logits = self.anchor_generator.flatten(logits, 2).float()
        deltas = self.anchor_generator.flatten(deltas, 4).float()
        return anchors, logits, deltas

    def group_anchors(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Of each of Tensor[R, 4] the index of its scale in `group_scales`, and the group it is sampled in: int64 [R].

        They differ where the sampler has a single group.
        """
        scale_idxs = group_by_scale(Boxes(anchors).area().sqrt(), self.group_scales)
        return scale_idxs, scale_idxs if self.sampler.num_groups > 1 else torch.zeros_like(scale_idxs)

    def losses(
        self,
        anchors: Tensor,
        pred_logits: Tensor,
        pred_deltas: Tensor,
        gt_boxes: list[Boxes],
        ignore_boxes: list[Boxes] | None = None,
    ) -> dict[str, Tensor]:
        """Eq. 2: the sum over groups of the mean losses of the samples drawn from each, averaged over images.

        Args:
            anchors (Tensor[R, 4]), pred_logits (Tensor[B, R, 2]), pred_deltas (Tensor[B, R, 4])
            gt_boxes, ignore_boxes: of each image.
        """
        match_labels, matched_gt_idxs, all_gt_boxes = self.anchor_matcher.match_images(anchors, gt_boxes, ignore_boxes)
        num_images, num_anchors = match_labels.shape
        num_groups = self.sampler.num_groups
        scale_idxs, group_idxs = self.group_anchors(anchors)
        cls_losses = F.cross_entropy(
            pred_logits.transpose(1, 2), match_labels.clamp(min=0).long(), reduction="none"
        )  # [B, R]
        candidates = match_labels
        if self.ohem_nms_thresh < 1 and self.sampler.method == "ohem":
            boxes = [self.box2box_transform.apply_deltas(deltas.detach(), anchors) for deltas in pred_deltas]
            candidates = prune_overlapping(
                match_labels, group_idxs, num_groups, torch.stack(boxes), cls_losses, self.ohem_nms_thresh,
                self.sampler.num_per_group,
            )  # fmt: skip
        sampled_labels = self.sampler(candidates, group_idxs, cls_losses.detach())
        log_group_statistics("groups", self.group_scales, scale_idxs, match_labels, sampled_labels, cls_losses)

        # Groups of all images, numbered through.
        first_group = torch.arange(num_images, device=anchors.device)[:, None] * num_groups
        group_idxs = (group_idxs + first_group).flatten()
        groups = {"num_groups": num_images * num_groups, "num_images": num_images}
        loss_cls = self.criterion.classification(cls_losses.flatten(), sampled_labels.flatten(), group_idxs, **groups)
        rows, valid = self._positive_rows(sampled_labels)
        loss_loc = self.criterion.box_regression(
            pred_deltas.flatten(0, 1)[rows],
            anchors[rows % num_anchors],
            all_gt_boxes[matched_gt_idxs.flatten()[rows]],
            valid,
            group_idxs[rows],
            **groups,
        )
        losses = {"loss_rpn_cls": loss_cls, "loss_rpn_loc": loss_loc}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _positive_rows(self, sampled_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the positives among all images' anchors, filled up to a fixed number (no wait for their count), and
        which of the rows are positives."""
        positive = (sampled_labels == 1).flatten()
        limit = self.sampler.max_positives
        if limit is None:
            rows = torch.nonzero(positive)[:, 0]
        else:
            size = min(len(sampled_labels) * limit, len(positive))
            rows = torch.nonzero_static(positive, size=size, fill_value=-1)[:, 0]
        return rows.clamp(min=0), rows >= 0

    @torch.no_grad()
    def _decode(
        self,
        anchors: Tensor,
        pred_logits: Tensor,
        pred_deltas: Tensor,
        image_sizes: list[tuple[int, int]],
        score_thresh: float,
    ) -> list[Instances]:
        results = []
        for logits, deltas, image_size in zip(pred_logits, pred_deltas, image_sizes, strict=True):
            boxes, scores, idxs = self.best_boxes(anchors, logits, deltas, image_size, score_thresh)
            candidates = Instances(image_size)
            candidates.proposal_boxes = Boxes(boxes)
            candidates.objectness_logits = scores
            candidates.anchor_scales = Boxes(anchors[idxs]).area().sqrt()
            results.append(candidates)
        return results

    def best_boxes(self, anchors: Tensor, logits: Tensor, deltas: Tensor, image_size: tuple, score_thresh: float):
        """:func:`gs_d2.modeling.decoding.best_boxes` of one image of :meth:`predict`, at most PRE_NMS_TOPK."""
        return best_boxes(
            anchors,
            logits,
            deltas,
            image_size,
            box2box_transform=self.box2box_transform,
            topk=self.pre_nms_topk[self.training],
            score_thresh=score_thresh,
            min_size=self.min_box_size,
        )
