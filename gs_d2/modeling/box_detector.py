"""What detectors of boxes share, with anchors or without: images in, losses or detections out."""

import contextlib

import torch
from detectron2.modeling import Backbone, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from gs_d2.modeling.description import DetectionSettings
from gs_d2.modeling.nms import select_detections


class BoxDetector(nn.Module):
    """A backbone, and around it what no detector does in a way of its own: images, number formats, one NMS.

    A detector derives from it, and has:

    - `_losses(images, gt_instances, ignore_boxes)`: a dict of losses.
    - `_candidates(images)`: for each image Instances with `pred_boxes`, `scores`, `pred_classes`, `logits` of the
      scores and any other fields, before NMS.
    - `tile_geometry` (property): (alignment, reach), in pixels. Cut at a multiple of `alignment`, a tile is seen as the
      whole image is there; it needs `reach` more pixels around it than half the receptive field of a ResNet-50.
    - what it says of itself, see :class:`gs_d2.modeling.description.Description`; `test_settings` here reads
      TEST.GS.SCORE_THRESH, TEST.DETECTIONS_PER_IMAGE, MODEL.RPN.NMS_THRESH and MODEL.RPN.{PRE,POST}_NMS_TOPK_TEST.

    Testing in several views of an image (:class:`gs_d2.inference.PyramidDetector`) uses `predict_candidates`,
    `select_detections`, `size_divisibility` and `tile_geometry`; any detector that has these four can be tested so (and
    with `nms_thresh`, TEST.GS.BOX_VOTING too; with `by_scale` and `split_by_scale`, the detections of each scale; with
    `max_candidates`, a limit in tiles other than MODEL.RPN.PRE_NMS_TOPK_TEST).

    Attributes:
        class_agnostic (bool), num_classes_key: True and None, see
            :class:`gs_d2.modeling.description.Description`.
    """

    class_agnostic = True
    num_classes_key = None

    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        max_detections: int,
        nms_thresh: float = 0.5,
        channels_last: bool = False,
        autocast_dtype: str = "",
        compile_network: bool = False,
    ):
        """
        Args:
            pixel_mean, pixel_std: per channel, in the order of INPUT.FORMAT and its range 0..255.
            max_detections: the most detections kept of an image.
            nms_thresh: IoU above which the lower-scored detection is dropped.
            channels_last: memory order of feature maps and convolutions.
            autocast_dtype: "bfloat16" or "float16", in which convolutions then run; "" leaves it to the caller.
            compile_network: torch.compile the backbone and what else a detector gives to :meth:`_prepare`.
        """
        super().__init__()
        if autocast_dtype not in ("", "bfloat16", "float16"):
            raise ValueError(f"AUTOCAST_DTYPE must be bfloat16, float16 or empty, got {autocast_dtype!r}")
        self.backbone = backbone
        self.max_detections = max_detections
        self.nms_thresh = nms_thresh
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.autocast_dtype = getattr(torch, autocast_dtype) if autocast_dtype else None
        self.compile_network = compile_network
        self._prepare(backbone)

    def _prepare(self, network: nn.Module) -> nn.Module:
        """A part of convolutions, in this detector's memory order and, if wanted, compiled; its names stay."""
        network.to(memory_format=self.memory_format)
        if self.compile_network:
            network.compile(dynamic=True)
        return network

    @classmethod
    def from_config(cls, cfg):
        settings = cls.test_settings(cfg)
        return {
            "backbone": build_backbone(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_detections": settings.max_detections,
            "nms_thresh": settings.nms_thresh,
            "channels_last": cfg.MODEL.GS.CHANNELS_LAST,
            "autocast_dtype": cfg.MODEL.GS.AUTOCAST_DTYPE,
            "compile_network": cfg.MODEL.GS.COMPILE,
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
            `pred_boxes`, `scores` (face probability), `pred_classes` (0) and what else the detector's candidates have.
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
            results.append(self._result(candidates, (image.get("height", height), image.get("width", width))))
        return results

    def _result(self, candidates: Instances, size: tuple[int, int]) -> dict[str, Instances]:
        return {"instances": detector_postprocess(self.select_detections(candidates), *size)}

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

    @property
    def num_classes(self) -> int:
        """1: objects are told from background."""
        return 1

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this many pixels: those that agree in it batch without further padding."""
        return max(self.backbone.size_divisibility, 1)

    def normalize(self, image: Tensor) -> Tensor:
        """Pixels 0..255, [..., 3, H, W] in the order of INPUT.FORMAT, as the backbone takes them."""
        return (image - self.pixel_mean) / self.pixel_std

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises, pads to a common size that the backbone divides, and batches."""
        images = [self.normalize(x["image"].to(self.device)) for x in batched_inputs]
        batch = ImageList.from_tensors(images, self.backbone.size_divisibility)
        batch.tensor = batch.tensor.contiguous(memory_format=self.memory_format)
        return batch
