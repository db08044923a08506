"""Detectors: what Detectron2 builds from MODEL.META_ARCHITECTURE."""

import contextlib
import math

import torch
from detectron2.config import configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    Backbone,
    build_backbone,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from gs_d2.modeling.description import OTHER_SAMPLES, TOO_FEW_DETECTIONS, BreakingDefault, DetectionSettings
from gs_d2.modeling.nms import select_detections
from gs_d2.modeling.roi_heads import GroupedHeads
from gs_d2.unread_keys import OF_ROI_HEADS, OF_RPN_DETECTORS

_OF_FIRST_STAGE = [
    TOO_FEW_DETECTIONS,
    BreakingDefault(
        "MODEL.RPN.PRE_NMS_TOPK_TEST", 6000, "over all scales together it starves small faces; the paper keeps 50000"
    ),
    BreakingDefault(
        "MODEL.RPN.POST_NMS_TOPK_TEST",
        1000,
        "it caps detections before TEST.DETECTIONS_PER_IMAGE does",
        right_for_coco=True,
    ),
    BreakingDefault(
        "MODEL.RPN.IOU_THRESHOLDS", [0.3, 0.7], "the paper's two-pass matching uses [0.4, 0.6]", training_only=True
    ),
    *OTHER_SAMPLES,
]
_NMS_OF_PROPOSALS = BreakingDefault(
    "MODEL.RPN.NMS_THRESH", 0.7, "the paper merges detections at 0.5", right_for_coco=True
)
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
class RPNDetector(nn.Module):
    """A single-stage detector: backbone and proposal generator, whose proposals are the detections.

    Unlike Detectron2's ``ProposalNetwork`` it returns `instances`, so that evaluators, demo and visualisers work.

    Testing in several views of an image (:class:`gs_d2.inference.PyramidDetector`) uses `predict_candidates`,
    `select_detections`, `size_divisibility` and `tile_geometry`; any detector that has these four can be tested so (and
    with `nms_thresh`, TEST.GS.BOX_VOTING too; with `by_scale` and `split_by_scale`, the detections of each scale).

    Attributes:
        by_scale (bool): at test also return `instances_by_scale`; False until somebody sets it, as `Trainer.test` does
            for WIDER FACE. It costs one NMS more for each anchor scale.
        class_agnostic (bool), num_classes_key: see :class:`gs_d2.modeling.description.Description`.
    """

    class_agnostic = True
    num_classes_key = None

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        max_detections: int,
        nms_thresh: float = 0.5,
        channels_last: bool = False,
        autocast_dtype: str = "",
    ):
        """
        Args:
            proposal_generator: as :class:`GroupSamplingRPN`.
            pixel_mean, pixel_std: per channel, in the order of INPUT.FORMAT and its range 0..255.
            max_detections: the most detections kept of an image.
            nms_thresh: IoU above which the lower-scored detection is dropped.
            channels_last: memory order of feature maps and convolutions.
            autocast_dtype: "bfloat16" or "float16", in which convolutions then run; "" leaves it to the caller.
        """
        super().__init__()
        _check_part(self, "PROPOSAL_GENERATOR.NAME", proposal_generator, "predict_candidates")
        if autocast_dtype not in ("", "bfloat16", "float16"):
            raise ValueError(f"AUTOCAST_DTYPE must be bfloat16, float16 or empty, got {autocast_dtype!r}")
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.max_detections = max_detections
        self.nms_thresh = nms_thresh
        self.by_scale = False
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.autocast_dtype = getattr(torch, autocast_dtype) if autocast_dtype else None
        backbone.to(memory_format=self.memory_format)
        proposal_generator.to(memory_format=self.memory_format)

    @classmethod
    def from_config(cls, cfg):
        backbone, settings = build_backbone(cfg), cls.test_settings(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_detections": settings.max_detections,
            "nms_thresh": settings.nms_thresh,
            "channels_last": cfg.MODEL.GS.CHANNELS_LAST,
            "autocast_dtype": cfg.MODEL.GS.AUTOCAST_DTYPE,
        }

    @classmethod
    def test_settings(cls, cfg):
        rpn = cfg.MODEL.RPN
        return DetectionSettings(
            score_thresh=cfg.TEST.GS.SCORE_THRESH,
            before_nms=rpn.PRE_NMS_TOPK_TEST,
            nms_thresh=rpn.NMS_THRESH,
            max_detections=min(rpn.POST_NMS_TOPK_TEST, cfg.TEST.DETECTIONS_PER_IMAGE),
        )

    @classmethod
    def breaking_defaults(cls, cfg):
        return [*_OF_FIRST_STAGE, _NMS_OF_PROPOSALS]

    @classmethod
    def unread_keys(cls, cfg):
        return {
            **OF_RPN_DETECTORS,
            **OF_ROI_HEADS,
            **_unread_by(PROPOSAL_GENERATOR_REGISTRY, cfg.MODEL.PROPOSAL_GENERATOR.NAME),
            **_unread_by(RPN_HEAD_REGISTRY, cfg.MODEL.RPN.HEAD_NAME),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]):
        """
        Args:
            batched_inputs: for each image a dict with `image` (Tensor[3, H, W], 0..255); in training `instances` with
                `gt_boxes`, and optionally `ignore_boxes` (Boxes; an image without has no region to ignore); at test
                optionally `height`, `width`, the size that results are scaled to.

        Returns:
            In training a dict of losses. At test for each image {"instances": Instances} by falling score, with
            `pred_boxes`, `scores` (face probability), `pred_classes` (0) and `group_scales` (the anchor's scale in
            pixels of the network's input). With :attr:`by_scale` also "instances_by_scale": the same fields, scale
            after scale, of what the detector would find with the outputs of that scale alone, at most `max_detections`
            of each.
        """
        if self.training:
            images = self.preprocess_image(batched_inputs)
            gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
            ignore_boxes = None
            if any("ignore_boxes" in x for x in batched_inputs):
                none = Boxes(torch.zeros(0, 4))
                ignore_boxes = [x.get("ignore_boxes", none).to(self.device) for x in batched_inputs]
            with self._autocast():
                return self._losses(images, gt_instances, ignore_boxes)

        results = []
        for candidates, image in zip(self.predict_candidates(batched_inputs), batched_inputs, strict=True):
            height, width = candidates.image_size
            size = image.get("height", height), image.get("width", width)
            result = {"instances": detector_postprocess(self.select_detections(candidates), *size)}
            if self.by_scale:
                detections = Instances.cat([self.select_detections(x) for x in self.split_by_scale(candidates)])
                result["instances_by_scale"] = detector_postprocess(detections, *size)
            results.append(result)
        return results

    @torch.no_grad()
    def predict_candidates(self, batched_inputs: list[dict]) -> list[Instances]:
        """What the detector finds before NMS and TEST.DETECTIONS_PER_IMAGE.

        Args:
            batched_inputs: dicts with `image`, as :meth:`forward`; the model must be in eval mode.

        Returns:
            For each image the candidates of the highest scores, at most RPN.PRE_NMS_TOPK_TEST, with the fields of
            :meth:`forward`'s detections and `logits` of their scores, in pixels of the `image` given.
        """
        images = self.preprocess_image(batched_inputs)
        with self._autocast():
            return self._candidates(images)

    def _losses(self, images: ImageList, gt_instances: list[Instances], ignore_boxes) -> dict:
        features = self.backbone(images.tensor)
        _, losses = self.proposal_generator(images, features, gt_instances, ignore_boxes, with_proposals=False)
        return losses

    def _candidates(self, images: ImageList) -> list[Instances]:
        proposals = self.proposal_generator.predict_candidates(images, self.backbone(images.tensor))
        return [_as_detections(x) for x in proposals]

    def _autocast(self):
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def select_detections(self, candidates: Instances) -> Instances:
        """One NMS over all candidates of an image, from however many views, and the limit of detections.

        Args:
            candidates: with `pred_boxes`, `scores` and `pred_classes`, in any order, and any other fields; on any
                device. Boxes of different classes do not suppress each other. They are ranked by `logits`, which
                keep the order of scores that round to 1; by `scores` where they have none.

        Returns:
            Instances: the detections by falling score, without `logits`; of equal logits the first candidate wins.
        """
        return select_detections(candidates, self.num_classes, self.nms_thresh, self.max_detections)

    @staticmethod
    def split_by_scale(candidates: Instances) -> list[Instances]:
        """The candidates of each anchor scale, whole pixels by `group_scales`, in their order; scales ascend.

        At least one list, which is empty where there is no candidate.
        """
        scales = candidates.group_scales.round()
        return [candidates[scales == scale] for scale in scales.unique()] or [candidates]

    @property
    def num_classes(self) -> int:
        """1: an RPN tells objects from background."""
        return 1

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this many pixels: those that agree in it batch without further padding."""
        return max(self.backbone.size_divisibility, 1)

    @property
    def tile_geometry(self) -> tuple[int, int]:
        """(alignment, reach), in pixels: cut at a multiple of `alignment`, a tile has the anchors that the whole image
        has there; no anchor's side is longer than `reach`."""
        anchors = self.proposal_generator.anchor_generator
        return math.lcm(self.size_divisibility, *anchors.strides), math.ceil(anchors.max_side)

    def normalize(self, image: Tensor) -> Tensor:
        """Pixels 0..255, [..., 3, H, W] in the order of INPUT.FORMAT, as the backbone takes them."""
        return (image - self.pixel_mean) / self.pixel_std

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises, pads to a common size that the backbone divides, and batches."""
        images = [self.normalize(x["image"].to(self.device)) for x in batched_inputs]
        batch = ImageList.from_tensors(images, self.backbone.size_divisibility)
        batch.tensor = batch.tensor.contiguous(memory_format=self.memory_format)
        return batch


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
        _check_part(self, "ROI_HEADS.NAME", roi_heads, "predict_candidates")
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
                    f"seldom small ones: set it to {per_scale * num_scales}"
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
        candidates = self.roi_heads.predict_candidates(features, self.proposal_generator.propose(images, features))
        for x in candidates:
            x.group_scales = x.anchor_scales
            x.remove("anchor_scales")
        return candidates


def has_grouped_heads(name: str) -> bool:
    """Whether the ROI heads of that name are of this project: matched in two passes, sampled by reference scale."""
    heads = ROI_HEADS_REGISTRY.get(name) if name in ROI_HEADS_REGISTRY else None
    return isinstance(heads, type) and issubclass(heads, GroupedHeads)


def _unread_by(registry, name: str) -> dict[str, str]:
    """What the part of that name says that it does not read; {} of a part of somebody else's that says nothing."""
    return getattr(registry.get(name), "unread_keys", {}) if name in registry else {}


def _check_part(detector: nn.Module, key: str, part: nn.Module | None, method: str):
    if not hasattr(part, method):
        raise ValueError(
            f"{type(detector).__name__} needs a part of this project for MODEL.{key}, or another with {method}, and "
            f"{type(part).__name__} has none: set MODEL.META_ARCHITECTURE to the detector that it belongs to, as "
            "Detectron2's GeneralizedRCNN, which takes this project's proposal generator and ROI heads, too"
        )


def _as_detections(proposals: Instances) -> Instances:
    detections = Instances(proposals.image_size)
    detections.pred_boxes = proposals.proposal_boxes
    detections.logits = proposals.objectness_logits
    detections.scores = proposals.objectness_logits.sigmoid()
    detections.pred_classes = torch.zeros_like(detections.scores, dtype=torch.int64)
    detections.group_scales = proposals.anchor_scales
    return detections
