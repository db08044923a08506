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
from detectron2.utils.events import get_event_storage
from torch import Tensor

from gs_d2.modeling.losses import BOX_REG_LOSS_TYPES, box_regression_loss, group_counts, group_mean_weights
from gs_d2.modeling.matcher import TwoPassMatcher
from gs_d2.modeling.nms import top_nms
from gs_d2.modeling.sampling import GroupSampler, group_by_scale

_LOG_PERIOD = 20  # iterations between two writes of the group statistics, which wait for the GPU


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
        group_scales: list[float],
        box2box_transform: Box2BoxTransform,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float = 0.5,
        score_thresh_test: float = 0.0,
        min_box_size: float = 0.0,
        loss_weight: dict[str, float] | None = None,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
    ):
        """
        Args:
            in_features: names of the feature maps used.
            head: as :class:`SoftmaxRPNHead`.
            anchor_generator: as :class:`ScaleStrideAnchorGenerator`.
            anchor_matcher, sampler: which anchors are positive and negative, and which of them are trained on.
            group_scales: the scales, in pixels, that define the groups; statistics are kept by them even where the
                sampler has a single group.
            box2box_transform: eq. 13.
            pre_nms_topk, post_nms_topk: (training, test) boxes kept before and after NMS, over all feature maps.
            nms_thresh: IoU above which the lower-scored box is dropped.
            score_thresh_test: probability below which a box is dropped at test.
            min_box_size: boxes with a side not above this many pixels are dropped.
            loss_weight: factors of "loss_rpn_cls" and "loss_rpn_loc" (eta of eq. 2); None is 1 for both.
            box_reg_loss_type, smooth_l1_beta: see :func:`box_regression_loss`.
        """
        super().__init__()
        if box_reg_loss_type not in BOX_REG_LOSS_TYPES:
            raise ValueError(
                f"BBOX_REG_LOSS_TYPE must be one of {', '.join(BOX_REG_LOSS_TYPES)}, got {box_reg_loss_type!r}"
            )
        self.in_features = in_features
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.sampler = sampler
        self.group_scales = list(group_scales)
        self.box2box_transform = box2box_transform
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.score_thresh_test = score_thresh_test
        self.min_box_size = float(min_box_size)
        self.loss_weight = loss_weight or {}
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta

    @classmethod
    def from_config(cls, cfg, input_shape):
        rpn, gs = cfg.MODEL.RPN, cfg.MODEL.GS
        shapes = [input_shape[name] for name in rpn.IN_FEATURES]
        anchor_generator = build_anchor_generator(cfg, shapes)
        group_scales = list(gs.GROUP_SCALES) or anchor_generator.scales
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
            "group_scales": group_scales,
            "box2box_transform": Box2BoxTransform(weights=rpn.BBOX_REG_WEIGHTS),
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "score_thresh_test": cfg.TEST.GS.SCORE_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "loss_weight": {
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT,
            },
            "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
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
        anchors, logits, deltas = self._predict(features)
        losses = {}
        if self.training:
            assert gt_instances is not None, "GroupSamplingRPN needs gt_instances in training"
            losses = self.losses(anchors, logits, deltas, [x.gt_boxes for x in gt_instances], ignore_boxes)
        proposals = []
        if with_proposals:
            for candidates in self._decode(anchors, logits, deltas, images.image_sizes):
                boxes, scores = candidates.proposal_boxes.tensor, candidates.objectness_logits
                keep = top_nms(boxes, scores, self.nms_thresh, self.post_nms_topk[self.training])
                proposals.append(candidates[keep])
        return proposals, losses

    def predict_candidates(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """What :meth:`forward` proposes before NMS: for detectors that merge several views of an image themselves.

        Args:
            images, features: as :meth:`forward`.

        Returns:
            For each image the boxes of the highest scores, at most PRE_NMS_TOPK, with the fields of its proposals.
        """
        return self._decode(*self._predict(features), images.image_sizes)

    def _predict(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors [R, 4], logits [B, R, 2] and deltas [B, R, 4], float32 also under autocast."""
        maps = [features[name] for name in self.in_features]
        anchors = Boxes.cat(self.anchor_generator(maps)).tensor
        logits, deltas = self.rpn_head(maps)
        logits = self.anchor_generator.flatten(logits, 2).float()
        deltas = self.anchor_generator.flatten(deltas, 4).float()
        return anchors, logits, deltas

    @torch.no_grad()
    def label_anchors(self, anchors: Tensor, gt_boxes: list[Boxes], ignore_boxes: list[Boxes] | None):
        """Matches a batch in one call.

        Args:
            anchors (Tensor[R, 4]): shared by all images.
            gt_boxes, ignore_boxes: boxes of each image; any number, none included.

        Returns:
            match_labels (int8 Tensor[B, R]): 1, 0 or -1.
            matched_gt_idxs (int64 Tensor[B, R]): row of the matched ground truth in `all_gt_boxes`.
            all_gt_boxes (Tensor[M + 1, 4]): ground truth of all images and a last row of zeros, so that every index
                is valid even without any face.
        """
        all_gts, gt_offsets = _concatenate(gt_boxes, anchors)
        ignores = {}
        if ignore_boxes is not None:
            ignores["ignore_boxes"], ignores["ignore_offsets"] = _concatenate(ignore_boxes, anchors)
        matched_idxs, match_labels, _ = self.anchor_matcher.match(all_gts, anchors, gt_offsets=gt_offsets, **ignores)
        return match_labels, matched_idxs + gt_offsets[:-1, None], F.pad(all_gts, (0, 0, 0, 1))

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
        match_labels, matched_gt_idxs, all_gt_boxes = self.label_anchors(anchors, gt_boxes, ignore_boxes)
        num_groups = self.sampler.num_groups
        scale_idxs, group_idxs = self.group_anchors(anchors)
        cls_losses = F.cross_entropy(
            pred_logits.transpose(1, 2), match_labels.clamp(min=0).long(), reduction="none"
        )  # [B, R]
        sampled_labels = self.sampler(match_labels, group_idxs, cls_losses.detach())

        sampled, positive = sampled_labels >= 0, sampled_labels == 1
        loss_cls = (cls_losses * group_mean_weights(sampled, group_idxs, num_groups)).sum()

        # Positives, gathered into a fixed number of rows (no wait for their count); surplus rows have weight 0.
        num_images, num_anchors = sampled.shape
        rows = torch.nonzero_static(
            positive.flatten(),
            size=min(num_images * self.sampler.max_positives, positive.numel()),
            fill_value=-1,
        )[:, 0]
        valid, rows = rows >= 0, rows.clamp(min=0)
        positive_anchors = anchors[rows % num_anchors]
        targets = torch.where(valid[:, None], all_gt_boxes[matched_gt_idxs.flatten()[rows]], positive_anchors)
        loc_losses = box_regression_loss(
            pred_deltas.flatten(0, 1)[rows],
            positive_anchors,
            targets,
            self.box2box_transform,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        loc_weights = group_mean_weights(positive, group_idxs, num_groups).flatten()[rows] * valid
        loss_loc = (loc_losses * loc_weights).sum()

        self._log_groups(match_labels, sampled_labels, scale_idxs, cls_losses.detach())
        losses = {"loss_rpn_cls": loss_cls, "loss_rpn_loc": loss_loc}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _log_groups(self, match_labels, sampled_labels, scale_idxs, cls_losses):
        """Into TensorBoard, by scale: anchors matched and drawn, per image, and the mean loss of those drawn."""
        storage = get_event_storage()
        if storage.iter % _LOG_PERIOD != 0:
            return
        num_scales = len(self.group_scales)
        statistics = {
            f"groups/{name}": group_counts(mask, scale_idxs, num_scales).mean(dim=0)
            for name, mask in {
                "pos_matched": match_labels == 1,
                "neg_matched": match_labels == 0,
                "pos_sampled": sampled_labels == 1,
                "neg_sampled": sampled_labels == 0,
            }.items()
        }
        weights = group_mean_weights(sampled_labels >= 0, scale_idxs, num_scales)
        statistics["groups/loss_cls"] = weights.new_zeros(num_scales).scatter_add_(
            0, scale_idxs, (cls_losses * weights).sum(dim=0)
        )
        values = torch.stack(list(statistics.values())).tolist()
        for name, row in zip(statistics, values, strict=True):
            for scale, value in zip(self.group_scales, row, strict=True):
                storage.put_scalar(f"{name}@{scale:g}", value, smoothing_hint=False)

    @torch.no_grad()
    def _decode(
        self, anchors: Tensor, pred_logits: Tensor, pred_deltas: Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """The best boxes of each image: top-k by score, decode, clip, drop small and improbable ones."""
        objectness = pred_logits[..., 1] - pred_logits[..., 0]
        min_logit = _logit(self.score_thresh_test) if not self.training else -float("inf")
        results = []
        for scores, deltas, image_size in zip(objectness.detach(), pred_deltas.detach(), image_sizes, strict=True):
            # What a diverged model predicts is dropped here; in training its loss stops the run.
            scores = scores.nan_to_num(nan=-float("inf"))
            scores, idxs = scores.topk(min(self.pre_nms_topk[self.training], len(scores)))
            boxes = self.box2box_transform.apply_deltas(deltas[idxs], anchors[idxs])
            finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
            boxes = Boxes(torch.where(finite[:, None], boxes, torch.zeros_like(boxes)))
            boxes.clip(image_size)
            keep = finite & boxes.nonempty(self.min_box_size) & (scores >= min_logit)
            candidates = Instances(image_size)
            candidates.proposal_boxes = boxes[keep]
            candidates.objectness_logits = scores[keep]
            candidates.anchor_scales = Boxes(anchors[idxs[keep]]).area().sqrt()
            results.append(candidates)
        return results


def _concatenate(boxes: list[Boxes], like: Tensor) -> tuple[Tensor, Tensor]:
    """All boxes [M, 4] one after another, and where each image's begin: int64 [B + 1]."""
    offsets = torch.tensor([0] + [len(x) for x in boxes]).cumsum(0)
    if like.is_cuda:
        offsets = offsets.pin_memory()
    return torch.cat([x.tensor for x in boxes]), offsets.to(like.device, non_blocking=True)


def _logit(probability: float) -> float:
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
