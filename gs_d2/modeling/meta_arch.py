"""Detectors: what Detectron2 builds from MODEL.META_ARCHITECTURE."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_proposal_generator
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import nn


@META_ARCH_REGISTRY.register()
class RPNDetector(nn.Module):
    """A single-stage detector: backbone and proposal generator, whose proposals are the detections.

    Unlike Detectron2's ``ProposalNetwork`` it returns `instances`, so that evaluators, demo and visualisers work.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        max_detections: int,
    ):
        """
        Args:
            proposal_generator: as :class:`GroupSamplingRPN`.
            pixel_mean, pixel_std: per channel, in the order of INPUT.FORMAT and its range 0..255.
            max_detections: the most detections kept of an image.
        """
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.max_detections = max_detections
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]):
        """
        Args:
            batched_inputs: for each image a dict with `image` (Tensor[3, H, W], 0..255); in training `instances` with
                `gt_boxes`, and optionally `ignore_boxes` (Boxes); at test optionally `height`, `width`, the size that
                results are scaled to.

        Returns:
            In training a dict of losses. At test for each image {"instances": Instances} by falling score, with
            `pred_boxes`, `scores` (face probability), `pred_classes` (0) and `group_scales` (the anchor's scale in
            pixels of the network's input).
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.training:
            gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
            ignore_boxes = None
            if "ignore_boxes" in batched_inputs[0]:
                ignore_boxes = [x["ignore_boxes"].to(self.device) for x in batched_inputs]
            _, losses = self.proposal_generator(images, features, gt_instances, ignore_boxes, with_proposals=False)
            return losses

        proposals, _ = self.proposal_generator(images, features)
        results = []
        for proposal, image_size, image in zip(proposals, images.image_sizes, batched_inputs, strict=True):
            detections = _as_detections(proposal[: self.max_detections], image_size)
            size = image.get("height", image_size[0]), image.get("width", image_size[1])
            results.append({"instances": detector_postprocess(detections, *size)})
        return results

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises, pads to a common size that the backbone divides, and batches."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)


def _as_detections(proposals: Instances, image_size) -> Instances:
    detections = Instances(image_size)
    detections.pred_boxes = proposals.proposal_boxes
    detections.scores = proposals.objectness_logits.sigmoid()
    detections.pred_classes = torch.zeros_like(detections.scores, dtype=torch.int64)
    detections.group_scales = proposals.anchor_scales
    return detections
