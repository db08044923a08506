"""A detector in one object: from a config and weights to the faces of a picture."""

import os
import pickle

import numpy as np
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

import gs_d2.modeling  # noqa: F401  (registers the detectors)
from gs_d2.config import add_gs_config
from gs_d2.inference.pyramid import PyramidDetector

_MAX_NAMED = 5  # keys of a list that a message spells out
_REBUILT_KEYS = ("pixel_mean", "pixel_std")  # set from the config; old files hold them, too


class FaceDetector:
    """Finds the faces of one picture at a time.

    >>> detector = FaceDetector("configs/quick/demo.yaml", "output/demo/model_final.pth")
    >>> boxes, scores = detector.detect("picture.jpg")

    It tests on an image pyramid where the config says so (TEST.GS.PYRAMID). At a single scale, faces much larger than
    the largest anchor are missed.
    """

    def __init__(
        self,
        cfg: CfgNode | str | os.PathLike,
        weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        confidence_threshold: float = 0.5,
        opts=(),
        allow_pickle: bool = False,
    ):
        """
        Args:
            cfg: a config with :func:`add_gs_config`'s keys, which is not changed, or a config file.
            weights: a checkpoint; None is the config's MODEL.WEIGHTS.
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
        cfg = load_config(cfg, opts)
        cfg.TEST.GS.SCORE_THRESH = float(confidence_threshold)
        cfg.MODEL.DEVICE = _device(device, cfg.MODEL.DEVICE)
        weights = os.fspath(weights or cfg.MODEL.WEIGHTS)
        if not weights:
            raise ValueError("no weights: the config's MODEL.WEIGHTS is empty, so pass `weights`")
        if "://" not in weights and not os.path.isfile(weights):
            raise FileNotFoundError(f"no such weights: {weights}")
        self.cfg = cfg
        model = build_model(cfg).eval()
        _load_weights(model, weights, allow_pickle)
        self.model = PyramidDetector(cfg, model) if cfg.TEST.GS.PYRAMID else model
        self._resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)

    @torch.no_grad()
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
        image = as_rgb(image)
        pixels = convert_PIL_to_numpy(image, self.cfg.INPUT.FORMAT)
        pixels = self._resize.get_transform(pixels).apply_image(pixels)
        pixels = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        (result,) = self.model([{"image": pixels, "height": image.height, "width": image.width}])
        faces = result["instances"].to("cpu")
        return faces.pred_boxes.tensor.float().numpy(), faces.scores.float().numpy()


def as_rgb(image) -> Image.Image:
    """What :meth:`FaceDetector.detect` takes, as an RGB image; 16-bit ones by their high byte."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image must be uint8 [H, W, 3] (RGB) and not empty, got {image.dtype} {image.shape}")
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(f"image must be a path, a PIL image or a numpy array, got {type(image).__name__}")
    path = os.fspath(image)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such image: {path}")
    try:
        with Image.open(path) as file:
            return _to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # of a broken file Pillow's decoders raise nearly anything
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"image must not be empty, got {image.width} x {image.height} pixels")
    if image.mode == "F":
        raise ValueError("pixels are floats, whose range is unknown: convert them to uint8")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 255
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:  # "I" is also what 8-bit values may come in
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def load_config(cfg: CfgNode | str | os.PathLike, opts=()) -> CfgNode:
    """A config of its own that may be changed: from a file or a copy, with `opts` (keys and values in turn)."""
    if isinstance(cfg, CfgNode):
        if "GS" not in cfg.MODEL:
            raise ValueError("cfg has no MODEL.GS: call gs_d2.config.add_gs_config(cfg) before reading the file")
        cfg = cfg.clone()
        cfg.defrost()
    else:
        path, cfg = os.fspath(cfg), get_cfg()
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no such config: {path}")
        add_gs_config(cfg)
        try:
            cfg.merge_from_file(path, allow_unsafe=False)  # YAML can run code otherwise
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {_text(error)}") from error
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"opts {list(opts)}: {_text(error)}") from error
    return cfg


def _text(error: Exception) -> str:
    return str(error.args[0] if isinstance(error, KeyError) else error)  # a KeyError's own text is in quotes


def _device(device, configured: str) -> str:
    if device is None:
        return configured if torch.cuda.is_available() or not configured.startswith("cuda") else "cpu"
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return str(device)


class _Checkpointer(DetectionCheckpointer):
    """Reads tensors only, unless allowed more, and keeps what did not fit."""

    def __init__(self, model, allow_pickle: bool):
        super().__init__(model, save_to_disk=False)
        self.allow_pickle = allow_pickle
        self.incompatible = None

    def _load_file(self, filename):
        if filename.endswith((".pkl", ".pyth")):
            if not self.allow_pickle:
                raise ValueError(
                    f"{filename} is a pickle, which can run any code: pass allow_pickle=True if you trust it. "
                    "(Weights that training starts from are no detector: pass those of a trained one)"
                )
            return super()._load_file(filename)
        try:
            loaded = torch.load(filename, map_location="cpu", weights_only=not self.allow_pickle)
        except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{filename} cannot be read as weights ({str(error).splitlines()[0] if str(error) else error!r})"
            ) from error
        state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
        if not isinstance(state, dict) or not all(isinstance(x, (torch.Tensor, np.ndarray)) for x in state.values()):
            raise ValueError(f"{filename} holds no model: it must be a state dict, or a dict with one as 'model'")
        return {"model": state, **{key: loaded[key] for key in ("__author__", "matching_heuristics") if key in loaded}}

    def _load_model(self, checkpoint):
        self.incompatible = super()._load_model(checkpoint)
        return None  # nothing to log: the caller raises


def _load_weights(model, weights: str, allow_pickle: bool):
    checkpointer = _Checkpointer(model, allow_pickle)
    if "://" in weights:
        weights = PathManager.get_local_path(weights)
    checkpointer.load(weights)
    missing, unexpected, shapes = checkpointer.incompatible
    shapes = [f"{key} {tuple(theirs)} (the model's is {tuple(ours)})" for key, theirs, ours in shapes]
    missing = [key for key in missing if key not in {text.split(" ")[0] for text in shapes}]
    missing = [key for key in missing if key not in _REBUILT_KEYS]
    unexpected = [key for key in unexpected if key not in _REBUILT_KEYS]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:_MAX_NAMED])}{', ...' if len(keys) > _MAX_NAMED else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"{weights} does not fit the config's model. Keys " + "; ".join(problems))
