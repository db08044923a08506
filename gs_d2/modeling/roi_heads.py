"""The second stage of Grouped Fast R-CNN (paper, section 4.2): proposals grouped by reference scale.

Shape shorthand: B images, R proposals of an image (filled up to the most of any), G groups, K classes, S rows:
proposals of all images that the head looks at.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, build_box_head
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from gs_d2.modeling.group_loss import GroupLoss
from gs_d2.modeling.nms import select_detections
from gs_d2.modeling.score_ensemble import ENSEMBLES, class_logits
from gs_d2.unread_keys import OF_ROI_HEADS


class GroupedHeads(nn.Module):
    """A second stage: two-pass matching, group sampling by reference scale (eq. 4), the loss of eq. 2, and a score from
    both stages. Subclasses say how boxes are scored, in :meth:`_predict`.

    The second stage of :class:`GroupedFastRCNN`, or of Detectron2's own ``GeneralizedRCNN``: same call and return as
    Detectron2's ROI heads. With a sampler that needs losses, all proposals are scored once without gradient; only the
    samples are scored again, with gradient.
    """

    unread_keys = OF_ROI_HEADS

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        num_classes: int,
        group_loss: GroupLoss,
        box2box_transform: Box2BoxTransform,
        proposal_append_gt: bool = True,
        loss_weight: dict[str, float] | None = None,
        score_ensemble: str = "arithmetic",
        score_thresh: float = 0.0,
        nms_thresh: float = 0.5,
        max_detections: int = 100,
    ):
        """
        Args:
            in_features: names of the feature maps that boxes are pooled from.
            num_classes: K.
            group_loss: matching, groups, sampler and loss; its `group_scales` are the reference scales.
            box2box_transform: decodes the deltas; the one of `group_loss`.
            proposal_append_gt: in training also propose the ground truth.
            loss_weight: factors of "loss_cls" and "loss_box_reg"; None is 1 for both.
            score_ensemble: "arithmetic" or "geometric" mean of the scores of both stages, or "none": the second's. The
                first stage's is one objectness for all classes: its arithmetic mean with a class that the second stage
                rules out would still be up to 0.5, so with several classes use the geometric one.
            score_thresh: probability below which a detection is dropped.
            nms_thresh: IoU above which the lower-scored of two detections of a class is dropped.
            max_detections: the most detections kept of an image.
        """
        super().__init__()
        if score_ensemble not in ENSEMBLES:
            raise ValueError(f"SCORE_ENSEMBLE must be one of {', '.join(ENSEMBLES)}, got {score_ensemble!r}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.group_loss = group_loss
        self.box2box_transform = box2box_transform
        self.proposal_append_gt = proposal_append_gt
        self.loss_weight = loss_weight or {}
        self.score_ensemble = score_ensemble
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        heads, head, gs = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.GS.ROI
        if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
            raise ValueError(f"{cls.__name__} finds boxes only: set MODEL.MASK_ON and MODEL.KEYPOINT_ON False")
        box2box_transform = Box2BoxTransform(weights=head.BBOX_REG_WEIGHTS)
        return {
            "in_features": heads.IN_FEATURES,
            "num_classes": heads.NUM_CLASSES,
            "group_loss": GroupLoss.from_config(
                cfg,
                gs,
                list(gs.GROUP_SCALES),
                iou_thresholds=heads.IOU_THRESHOLDS,
                batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
                positive_fraction=heads.POSITIVE_FRACTION,
                name="roi_groups",
                box2box_transform=box2box_transform,
                box_reg_loss_type=head.BBOX_REG_LOSS_TYPE,
                smooth_l1_beta=head.SMOOTH_L1_BETA,
            ),
            "box2box_transform": box2box_transform,
            "proposal_append_gt": heads.PROPOSAL_APPEND_GT,
            "loss_weight": {"loss_box_reg": head.BBOX_REG_LOSS_WEIGHT},
            "score_ensemble": gs.SCORE_ENSEMBLE,
            "score_thresh": cfg.TEST.GS.SCORE_THRESH,
            "nms_thresh": heads.NMS_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
        ignore_boxes: list[Boxes] | None = None,
    ):
        """
        Args:
            images: B images; not used.
            features: feature maps by name.
            proposals: for each image `proposal_boxes`; at test also `objectness_logits`, and any other fields, which
                detections keep, too.
            targets: with `gt_boxes` and `gt_classes`; needed in training.
            ignore_boxes: regions of each image in which no proposal is a negative; None for none.

        Returns:
            detections (list[Instances]): at test, by falling score, with `pred_boxes` (clipped), `scores` and
                `pred_classes`: what an NMS within each class leaves of :meth:`predict_candidates`, at most
                `max_detections`; empty list in training.
            losses (dict): "loss_cls" and "loss_box_reg" in training, else empty.
        """
        if self.training:
            assert targets is not None, f"{type(self).__name__} needs targets in training"
            boxes = [x.proposal_boxes for x in proposals]
            return [], self.losses(self._maps(features), boxes, targets, ignore_boxes)
        candidates = self.predict_candidates(features, proposals)
        limits = self.num_classes, self.nms_thresh, self.max_detections
        return [select_detections(x, *limits) for x in candidates], {}

    def _maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        # Detectron2's ROIAlign rounds boxes to the maps' type: in bfloat16 to steps of 8 pixels from 1024 pixels on.
        return [features[name].float() for name in self.in_features]

    def losses(self, maps: list[Tensor], proposals: list[Boxes], targets: list[Instances], ignore_boxes=None) -> dict:
        """Eq. 2 over groups of proposals; arguments as :meth:`forward`."""
        gt_boxes = [x.gt_boxes for x in targets]
        if self.proposal_append_gt:
            proposals = [Boxes.cat([x, gts]) for x, gts in zip(proposals, gt_boxes, strict=True)]
        boxes = nn.utils.rnn.pad_sequence([x.tensor for x in proposals], batch_first=True)  # [B, R, 4]
        num_images, num_boxes = boxes.shape[:2]
        matches = self.group_loss.match(boxes, gt_boxes, ignore_boxes)
        padding = nn.utils.rnn.pad_sequence(
            [torch.zeros(len(x), dtype=torch.bool, device=boxes.device) for x in proposals],
            batch_first=True,
            padding_value=True,
        )
        match_labels = matches.labels.masked_fill(padding, -1)
        gt_classes = F.pad(torch.cat([x.gt_classes for x in targets]), (0, 1), value=self.num_classes)
        classes = torch.where(match_labels == 1, gt_classes[matches.gt_idxs], self.num_classes)
        scale_idxs, group_idxs = self.group_loss.group(boxes)

        def cross_entropy(rows):
            logits, deltas = self._predict(maps, _boxes_of_rows(boxes, rows))
            return F.cross_entropy(logits, classes.flatten()[rows], reduction="none"), deltas

        cls_losses = boxes.new_zeros(num_images, num_boxes)
        if self.group_loss.needs_losses:
            labelled = torch.nonzero(match_labels.flatten() >= 0)[:, 0]
            with torch.no_grad():
                cls_losses.view(-1)[labelled], _ = cross_entropy(labelled)
        sampled_labels = self.group_loss.sample(match_labels, group_idxs, cls_losses, lambda: boxes)

        rows = torch.nonzero(sampled_labels.flatten() >= 0)[:, 0]
        losses_of_samples, deltas = cross_entropy(rows)
        cls_losses.view(-1)[rows] = losses_of_samples.detach()
        self.group_loss.log(scale_idxs, match_labels, sampled_labels, cls_losses)

        group_idxs, counts = self.group_loss.all_groups(group_idxs, num_images)
        sampled_groups, labels_of_samples = group_idxs.flatten()[rows], sampled_labels.flatten()[rows]
        criterion = self.group_loss.criterion
        losses = {
            "loss_cls": criterion.classification(losses_of_samples, labels_of_samples, sampled_groups, **counts),
            "loss_box_reg": criterion.box_regression(
                self._of_class(deltas, classes.flatten()[rows]),
                boxes.view(-1, 4)[rows],
                matches.gt_boxes[matches.gt_idxs.flatten()[rows]],
                labels_of_samples == 1,
                sampled_groups,
                **counts,
            ),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def predict_candidates(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        """What :meth:`forward` detects before NMS: for detectors that merge several views of an image themselves.

        Args:
            features, proposals: as :meth:`forward`.

        Returns:
            For each image the refined proposals, those of a score of at least `score_thresh`, in the proposals'
            order, with the fields of :meth:`forward`'s detections, `logits` of their scores and the proposals' other
            fields.
        """
        boxes = [x.proposal_boxes for x in proposals]
        logits, deltas = self._predict(self._maps(features), boxes)
        second = class_logits(logits)
        refined = self.box2box_transform.apply_deltas(deltas, Boxes.cat(boxes).tensor)
        lengths = [len(x) for x in proposals]
        results = []
        for x, logits, decoded in zip(proposals, second.split(lengths), refined.split(lengths), strict=True):
            logits = ENSEMBLES[self.score_ensemble](x.objectness_logits.float()[:, None], logits)
            scores = logits.sigmoid()
            finite = torch.isfinite(decoded).all(dim=1, keepdim=True) & torch.isfinite(scores)
            kept, classes = torch.nonzero(finite & (scores >= self.score_thresh)).unbind(dim=1)
            detections = x[kept]
            fields = detections.get_fields()
            fields.pop("proposal_boxes"), fields.pop("objectness_logits")
            boxes = Boxes(self._of_class(decoded[kept], classes))
            boxes.clip(x.image_size)
            fields |= {"scores": scores[kept, classes], "logits": logits[kept, classes], "pred_classes": classes}
            detections = Instances(x.image_size, pred_boxes=boxes, **fields)
            results.append(detections[boxes.nonempty()])
        return results

    def _predict(self, maps: list[Tensor], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        """Scores boxes.

        Args:
            maps: float32 feature maps of `in_features`.
            boxes: of each image; S in all.

        Returns:
            float32 logits [S, K + 1], background last, and deltas [S, 4] or [S, 4 K].
        """
        raise NotImplementedError

    def _of_class(self, values: Tensor, classes: Tensor) -> Tensor:
        """Of [S, 4 K] the four of each row's class (the first for background); [S, 4] as it is."""
        if values.shape[1] == 4:
            return values
        return values.view(len(values), values.shape[1] // 4, 4)[
            torch.arange(len(values), device=values.device), classes % self.num_classes
        ]


