"""Files of weights: read without running what is in them, and written whole or not at all."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

from gs_d2.formats.files import is_zip
from gs_d2.formats.whole_file import write_whole

_MAX_UNPACKED = 4  # times its size that a .pth may hold; torch's own are not compressed


def read_weights(path: str | os.PathLike, *, allow_pickle: bool = False, mmap: bool = False) -> dict:
    """Reads a `.pth` or `.safetensors` file.

    Args:
        allow_pickle: a `.pth` may hold any object, which can run code.
        mmap: leave the tensors of a `.pth` on disk until they are used.

    Returns:
        dict: with the state dict (name -> tensor, or array) as "model", and what else the file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds objects though not `allow_pickle`, or no model; or it is a `.safetensors` file
            and that package is missing.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such weights: {path}")
    if path.endswith(".safetensors"):
        return {"model": _read_safetensors(path)}
    if is_zip(path):
        _check_zip(path)
    else:
        mmap = False  # torch's old format
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as weights ({_first_line(error)}): it is damaged, or holds more than tensors and "
            "plain values; that can run any code: pass allow_pickle=True (train_net.py: --allow-pickle) if you trust it"
        ) from error
    except Exception as error:  # torch raises nearly anything for a damaged file
        raise ValueError(f"{path} cannot be read as weights ({_first_line(error)})") from error
    if isinstance(loaded, dict) and "model" not in loaded:
        loaded = {"model": loaded}
    state = loaded["model"] if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_dense(v) for k, v in state.items()):
        raise ValueError(f"{path} holds no model: it must be a state dict, or a dict with one as 'model'")
    return loaded


def _read_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs a package ({error}): pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as weights ({_first_line(error)})") from error


def _check_zip(path):
    """Refuses a .pth that would unpack to far more than it is, or that is cut short."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as weights ({_first_line(error)})") from error
    if unpacked > _MAX_UNPACKED * os.path.getsize(path):
        raise ValueError(f"{path} cannot be read as weights: it unpacks to {unpacked / 1e9:.1f} GB, far above its size")


def _is_dense(value) -> bool:
    if isinstance(value, torch.Tensor):
        return value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return isinstance(value, np.ndarray) and value.dtype != object


def _first_line(error) -> str:
    return (str(error).splitlines() or [repr(error)])[0] or repr(error)


def write_weights(path: str | os.PathLike, content: dict) -> None:
    """Writes a `.safetensors` file of tensors by name, or any other of what :func:`read_weights` reads, into a folder
    that is made where missing.

    Raises:
        ImportError: it is a `.safetensors` file and that package is missing.
        OSError: it cannot be written; what was there is kept.
    """
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise ImportError(f"writing {path} needs a package ({error}): pip install safetensors") from error
        data = save({name: tensor.contiguous() for name, tensor in content.items()})
    else:
        data = None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: torch.save(content, file) if data is None else file.write(data))
