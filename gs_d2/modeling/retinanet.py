"""RetinaNet trained by group sampling (paper, section 6.2, Tables 9b and 12).

Shape shorthand: B images, R anchors of an image over all feature maps, K classes.
"""

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from gs_d2.modeling.box_detector import BoxDetector
from gs_d2.modeling.decoding import logit
from gs_d2.modeling.description import OTHER_SAMPLES, TOO_FEW_DETECTIONS, DetectionSettings
from gs_d2.modeling.group_loss import GroupLoss
from gs_d2.modeling.gt_classes import check_gt_classes
from gs_d2.modeling.matcher import Matches
from gs_d2.modeling.rpn_heads import DilatedRPNHead
from gs_d2.unread_keys import OF_DETECTORS, OF_ROI_HEADS, OF_RPN, OF_RPN_HEADS

_REACH_OF_HEAD = 8  # cells of the coarsest map: four 3x3 convolutions and the predictor's, and those of P6 and P7


@META_ARCH_REGISTRY.register()
class GroupSamplingRetinaNet(BoxDetector):
    """RetinaNet with two-pass matching, group sampling and the loss of eq. 2; head and decoding are Detectron2's.

    But detections are ranked by their logits: the probability of every logit above 17 is exactly 1.

    Each class has a cross entropy of its own (sigmoid); a sample's loss, which OHEM and WRS go by, is their sum. With
    focal loss and no sampling the loss is Detectron2's, but for its normalisation: by the positives of each image,
    where Detectron2 takes a moving average over iterations of those of the batch.
    """

    class_agnostic = False
    num_classes_key = "MODEL.RETINANET.NUM_CLASSES"

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        head: nn.Module,
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        group_loss: GroupLoss,
        num_classes: int,
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        **detector,
    ):
        """
        Args:
            in_features: names of the feature maps used.
            head: as Detectron2's RetinaNetHead, or :class:`DilatedRPNHead` with a logit for each class.
            anchor_generator: as :class:`ScaleStrideAnchorGenerator`, every anchor at its map's own stride.
            box2box_transform: eq. 13.
            group_loss: which anchors are trained on, and what they cost.
            num_classes: K.
            score_thresh: probability below which a detection is dropped.
            topk_candidates: boxes of each feature map that enter NMS.
            detector: as :class:`BoxDetector`.
        """
        super().__init__(**detector)
        self.in_features = in_features
        self.head = self._prepare(head)
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.group_loss = group_loss
        self._num_classes = num_classes
        self.score_thresh = score_thresh
        self.topk_candidates = topk_candidates

    @classmethod
    def from_config(cls, cfg):
        keys, gs = cfg.MODEL.RETINANET, cfg.MODEL.GS
        if gs.ANCHOR_STRIDES:
            raise ValueError(
                "GroupSamplingRetinaNet has every anchor at its map's own stride: set MODEL.GS.ANCHOR_STRIDES []"
            )
        detector = super().from_config(cfg)
        shapes = detector["backbone"].output_shape()
        shapes = [shapes[name] for name in keys.IN_FEATURES]
        if gs.RETINANET_DILATED_HEAD:
            head = DilatedRPNHead(**DilatedRPNHead.from_config(cfg, shapes), num_logits=keys.NUM_CLASSES)
            for layer in head.objectness_logits:
                nn.init.constant_(layer.bias, -math.log((1 - keys.PRIOR_PROB) / keys.PRIOR_PROB))
        else:
            head = RetinaNetHead(cfg, shapes)
        box2box_transform = Box2BoxTransform(weights=keys.BBOX_REG_WEIGHTS)
        anchor_scales = sorted({float(size) for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES for size in sizes})
        return {
            **detector,
            "in_features": keys.IN_FEATURES,
            "head": head,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": box2box_transform,
            "num_classes": keys.NUM_CLASSES,
            "score_thresh": cls.test_settings(cfg).score_thresh,
            "topk_candidates": keys.TOPK_CANDIDATES_TEST,
            "group_loss": GroupLoss.from_config(
                cfg,
                gs,
                anchor_scales,
                iou_thresholds=keys.IOU_THRESHOLDS,
                iou_labels=keys.IOU_LABELS,
                batch_size_per_image=cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
                positive_fraction=cfg.MODEL.RPN.POSITIVE_FRACTION,
                box2box_transform=box2box_transform,
                box_reg_loss_type=keys.BBOX_REG_LOSS_TYPE,
                smooth_l1_beta=keys.SMOOTH_L1_LOSS_BETA,
                iou_aware=gs.IOU_AWARE,
            ),
        }

    @classmethod
    def test_settings(cls, cfg):
        keys = cfg.MODEL.RETINANET
        return DetectionSettings(
            score_thresh=keys.SCORE_THRESH_TEST,
            before_nms=f"{keys.TOPK_CANDIDATES_TEST} of each feature map",
            nms_thresh=keys.NMS_THRESH_TEST,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )

    @classmethod
    def breaking_defaults(cls, cfg):
        return [TOO_FEW_DETECTIONS, *OTHER_SAMPLES]

    @classmethod
    def unread_keys(cls, cfg):
        return {
            **OF_DETECTORS,
            **OF_RPN,
            **OF_RPN_HEADS,
            **OF_ROI_HEADS,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "use MODEL.RETINANET.SCORE_THRESH_TEST",
        }

    @property
    def num_classes(self) -> int:
        return self._num_classes

    @property
    def max_candidates(self) -> int:
        """The most candidates of an image, of all feature maps together."""
        return self.topk_candidates * len(self.in_features)

    @property
    def tile_geometry(self) -> tuple[int, int]:
        cells = self.anchor_generator([torch.zeros(1, 1, 1, 1, device=self.device) for _ in self.in_features])
        sides = torch.cat([boxes.tensor[:, 2:] - boxes.tensor[:, :2] for boxes in cells])
        strides = self.anchor_generator.strides
        reach = math.ceil(float(sides.max())) + _REACH_OF_HEAD * max(strides)
        return math.lcm(self.size_divisibility, *strides), reach

    def forward(self, batched_inputs: list[dict]):
        """As :class:`BoxDetector`'s, with `gt_classes` among the `instances`.

        Raises:
            ValueError: an object is of a class that the detector does not have.
        """
        if self.training:
            check_gt_classes(batched_inputs, self.num_classes, self.num_classes_key)
        return super().forward(batched_inputs)

    def predict(self, images: ImageList) -> tuple[list[Boxes], list[Tensor], list[Tensor]]:
        """Of each feature map anchors, logits [B, Hi Wi Ai, K] and deltas [B, Hi Wi Ai, 4], float32 with autocast."""
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.in_features]
        logits, deltas = self.head(features)
        logits = [permute_to_N_HWA_K(x, self.num_classes).float() for x in logits]
        deltas = [permute_to_N_HWA_K(x, 4).float() for x in deltas]
        return self.anchor_generator(features), logits, deltas

    def _losses(self, images: ImageList, gt_instances: list[Instances], ignore_boxes) -> dict:
        anchors, logits, deltas = self.predict(images)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances, ignore_boxes)
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes)

    def _candidates(self, images: ImageList) -> list[Instances]:
        return self.decode(*self.predict(images), images.image_sizes)

    def decode(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """
        Args:
            anchors: of each feature map.
            pred_logits, pred_anchor_deltas: of each feature map, [B, Hi Wi Ai, K] and [B, Hi Wi Ai, 4].

        Returns:
            For each image `pred_boxes` (not clipped), `scores`, `logits` and `pred_classes` of the best
            TOPK_CANDIDATES_TEST boxes of each map, map after map, by falling score.
        """
        results = []
        for i, image_size in enumerate(image_sizes):
            maps = zip(anchors, pred_logits, pred_anchor_deltas, strict=True)
            results.append(Instances.cat([self._best_of_map(x, y[i], z[i], image_size) for x, y, z in maps]))
        return results

    def _best_of_map(self, anchors: Boxes, logits: Tensor, deltas: Tensor, image_size: tuple[int, int]) -> Instances:
        logits = logits.flatten()
        rows = torch.nonzero(logits > logit(self.score_thresh))[:, 0]
        rows = rows[logits[rows].sort(descending=True, stable=True).indices[: self.topk_candidates]]
        anchor_idxs = rows // self.num_classes
        boxes = self.box2box_transform.apply_deltas(deltas[anchor_idxs], anchors.tensor[anchor_idxs])
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes),
            scores=logits[rows].sigmoid(),
            logits=logits[rows],
            pred_classes=rows % self.num_classes,
        )

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances], ignore_boxes: list[Boxes] | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            anchors: of each feature map.
            gt_instances: with `gt_boxes` and `gt_classes`. Beyond their `image_size` is padding, where no anchor is a
                negative.
            ignore_boxes: regions of each image in which no anchor is a negative; None for none.

        Returns:
            gt_labels (int64 Tensor[B, R]): the class, K for background, -1 for ignored anchors.
            gt_boxes (Tensor[B, R, 4]): the box matched to each anchor; anything where it is not positive.
        """
        matches = self.group_loss.match(
            Boxes.cat(anchors).tensor,
            [x.gt_boxes for x in gt_instances],
            ignore_boxes,
            [x.image_size for x in gt_instances],
        )
        gt_classes = F.pad(torch.cat([x.gt_classes for x in gt_instances]), (0, 1))
        gt_labels = torch.where(matches.labels == 1, gt_classes[matches.gt_idxs], self.num_classes)
        return gt_labels.masked_fill(matches.labels == -1, -1), matches.gt_boxes[matches.gt_idxs]

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: Tensor,
        pred_anchor_deltas: list[Tensor],
        gt_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Eq. 2, in float32.

        Args:
            anchors: of each feature map.
            pred_logits, pred_anchor_deltas: of each feature map, [B, Hi Wi Ai, K] and [B, Hi Wi Ai, 4].
            gt_labels, gt_boxes: of :meth:`label_anchors`, or of Detectron2's.

        Returns:
            "loss_cls" and "loss_box_reg".
        """
        gt_labels, gt_boxes = torch.stack(list(gt_labels)), torch.stack(list(gt_boxes))
        targets = gt_labels[..., None] == torch.arange(self.num_classes, device=gt_labels.device)
        match_labels = targets.any(dim=-1).to(torch.int8).masked_fill(gt_labels == -1, -1)
        rows = torch.arange(gt_labels.numel(), device=gt_labels.device).view_as(gt_labels)

        def cross_entropy(logits, quality=None):
            present = targets.to(logits.dtype) if quality is None else targets * quality[..., None]
            return F.binary_cross_entropy_with_logits(logits, present, reduction="none")

        loss_cls, loss_box_reg = self.group_loss.dense(
            Boxes.cat(anchors).tensor,
            Matches(match_labels, rows, gt_boxes.flatten(0, 1)),
            torch.cat(pred_logits, dim=1).float(),
            torch.cat(pred_anchor_deltas, dim=1).float(),
            cross_entropy,
            targets,
        )
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}
