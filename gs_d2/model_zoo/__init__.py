"""Configs and trained weights inside the package, with the functions of Detectron2's model zoo.

>>> from gs_d2 import model_zoo
>>> cfg = model_zoo.get_config("wider_gs.yaml")
>>> detector = model_zoo.get("faces/mobilenetv2.yaml", trained=True)

No function downloads anything.
"""

import difflib
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from detectron2.config import CfgNode

from gs_d2.config import load_config

__all__ = ["DEFAULT", "get", "get_checkpoint", "get_config", "get_config_file", "list_configs", "list_models"]

DEFAULT = "faces/mobilenetv2.yaml"  # what FaceDetector() is

_HERE = Path(__file__).resolve().parent
_WEIGHTS = _HERE / "weights"


def list_configs(pattern: str = "*") -> list[str]:
    """Lists the names of the configs, such as "wider/fpn_finest_sampling.yaml", sorted.

    Args:
        pattern: a shell pattern for the whole name, such as `"coco/*"`. `*` also matches slashes.

    Returns:
        The names that match; [] if none does.
    """
    root = _configs()
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))
    return sorted(name for name in names if fnmatch(name, pattern))


def list_models(pattern: str = "*") -> list[str]:
    """Lists the names of :func:`list_configs` that have trained weights in the package."""
    return [name for name in list_configs(pattern) if _checkpoint(name).is_file()]


def get_config_file(name: str) -> str:
    """Returns the path of a config.

    Args:
        name: a name of :func:`list_configs`.

    Raises:
        ValueError: there is no such config. The message lists similar names.
    """
    known = list_configs()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else "; see gs_d2.model_zoo.list_configs()"
        raise ValueError(f"the model zoo has no config {name!r}{hint}")
    return str(_configs() / name)


def get_checkpoint(name: str) -> str:
    """Returns the path of a config's trained weights.

    Raises:
        ValueError: there is no such config, or the package has no weights for it. The message lists the configs with
            weights.
    """
    get_config_file(name)
    if not _checkpoint(name).is_file():
        raise ValueError(f"the model zoo has no trained weights for {name}; it has them for {', '.join(list_models())}")
    return str(_checkpoint(name))


def get_config(name: str, trained: bool = False) -> CfgNode:
    """Returns a config, which you can change.

    Args:
        trained: True sets MODEL.WEIGHTS to the file of the trained weights. False keeps the weights that training
            starts from.

    Raises:
        ValueError: as :func:`get_config_file` and, if `trained`, :func:`get_checkpoint`.
    """
    opts = ["MODEL.WEIGHTS", get_checkpoint(name)] if trained else []
    return load_config(get_config_file(name), opts)


def get(name: str, trained: bool = False, device: str | None = None):
    """Builds a detector with Detectron2's `build_model`, in eval mode.

    Args:
        trained: True loads the trained weights; False leaves the weights random.
        device: such as "cuda"; None means the config's MODEL.DEVICE.

    Raises:
        ValueError: as :func:`get_config`.
    """
    from detectron2.modeling import build_model

    from gs_d2.checkpoint import Checkpointer

    cfg = get_config(name, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg).eval()
    if trained:
        Checkpointer(model, strict=True).load(cfg.MODEL.WEIGHTS)
    return model


def _configs() -> Path:
    """Of an installed package beside this file; of a checkout in its own folder."""
    installed = _HERE / "configs"
    return installed if installed.is_dir() else _HERE.parents[1] / "configs"


def _checkpoint(name: str) -> Path:
    return _WEIGHTS / PurePosixPath(name).with_suffix(".safetensors").as_posix().replace("/", "_")
