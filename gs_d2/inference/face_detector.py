"""A detector in one object: from a config and weights, or those of the model zoo, to the faces of pictures."""

import os
from collections.abc import Iterable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model

from gs_d2 import model_zoo
from gs_d2.checkpoint import Checkpointer
from gs_d2.config import load_config
from gs_d2.formats.images import as_rgb
from gs_d2.inference.pyramid import PyramidDetector
from gs_d2.modeling import description_of


class FaceDetector:
    """Finds the faces of pictures.

    >>> detector = FaceDetector()
    >>> boxes, scores = detector.detect("picture.jpg")

    Without arguments it is the detector that comes with the package (:mod:`gs_d2.model_zoo`); with a config and weights
    it is one of your own:

    >>> detector = FaceDetector("configs/quick/demo.yaml", "output/demo/model_final.pth")

    It tests on an image pyramid where the config says so (TEST.GS.PYRAMID). At a single scale, faces much larger than
    the largest anchor are missed.
    """

    def __init__(
        self,
        cfg: CfgNode | str | os.PathLike | None = None,
        weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        confidence_threshold: float = 0.5,
        opts=(),
        allow_pickle: bool = False,
    ):
        """
        Args:
            cfg: a config with :func:`add_gs_config`'s keys, which is not changed, or a config file; None is
                `gs_d2.model_zoo.DEFAULT`, trained.
            weights: a .pth or .safetensors file; None is the config's MODEL.WEIGHTS.
            device: None is the config's MODEL.DEVICE, or the CPU where that is a GPU and torch sees none.
            confidence_threshold: lowest score returned, in [0, 1].
            opts: config keys and values in turn, which take precedence over the config's.
            allow_pickle: also read weights that are more than tensors (Detectron2's .pkl): such files can run any code.

        Raises:
            FileNotFoundError: there is no such config or weights.
            ValueError: a key or value is wrong, the weights are not those of this detector, or there is no such device.
        """
        if not 0 <= confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold must be in [0, 1], got {confidence_threshold}")
        if cfg is None:
            cfg = model_zoo.get_config(model_zoo.DEFAULT, trained=weights is None)
        cfg = load_config(cfg, opts)
        cfg.TEST.GS.SCORE_THRESH = float(confidence_threshold)
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = float(confidence_threshold)  # what RetinaNet has for it
        of_model = description_of(cfg.MODEL.META_ARCHITECTURE).test_settings(cfg).score_thresh
        self._threshold = None if of_model == confidence_threshold else float(confidence_threshold)
        cfg.MODEL.DEVICE = _device(device, cfg.MODEL.DEVICE)
        weights = os.fspath(weights or cfg.MODEL.WEIGHTS)
        if not weights:
            raise ValueError("no weights: the config's MODEL.WEIGHTS is empty, so pass `weights`")
        if "://" not in weights and not os.path.isfile(weights):
            raise FileNotFoundError(f"no such weights: {weights}")
        self.cfg = cfg
        model = build_model(cfg).eval()
        Checkpointer(model, allow_pickle=allow_pickle, strict=True).load(weights)
        self.model = PyramidDetector(cfg, model) if cfg.TEST.GS.PYRAMID else model
        self._resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)

    def detect(self, image) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            image: a path, whose EXIF orientation is applied; a PIL image; or an array uint8 [H, W, 3], **RGB**.

        Returns:
            boxes (float32 [n, 4]): XYXY, in pixels of the image (of a path: upright, as viewers show it).
            scores (float32 [n]): face probabilities, falling.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not an image, or an array of another type or shape.
        """
        return self.detect_batch([image])[0]

    @torch.no_grad()
    def detect_batch(self, images: Iterable) -> list[tuple[np.ndarray, np.ndarray]]:
        """The faces of several images in one forward pass, which a GPU is faster with; smaller images are padded.

        Args:
            images: each as in :meth:`detect`; any sizes, any number.

        Returns:
            For each image its boxes and scores. With GroupNorm in the network they depend a little on the padding.

        Raises:
            FileNotFoundError, ValueError: as :meth:`detect`.
        """
        batch = []
        for image in images:
            image = as_rgb(image)
            pixels = convert_PIL_to_numpy(image, self.cfg.INPUT.FORMAT)
            pixels = self._resize.get_transform(pixels).apply_image(pixels)
            pixels = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
            batch.append({"image": pixels, "height": image.height, "width": image.width})
        results = self.model(batch) if batch else []
        faces = [result["instances"].to("cpu") for result in results]
        if self._threshold is not None:  # a detector that reads neither key
            faces = [x[x.scores >= self._threshold] for x in faces]
        return [(x.pred_boxes.tensor.float().numpy(), x.scores.float().numpy()) for x in faces]


def _device(device, configured: str) -> str:
    if device is None:
        return configured if torch.cuda.is_available() or not configured.startswith("cuda") else "cpu"
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return str(device)
