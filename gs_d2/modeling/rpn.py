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

from gs_d2.modeling.decoding import best_boxes
from gs_d2.modeling.group_loss import GroupLoss
from gs_d2.modeling.nms import top_nms, top_nms_of_groups
from gs_d2.sampling import group_by_scale
from gs_d2.unread_keys import OF_RPN


@PROPOSAL_GENERATOR_REGISTRY.register()
class GroupSamplingRPN(torch.nn.Module):
    """Two-pass matching, group sampling and the loss of eq. 2; proposals by one NMS over all scales.

    In place of Detectron2's ``RPN`` (``MODEL.PROPOSAL_GENERATOR.NAME: "GroupSamplingRPN"``): same call and return, so
    that it also goes into Detectron2's own ``GeneralizedRCNN`` and ``ProposalNetwork``.
    """

    unread_keys = OF_RPN

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        head: torch.nn.Module,
        anchor_generator: torch.nn.Module,
        group_loss: GroupLoss,
        box2box_transform: Box2BoxTransform,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float = 0.5,
        score_thresh: float = 0.0,
        min_box_size: float = 0.0,
        loss_weight: dict[str, float] | None = None,
        proposal_scales: list[float] | None = None,
        group_post_nms_topk: tuple[int, int] = (0, 0),
    ):
        """
        Args:
            in_features: names of the feature maps used.
            head: as :class:`SoftmaxRPNHead`.
            anchor_generator: as :class:`ScaleStrideAnchorGenerator`.
            group_loss: which anchors are trained on, and what they cost.
            box2box_transform: eq. 13.
            pre_nms_topk, post_nms_topk: (training, test) boxes kept before and after NMS, over all feature maps.
            nms_thresh: IoU above which the lower-scored box is dropped.
            score_thresh: probability below which :meth:`predict_candidates` drops a box.
            min_box_size: boxes with a side not above this many pixels are dropped.
            loss_weight: factors of "loss_rpn_cls" and "loss_rpn_loc" (eta of eq. 2); None is 1 for both.
            proposal_scales, group_post_nms_topk: with a count above 0 for (training, test), so many proposals are kept
                of each reference scale (eq. 4), in pixels, after an NMS over all, so that small ones survive;
                `post_nms_topk` then is the limit of all: those of the highest scores. None and 0: the best whatever
                their scale.
        """
        super().__init__()
        if max(group_post_nms_topk) > 0 and not proposal_scales:
            raise ValueError("GROUP_POST_NMS_TOPK needs the reference scales of proposals")
        self.in_features = in_features
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.group_loss = group_loss
        self.box2box_transform = box2box_transform
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.score_thresh = score_thresh
        self.min_box_size = float(min_box_size)
        self.loss_weight = loss_weight or {}
        self.proposal_scales = proposal_scales
        self.group_post_nms_topk = {True: group_post_nms_topk[0], False: group_post_nms_topk[1]}

    @classmethod
    def from_config(cls, cfg, input_shape):
        rpn, gs = cfg.MODEL.RPN, cfg.MODEL.GS
        shapes = [input_shape[name] for name in rpn.IN_FEATURES]
        anchor_generator = build_anchor_generator(cfg, shapes)
        box2box_transform = Box2BoxTransform(weights=rpn.BBOX_REG_WEIGHTS)
        return {
            "in_features": rpn.IN_FEATURES,
            "head": build_rpn_head(cfg, shapes),
            "anchor_generator": anchor_generator,
            "group_loss": GroupLoss.from_config(
                cfg,
                gs,
                anchor_generator.scales,
                iou_thresholds=rpn.IOU_THRESHOLDS,
                iou_labels=rpn.IOU_LABELS,
                batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
                positive_fraction=rpn.POSITIVE_FRACTION,
                box2box_transform=box2box_transform,
                box_reg_loss_type=rpn.BBOX_REG_LOSS_TYPE,
                smooth_l1_beta=rpn.SMOOTH_L1_BETA,
                iou_aware=gs.IOU_AWARE,
            ),
            "box2box_transform": box2box_transform,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "score_thresh": cfg.TEST.GS.SCORE_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "loss_weight": {
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT,
            },
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
            images: B images; only their sizes are used: no anchor whose centre is on padding is a negative.
            features: feature maps by name, each [B, C, Hi, Wi].
            gt_instances: with `gt_boxes`; needed in training.
            ignore_boxes: regions of each image in which no anchor is a negative; None for none.
            with_proposals: False spares a single-stage detector decoding and NMS in training.

        Returns:
            proposals (list[Instances]): by falling score, with `proposal_boxes` (clipped to the image) and
                `objectness_logits` (sigmoid is the face probability); empty list if `with_proposals` is False.
            losses (dict): "loss_rpn_cls" and "loss_rpn_loc" in training, else empty.
        """
        anchors, logits, deltas = self.predict(features)
        losses = {}
        if self.training:
            assert gt_instances is not None, "GroupSamplingRPN needs gt_instances in training"
            gt_boxes = [x.gt_boxes for x in gt_instances]
            losses = self.losses(anchors, logits, deltas, gt_boxes, ignore_boxes, images.image_sizes)
        proposals = []
        if with_proposals:
            proposals = [self._select(x) for x in self._decode(anchors, logits, deltas, images.image_sizes, 0.0)]
            for x in proposals:
                x.remove("anchor_scales")  # Detectron2's ROI heads take no fields that the ground truth has not
        return proposals, losses

    def propose(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """:meth:`forward`'s proposals, which also have `anchor_scales`, in pixels."""
        return [self._select(x) for x in self._decode(*self.predict(features), images.image_sizes, 0.0)]

    @torch.no_grad()
    def _select(self, candidates: Instances) -> Instances:
        boxes, scores = candidates.proposal_boxes.tensor, candidates.objectness_logits
        limit, per_scale = self.post_nms_topk[self.training], self.group_post_nms_topk[self.training]
        if per_scale == 0:
            return candidates[top_nms(boxes, scores, self.nms_thresh, limit)]
        scales = self.proposal_scales
        scale_idxs = group_by_scale(candidates.proposal_boxes.area().sqrt(), scales)
        return candidates[top_nms_of_groups(boxes, scores, self.nms_thresh, limit, scale_idxs, len(scales), per_scale)]

    def predict_candidates(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """What :meth:`forward` proposes before NMS: for detectors that merge several views of an image themselves.

        Args:
            images, features: as :meth:`forward`.

        Returns:
            For each image the boxes of the highest scores, at most PRE_NMS_TOPK, of a probability of at least
            `score_thresh`, with the fields of :meth:`propose`.
        """
        return self._decode(*self.predict(features), images.image_sizes, self.score_thresh)

    def predict(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors [R, 4], logits [B, R, 2] and deltas [B, R, 4], float32 also under autocast."""
        maps = [features[name] for name in self.in_features]
        anchors = Boxes.cat(self.anchor_generator(maps)).tensor
        logits, deltas = self.rpn_head(maps)
        logits = self.anchor_generator.flatten(logits, 2).float()
        deltas = self.anchor_generator.flatten(deltas, 4).float()
        return anchors, logits, deltas

    def losses(
        self,
        anchors: Tensor,
        pred_logits: Tensor,
        pred_deltas: Tensor,
        gt_boxes: list[Boxes],
        ignore_boxes: list[Boxes] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor]:
        """Eq. 2: the sum over groups of the mean losses of each group's samples, averaged over images.

        Args:
            anchors (Tensor[R, 4]), pred_logits (Tensor[B, R, 2]), pred_deltas (Tensor[B, R, 4])
            gt_boxes, ignore_boxes: of each image.
            image_sizes: (height, width) of each image; beyond it is padding, where no anchor is a negative. None: there
                is none.
        """
        matches = self.group_loss.match(anchors, gt_boxes, ignore_boxes, image_sizes)
        face = matches.labels == 1

        def cross_entropy(logits, quality=None):
            targets = face.long() if quality is None else _shares(face * quality)
            return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # [B, R]

        loss_cls, loss_loc = self.group_loss.dense(anchors, matches, pred_logits, pred_deltas, cross_entropy)
        losses = {"loss_rpn_cls": loss_cls, "loss_rpn_loc": loss_loc}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

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


def _shares(face: Tensor) -> Tensor:
    """Target probabilities [B, 2, R] of background and face, from those of face, [B, R]."""
    return torch.stack((1 - face, face), dim=1)