@ROI_HEADS_REGISTRY.register()
class GroupedROIHeads(GroupedHeads):
    """The paper's second stage: RoIAlign, a head per box, and a score from both stages.

    Parameters are named as those of Detectron2's ``StandardROIHeads``.
    """

    @configurable
    def __init__(self, *, box_pooler: ROIPooler, box_head: nn.Module, box_predictor: nn.Module, **heads):
        """
        Args:
            box_pooler, box_head: as in Detectron2.
            box_predictor: gives logits [S, K + 1], background last, and deltas [S, 4] or [S, 4 K].
            heads: as :class:`GroupedHeads`.
        """
        super().__init__(**heads)
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        heads, head = super().from_config(cfg, input_shape), cfg.MODEL.ROI_BOX_HEAD
        shapes = [input_shape[name] for name in heads["in_features"]]
        resolution = head.POOLER_RESOLUTION
        box_head = build_box_head(cfg, ShapeSpec(channels=shapes[0].channels, height=resolution, width=resolution))
        return {
            **heads,
            "box_pooler": ROIPooler(
                output_size=resolution,
                scales=[1.0 / shape.stride for shape in shapes],
                sampling_ratio=head.POOLER_SAMPLING_RATIO,
                pooler_type=head.POOLER_TYPE,
            ),
            "box_head": box_head,
            "box_predictor": FastRCNNOutputLayers(
                box_head.output_shape,
                box2box_transform=heads["box2box_transform"],
                num_classes=heads["num_classes"],
                cls_agnostic_bbox_reg=head.CLS_AGNOSTIC_BBOX_REG,
            ),
        }

    def _predict(self, maps: list[Tensor], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        pooled = self.box_pooler(maps, boxes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        return logits.float(), deltas.float()


def _boxes_of_rows(boxes: Tensor, rows: Tensor) -> list[Boxes]:
    """Of boxes [B, R, 4] those of rows (int64 Tensor[S], ascending, of all B * R), for each image."""
    counts = torch.bincount(rows // max(boxes.shape[1], 1), minlength=len(boxes)).tolist()
    return [Boxes(x) for x in boxes.view(-1, 4)[rows].split(counts)]
