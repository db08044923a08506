"""RetinaNet trained by group sampling (paper, section 6.2, Tables 9b and 12).

Shape shorthand: B images, R anchors of an image over all feature maps, K classes.
"""

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from gs_d2.modeling.description import OTHER_SAMPLES, TOO_FEW_DETECTIONS, DetectionSettings
from gs_d2.modeling.group_loss import GroupLoss
from gs_d2.modeling.gt_classes import check_gt_classes
from gs_d2.modeling.matcher import Matches
from gs_d2.modeling.nms import select_detections
from gs_d2.modeling.rpn_heads import DilatedRPNHead
from gs_d2.unread_keys import OF_DETECTORS, OF_ROI_HEADS, OF_RPN, OF_RPN_HEADS


@META_ARCH_REGISTRY.register()
class GroupSamplingRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with two-pass matching, group sampling and the loss of eq. 2; the rest is Detectron2's.

    But detections are ranked by their logits: the probability of every logit above 17 is exactly 1.

    Each class has a cross entropy of its own (sigmoid); a sample's loss, which OHEM and WRS go by, is their sum. With
    focal loss and no sampling the loss is Detectron2's, but for its normalisation: by the positives of each image,
    where Detectron2 takes a moving average over iterations of those of the batch.
    """

    num_classes_key = "MODEL.RETINANET.NUM_CLASSES"

    @configurable
    def __init__(self, *, group_loss: GroupLoss, **retinanet):
        """
        Args:
            group_loss: which anchors are trained on, and what they cost.
            retinanet: as Detectron2's class; its `anchor_matcher` and the parameters of its loss are not used.
        """
        super().__init__(**retinanet)
        self.group_loss = group_loss

    @classmethod
    def from_config(cls, cfg):
        keys, gs, settings = cfg.MODEL.RETINANET, cfg.MODEL.GS, cls.test_settings(cfg)
        if gs.ANCHOR_STRIDES:
            raise ValueError(
                "GroupSamplingRetinaNet has every anchor at its map's own stride: set MODEL.GS.ANCHOR_STRIDES []"
            )
        if gs.AUTOCAST_DTYPE:
            raise ValueError(
                "MODEL.GS.AUTOCAST_DTYPE does nothing in GroupSamplingRetinaNet: "
                'set it "" and, on a GPU, SOLVER.AMP.ENABLED True'
            )
        retinanet = super().from_config(cfg)
        if gs.RETINANET_DILATED_HEAD:
            shapes = retinanet["backbone"].output_shape()
            arguments = DilatedRPNHead.from_config(cfg, [shapes[name] for name in keys.IN_FEATURES])
            retinanet["head"] = DilatedRPNHead(**arguments, num_logits=keys.NUM_CLASSES)
            for layer in retinanet["head"].objectness_logits:
                nn.init.constant_(layer.bias, -math.log((1 - keys.PRIOR_PROB) / keys.PRIOR_PROB))
        anchor_scales = sorted({float(size) for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES for size in sizes})
        return {
            **retinanet,
            "test_score_thresh": settings.score_thresh,
            "test_nms_thresh": settings.nms_thresh,
            "max_detections_per_image": settings.max_detections,
            "group_loss": GroupLoss.from_config(
                cfg,
                gs,
                anchor_scales,
                iou_thresholds=keys.IOU_THRESHOLDS,
                iou_labels=keys.IOU_LABELS,
                batch_size_per_image=cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
                positive_fraction=cfg.MODEL.RPN.POSITIVE_FRACTION,
                box2box_transform=Box2BoxTransform(weights=keys.BBOX_REG_WEIGHTS),
                box_reg_loss_type=keys.BBOX_REG_LOSS_TYPE,
                smooth_l1_beta=keys.SMOOTH_L1_LOSS_BETA,
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
            "MODEL.GS.CHANNELS_LAST": "its feature maps keep PyTorch's own memory order",
        }

    def forward(self, batched_inputs: list[dict]):
        """As Detectron2's; in training each image's dict may have `ignore_boxes` (Boxes), regions in which no anchor is
        a negative.

        Raises:
            ValueError: an object is of a class that the detector does not have.
        """
        if self.training:
            check_gt_classes(batched_inputs, self.num_classes, self.num_classes_key)
            batched_inputs = [_with_ignore_boxes(x) for x in batched_inputs]
        return super().forward(batched_inputs)

    def visualize_training(self, batched_inputs: list[dict], results: list[Instances]):
        """As Detectron2's (VIS_PERIOD, where its version has that), without regions to ignore among the objects."""
        objects = [{**x, "instances": x["instances"][: x["instances"].gt_ignore.count(False)]} for x in batched_inputs]
        super().visualize_training(objects, results)

    def forward_inference(self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]):
        """What Detectron2 after 0.5 calls at test; 0.5 calls :meth:`inference`."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        return self.inference(self.anchor_generator(features), logits, deltas, images.image_sizes)

    def inference(
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
            For each image `pred_boxes` (not clipped), `scores` and `pred_classes` by falling score: what NMS within
            each class leaves of the best TOPK_CANDIDATES_TEST boxes of each map.
        """
        results = []
        for i, image_size in enumerate(image_sizes):
            maps = zip(anchors, pred_logits, pred_anchor_deltas, strict=True)
            candidates = Instances.cat([self._best_of_map(x, y[i], z[i], image_size) for x, y, z in maps])
            limits = self.num_classes, self.test_nms_thresh, self.max_detections_per_image
            results.append(select_detections(candidates, *limits))
        return results

    def _best_of_map(self, anchors: Boxes, logits: Tensor, deltas: Tensor, image_size: tuple[int, int]) -> Instances:
        logits = logits.flatten().float()
        scores = logits.sigmoid()
        rows = torch.nonzero(scores > self.test_score_thresh)[:, 0]
        rows = rows[logits[rows].sort(descending=True, stable=True).indices[: self.test_topk_candidates]]
        anchor_idxs = rows // self.num_classes
        boxes = self.box2box_transform.apply_deltas(deltas[anchor_idxs], anchors.tensor[anchor_idxs])
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes),
            scores=scores[rows],
            logits=logits[rows],
            pred_classes=rows % self.num_classes,
        )

    @torch.no_grad()
    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]) -> tuple[Tensor, Tensor]:
        """
        Args:
            anchors: of each feature map.
            gt_instances: with `gt_boxes` and `gt_classes`, and optionally `gt_ignore` (list[bool], on the host so that
                nothing waits for a GPU): regions to ignore, at the end. Beyond their `image_size` is padding, where no
                anchor is a negative.

        Returns:
            gt_labels (int64 Tensor[B, R]): the class, K for background, -1 for ignored anchors.
            gt_boxes (Tensor[B, R, 4]): the box matched to each anchor; anything where it is not positive.
        """
        counts = [x.gt_ignore.count(False) if x.has("gt_ignore") else len(x) for x in gt_instances]
        objects = [x[:count] for x, count in zip(gt_instances, counts, strict=True)]
        ignore_boxes = [x.gt_boxes[count:] for x, count in zip(gt_instances, counts, strict=True)]
        matches = self.group_loss.match(
            Boxes.cat(anchors).tensor,
            [x.gt_boxes for x in objects],
            ignore_boxes,
            [x.image_size for x in objects],
        )
        gt_classes = F.pad(torch.cat([x.gt_classes for x in objects]), (0, 1))
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

        def cross_entropy(logits):
            return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")

        loss_cls, loss_box_reg = self.group_loss.dense(
            Boxes.cat(anchors).tensor,
            Matches(match_labels, rows, gt_boxes.flatten(0, 1)),
            torch.cat(pred_logits, dim=1).float(),
            torch.cat(pred_anchor_deltas, dim=1).float(),
            cross_entropy,
            targets,
        )
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}


def _with_ignore_boxes(image: dict) -> dict:
    """The image's dict with its `ignore_boxes` among its instances: Detectron2's RetinaNet passes nothing else on."""
    instances = image["instances"]
    ignore_boxes = image.get("ignore_boxes", Boxes(instances.gt_boxes.tensor[:0]))
    merged = Instances(
        instances.image_size,
        gt_boxes=Boxes.cat([instances.gt_boxes, ignore_boxes]),
        gt_classes=torch.cat([instances.gt_classes, instances.gt_classes.new_full((len(ignore_boxes),), -1)]),
    )
    merged.gt_ignore = [False] * len(instances) + [True] * len(ignore_boxes)
    return {**image, "instances": merged}
