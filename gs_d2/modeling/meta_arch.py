"""Detectors: what Detectron2 builds from MODEL.META_ARCHITECTURE."""

import math

import torch
from detectron2.config import configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import nn

from gs_d2.modeling.box_detector import BoxDetector
from gs_d2.modeling.description import (
    DETECTION_LIMITS,
    LOOSE_NMS,
    OTHER_SAMPLES,
    BreakingDefault,
    DetectionSettings,
)
from gs_d2.modeling.roi_heads import GroupedHeads
from gs_d2.unread_keys import OF_DETECTORS, OF_ROI_HEADS

_OF_FIRST_STAGE = [
    *DETECTION_LIMITS,
    BreakingDefault(
        "MODEL.RPN.IOU_THRESHOLDS", [0.3, 0.7], "the paper's two-pass matching uses [0.4, 0.6]", training_only=True
    ),
    *OTHER_SAMPLES,
]
_OF_SECOND_STAGE = [
    BreakingDefault(
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
        12000,
        "over all scales together it starves small proposals, and the second stage of samples; use 50000 as at test",
        training_only=True,
    ),
    BreakingDefault(
        "MODEL.RPN.POST_NMS_TOPK_TRAIN",
        2000,
        "the second stage samples from these; use 4000, 1000 of each scale",
        training_only=True,
    ),
    BreakingDefault("MODEL.ROI_HEADS.NUM_CLASSES", 80, "these are COCO's; faces are 1 class", right_for_coco=True),
]
_ONE_THRESHOLD = BreakingDefault(
    "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.5], "two-pass matching needs [low, high]; the paper uses [0.5, 0.6]"
)


@META_ARCH_REGISTRY.register()
class RPNDetector(BoxDetector):
    """A single-stage detector: backbone and proposal generator, whose proposals are the detections.

    Unlike Detectron2's ``ProposalNetwork`` it returns `instances`, so that evaluators, demo and visualisers work. They
    also have `anchor_scales`: the anchor's scale in pixels of the network's input.

    Attributes:
        by_scale (bool): at test also return "instances_by_scale": the same fields, scale after scale, of what the
            detector would find with the outputs of that scale alone, at most `max_detections` of each. False until
            somebody sets it, as `Trainer.test` does for WIDER FACE. It costs one NMS more for each anchor scale.
    """

    @configurable
    def __init__(self, *, proposal_generator: nn.Module, **detector):
        """
        Args:
            proposal_generator: as :class:`GroupSamplingRPN`.
            detector: as :class:`BoxDetector`.
        """
        _check_part(type(self), "PROPOSAL_GENERATOR.NAME", proposal_generator, "predict_candidates")
        super().__init__(**detector)
        self.proposal_generator = proposal_generator.to(memory_format=self.memory_format)
        if hasattr(proposal_generator, "rpn_head"):  # somebody else's may have none
            self._prepare(proposal_generator.rpn_head)
        self.by_scale = False

    @classmethod
    def from_config(cls, cfg):
        detector = super().from_config(cfg)
        generator = build_proposal_generator(cfg, detector["backbone"].output_shape())
        return {**detector, "proposal_generator": generator}

    @classmethod
    def breaking_defaults(cls, cfg):
        return [*_OF_FIRST_STAGE, LOOSE_NMS]

    @classmethod
    def unread_keys(cls, cfg):
        return {
            **OF_DETECTORS,
            **OF_ROI_HEADS,
            **_unread_by(PROPOSAL_GENERATOR_REGISTRY, cfg.MODEL.PROPOSAL_GENERATOR.NAME),
            **_unread_by(RPN_HEAD_REGISTRY, cfg.MODEL.RPN.HEAD_NAME),
        }

    def _result(self, candidates: Instances, size: tuple[int, int]) -> dict[str, Instances]:
        result = super()._result(candidates, size)
        if self.by_scale:
            detections = Instances.cat([self.select_detections(x) for x in self.split_by_scale(candidates)])
            result["instances_by_scale"] = detector_postprocess(detections, *size)
        return result

    def _losses(self, images: ImageList, gt_instances: list[Instances], ignore_boxes) -> dict:
        features = self.backbone(images.tensor)
        _, losses = self.proposal_generator(images, features, gt_instances, ignore_boxes, with_proposals=False)
        return losses

    def _candidates(self, images: ImageList) -> list[Instances]:
        proposals = self.proposal_generator.predict_candidates(images, self.backbone(images.tensor))
        return [_as_detections(x) for x in proposals]

    @staticmethod
    def split_by_scale(candidates: Instances) -> list[Instances]:
        """The candidates of each anchor scale, whole pixels by `anchor_scales`, in their order; scales ascend.

        At least one list, which is empty where there is no candidate.
        """
        scales = candidates.anchor_scales.round()
        return [candidates[scales == scale] for scale in scales.unique()] or [candidates]

    @property
    def tile_geometry(self) -> tuple[int, int]:
        """(alignment, reach), in pixels: cut at a multiple of `alignment`, a tile has the anchors that the whole image
        has there; no anchor's side is longer than `reach`."""
        anchors = self.proposal_generator.anchor_generator
        return math.lcm(self.size_divisibility, *anchors.strides), math.ceil(anchors.max_side)


