"""FaceDetector: finds faces in pictures with a config and weights, or with the model zoo's."""

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
from gs_d2.modeling import description_of, fuse


class FaceDetector:
    """Finds faces in pictures.

    >>> detector = FaceDetector()
    >>> boxes, scores = detector.detect("picture.jpg")

    Without arguments it uses the trained detector of the package (:mod:`gs_d2.model_zoo`). To use your own detector,
    pass its config and weights:

    >>> detector = FaceDetector("configs/quick/demo.yaml", "output/demo/model_final.pth")

    It tests on an image pyramid if the config has TEST.GS.PYRAMID True. At a single scale it misses faces much larger
    than the largest anchor.
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
            cfg: a config file, or a config with the keys of :func:`add_gs_config`, which is not changed. None means the
                trained `gs_d2.model_zoo.DEFAULT`.
            weights: a .pth or .safetensors file. None means the config's MODEL.WEIGHTS.
            device: None means the config's MODEL.DEVICE, or the CPU if MODEL.DEVICE is a GPU and torch finds none.
            confidence_threshold: score threshold, in [0, 1]; faces with a lower score are not returned.
            opts: a list of config keys and values in turn, which override the config's.
            allow_pickle: True also reads pickles, such as Detectron2's .pkl. Such files can run any code.

        Raises:
            FileNotFoundError: the config or the weights do not exist.
            ValueError: a key or a value is wrong, the weights do not match this detector, or the device cannot be used.
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
        fuse(model)
        self.model = PyramidDetector(cfg, model) if cfg.TEST.GS.PYRAMID else model
        self._resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)

    def detect(self, image) -> tuple[np.ndarray, np.ndarray]:
        """Finds the faces in one picture.

        Args:
            image: a path, a PIL image, or a uint8 array [H, W, 3] in **RGB** order. The EXIF orientation of a path's
                image is applied.

        Returns:
            boxes (float32 [n, 4]): XYXY, in pixels of the image (for a path: of the upright image, as viewers show it).
            scores (float32 [n]): face probabilities, highest first. n is 0 if there is no face.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not an image, or the array has another type or shape.
        """
        return self.detect_batch([image])[0]

    @torch.no_grad()
    def detect_batch(self, images: Iterable) -> list[tuple[np.ndarray, np.ndarray]]:
        """Finds the faces in several images in one forward pass. This is faster on a GPU. Smaller images are padded.

        Args:
            images: each as in :meth:`detect`; any sizes, any number.

        Returns:
            A list with the boxes and scores of each image; [] for no images. If the network has GroupNorm, they depend
            slightly on the padding.

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
