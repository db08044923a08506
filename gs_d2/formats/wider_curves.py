"""WIDER FACE: the published precision-recall curves of other methods, `wider_pr_info_*.mat`."""

import os
import re

import numpy as np

from gs_d2.formats.folders import files_below

_MAX_CURVE = 1_000_000  # numbers; official ones have 2,000, and a tiny file can claim billions
_OFFICIAL_NAME = re.compile(
    r"wider_pr_info_(?P<method>.+)_(?P<subset>easy|medium|hard)_(?:val|test)\.mat", re.IGNORECASE
)


def read_official_curve(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision (T,) float64 of a `wider_pr_info_*.mat` (MATLAB v7.3, key `pr_cruve`, 1000 thresholds).

    Raises:
        ValueError: if the file is not one.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            curve = file["pr_cruve"] if isinstance(file.get("pr_cruve", getlink=True), h5py.HardLink) else None
            if not isinstance(curve, h5py.Dataset) or curve.is_virtual or curve.external:
                raise ValueError("it has no array pr_cruve of its own")  # but perhaps one of another file's bytes
            if curve.size is None or curve.size > _MAX_CURVE:
                raise ValueError(f"pr_cruve has the shape {curve.shape}")
            values = np.asarray(curve, dtype=np.float64)
    except (AttributeError, KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a precision-recall curve of WIDER FACE's tools ({error})") from error
    if values.ndim != 2 or 2 not in values.shape:
        raise ValueError(f"{path}: pr_cruve must be 1000 x 2, got {values.shape}")
    precision, recall = values if values.shape[0] == 2 else values.T  # HDF5 shows MATLAB's arrays transposed
    return recall, precision


def read_official_curves(folder: str | os.PathLike) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Reads every `wider_pr_info_<method>_<subset>_val.mat` below a folder.

    Returns:
        method -> subset (`easy`, `medium`, `hard`) -> recall and precision.

    Raises:
        FileNotFoundError: if there is none.
    """
    methods: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for path in sorted(files_below(folder)):
        match = _OFFICIAL_NAME.fullmatch(path.name)
        if match:
            methods.setdefault(match["method"], {})[match["subset"].lower()] = read_official_curve(path)
    if not methods:
        raise FileNotFoundError(f"{folder}: no wider_pr_info_<method>_<subset>_val.mat below it")
    return methods