@META_ARCH_REGISTRY.register()
class GroupedFastRCNN(RPNDetector):
    """The paper's two-stage detector: proposals of every scale, scored and refined by :class:`GroupedROIHeads`.

    Takes and returns what :class:`RPNDetector` does; `scores` are of both stages, `pred_classes` of the second, and
    `nms_thresh` is of the second's detections, within each class. On a pyramid each level runs both stages.
    """

    class_agnostic = False
    num_classes_key = "MODEL.ROI_HEADS.NUM_CLASSES"

    @configurable
    def __init__(self, *, roi_heads: nn.Module, **detector):
        """
        Args:
            roi_heads: as :class:`GroupedROIHeads`.
            detector: as :class:`RPNDetector`.
        """
        super().__init__(**detector)
        _check_part(type(self), "ROI_HEADS.NAME", roi_heads, "predict_candidates")
        self.roi_heads = roi_heads

    @classmethod
    def from_config(cls, cfg):
        detector = super().from_config(cfg)
        return {
            **detector,
            "roi_heads": build_roi_heads(cfg, detector["backbone"].output_shape()),
        }

    @classmethod
    def test_settings(cls, cfg):
        per_scale = cfg.MODEL.GS.GROUP_POST_NMS_TOPK_TEST
        proposals = f"{cfg.MODEL.RPN.POST_NMS_TOPK_TEST} proposals"
        return DetectionSettings(
            score_thresh=cfg.TEST.GS.SCORE_THRESH,
            before_nms=proposals + (f", {per_scale} per reference scale" if per_scale else ""),
            nms_thresh=cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,  # the RPN's own NMS is of proposals
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )

    @classmethod
    def breaking_defaults(cls, cfg):
        of_heads = [_ONE_THRESHOLD] if has_grouped_heads(cfg.MODEL.ROI_HEADS.NAME) else []
        return [*_OF_FIRST_STAGE, *_OF_SECOND_STAGE, *of_heads]

    @classmethod
    def unread_keys(cls, cfg):
        of_first_stage = {key: hint for key, hint in super().unread_keys(cfg).items() if key not in OF_ROI_HEADS}
        return {**of_first_stage, **_unread_by(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME)}

    @classmethod
    def contradictions(cls, cfg, training):
        """Counts of proposals by which the second stage's group sampling would come to nothing."""
        gs, num_samples, found = cfg.MODEL.GS, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, []
        num_scales = len(gs.ROI.GROUP_SCALES)
        for phase in ("TRAIN", "TEST") if training else ("TEST",):
            per_scale, limit = gs[f"GROUP_POST_NMS_TOPK_{phase}"], cfg.MODEL.RPN[f"POST_NMS_TOPK_{phase}"]
            if per_scale * num_scales > limit:
                found.append(
                    f"MODEL.GS.GROUP_POST_NMS_TOPK_{phase} {per_scale} of each of {num_scales} reference scales is "
                    f"more than MODEL.RPN.POST_NMS_TOPK_{phase} {limit}, which keeps those of the highest scores, "
                    f"rarely small ones: set it to {per_scale * num_scales}"
                )
        grouped = gs.ROI.GROUP_SAMPLING and gs.ROI.SAMPLER != "none" and has_grouped_heads(cfg.MODEL.ROI_HEADS.NAME)
        if training and grouped and 0 < gs.GROUP_POST_NMS_TOPK_TRAIN <= num_samples:
            found.append(
                f"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE {num_samples} samples of each reference scale are all of its "
                f"MODEL.GS.GROUP_POST_NMS_TOPK_TRAIN {gs.GROUP_POST_NMS_TOPK_TRAIN} proposals, so that every sampler "
                "takes the same: lower the first (the configs have 128), or raise the second (1000)"
            )
        return found

    @property
    def num_classes(self) -> int:
        return self.roi_heads.num_classes

    def _losses(self, images: ImageList, gt_instances: list[Instances], ignore_boxes) -> dict:
        features = self.backbone(images.tensor)
        proposals, rpn_losses = self.proposal_generator(images, features, gt_instances, ignore_boxes)
        _, losses = self.roi_heads(images, features, proposals, gt_instances, ignore_boxes)
        return {**rpn_losses, **losses}

    def _candidates(self, images: ImageList) -> list[Instances]:
        features = self.backbone(images.tensor)
        return self.roi_heads.predict_candidates(features, self.proposal_generator.propose(images, features))


def has_grouped_heads(name: str) -> bool:
    """Whether the ROI heads of that name are of this project: matched in two passes, sampled by reference scale."""
    heads = ROI_HEADS_REGISTRY.get(name) if name in ROI_HEADS_REGISTRY else None
    return isinstance(heads, type) and issubclass(heads, GroupedHeads)


def _unread_by(registry, name: str) -> dict[str, str]:
    """What the part of that name says that it does not read; {} of a part of somebody else's that says nothing."""
    return getattr(registry.get(name), "unread_keys", {}) if name in registry else {}


def _check_part(detector: type, key: str, part: nn.Module | None, method: str):
    if not hasattr(part, method):
        raise ValueError(
            f"{detector.__name__} needs a part of this project for MODEL.{key}, or another with {method}, and "
            f"{type(part).__name__} has none: set MODEL.META_ARCHITECTURE to the detector that it belongs to, as "
            "Detectron2's GeneralizedRCNN, which takes this project's proposal generator and ROI heads, too"
        )


def _as_detections(proposals: Instances) -> Instances:
    detections = Instances(proposals.image_size)
    detections.pred_boxes = proposals.proposal_boxes
    detections.logits = proposals.objectness_logits
    detections.scores = proposals.objectness_logits.sigmoid()
    detections.pred_classes = torch.zeros_like(detections.scores, dtype=torch.int64)
    detections.anchor_scales = proposals.anchor_scales
    return detections
