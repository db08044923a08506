"""Curves on disk and on paper: npz, official `wider_pr_info_*.mat`, plots like the paper's Fig. 7 and 9."""

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gs_d2.formats.files import FileTree

from .face_eval import FaceEvalResult
from .fddb import FddbResult
from .precision_recall import PrecisionRecallCurve
from .report import FACE_EVAL_TITLES

_MAX_CURVE = 1_000_000  # numbers; official ones have 2,000, and a tiny file can claim billions
_OFFICIAL_NAME = re.compile(r"wider_pr_info_(?P<method>.+)_(?P<subset>easy|medium|hard)_(?:val|test)\.mat")


def save_curves(curves: Mapping[str, PrecisionRecallCurve], path: str | os.PathLike) -> None:
    """Writes an npz with `<name>.recall` and `<name>.precision` (float64) for each curve."""
    arrays = {}
    for name, curve in curves.items():
        arrays |= {f"{name}.recall": curve.recall, f"{name}.precision": curve.precision}
    np.savez_compressed(path, **arrays)


def load_curves(path: str | os.PathLike) -> dict[str, PrecisionRecallCurve]:
    """Reads what `save_curves` wrote.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if the file is not one.
    """
    with FileTree(path) as tree:
        try:
            arrays = {
                name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(tree.read_bytes(name)))
                for name in tree.names
            }
            names = [key.removesuffix(".recall") for key in arrays if key.endswith(".recall")]
            curves = {
                name: (np.float64(arrays[f"{name}.recall"]), np.float64(arrays[f"{name}.precision"])) for name in names
            }
            if not all(recall.ndim == 1 and recall.shape == precision.shape for recall, precision in curves.values()):
                raise ValueError("recall and precision must be of the same length")
        except (EOFError, KeyError, MemoryError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the npz of curves that save_curves writes ({error})") from error
    return {name: PrecisionRecallCurve(recall=r, precision=p) for name, (r, p) in curves.items()}


def read_official_curve(path: str | os.PathLike) -> PrecisionRecallCurve:
    """Reads a `wider_pr_info_*.mat` (MATLAB v7.3, key `pr_cruve`: precision and recall at 1000 thresholds).

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
    return PrecisionRecallCurve(recall=recall, precision=precision)


def read_official_curves(folder: str | os.PathLike) -> dict[str, dict[str, PrecisionRecallCurve]]:
    """Reads every `wider_pr_info_<method>_<subset>_val.mat` below a folder.

    Returns:
        method -> subset (`easy`, `medium`, `hard`) -> curve.

    Raises:
        FileNotFoundError: if there is none.
    """
    methods: dict[str, dict[str, PrecisionRecallCurve]] = {}
    for path in sorted(Path(folder).rglob("wider_pr_info_*.mat")):
        match = _OFFICIAL_NAME.fullmatch(path.name)
        if match:
            methods.setdefault(match["method"], {})[match["subset"]] = read_official_curve(path)
    if not methods:
        raise FileNotFoundError(f"{folder}: no wider_pr_info_<method>_<subset>_val.mat below it")
    return methods


def plot_pr_curves(
    methods: Mapping[str, Mapping[str, PrecisionRecallCurve]],
    path: str | os.PathLike,
    *,
    panels: Mapping[str, str] | None = None,
) -> None:
    """Draws precision over recall, one panel a subset, one line a method, best AP first (the paper's Fig. 7).

    Args:
        methods: method -> subset -> curve; a method may lack subsets.
        path: the picture; its ending decides the format (png, pdf, ...).
        panels: subset -> title, in the order drawn. None: easy, medium, hard and All, those that have a
            curve.
    """
    if panels is None:
        panels = {"easy": "Easy", "medium": "Medium", "hard": "Hard", "all": "All"}
    panels = {s: title for s, title in panels.items() if any(s in curves for curves in methods.values())}
    figure, axes = _panels(len(panels))
    colors = dict(zip(methods, _colors(len(methods)), strict=True))
    for axis, (subset, title) in zip(axes, panels.items(), strict=True):
        drawn = [(curves[subset].ap, name) for name, curves in methods.items() if subset in curves]
        for ap, name in sorted(drawn, key=lambda item: (-np.nan_to_num(item[0]), item[1])):
            curve = methods[name][subset]
            axis.plot(curve.recall, curve.precision, color=colors[name], label=f"{name}-{ap:.3f}", linewidth=1.8)
        axis.set(title=title, xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1))
        axis.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)


def plot_roc_curves(
    methods: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    path: str | os.PathLike,
    *,
    max_fp: int = 2000,
) -> None:
    """Draws the true positive rate over the number of false positives (the paper's Fig. 9a).

    Args:
        methods: method -> title of a panel -> (false positives (T,), rates (T,)).
        path: the picture; its ending decides the format.
        max_fp: where the axis ends.
    """
    titles = list(dict.fromkeys(title for curves in methods.values() for title in curves))
    figure, axes = _panels(len(titles))
    colors = dict(zip(methods, _colors(len(methods)), strict=True))
    for axis, title in zip(axes, titles, strict=True):
        for name, curves in methods.items():
            if title in curves:
                axis.plot(*curves[title], color=colors[name], label=name, linewidth=1.8)
        axis.set(title=title, xlabel="False positives", ylabel="True positive rate", xlim=(0, max_fp), ylim=(0, 1))
        axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)


def write_fddb_curves(result: FddbResult, folder: str | os.PathLike, name: str = "gs_d2") -> None:
    """Writes roc_curves.npz and roc_curve.png, with `name` for the method, into a folder."""
    names = ("false_positives", "discrete", "continuous", "thresholds")
    np.savez_compressed(Path(folder, "roc_curves.npz"), **{key: getattr(result, key) for key in names})
    curves = {
        "Discrete": (result.false_positives, result.discrete),
        "Continuous": (result.false_positives, result.continuous),
    }
    plot_roc_curves({name: curves}, Path(folder, "roc_curve.png"))


def write_face_eval_curves(
    result: FaceEvalResult, benchmark: str, folder: str | os.PathLike, name: str = "gs_d2"
) -> None:
    """Writes pr_curves.npz and pr_curve.png, with `name` for the method, into a folder."""
    save_curves({benchmark: result.curve}, Path(folder, "pr_curves.npz"))
    panels = {benchmark: FACE_EVAL_TITLES.get(benchmark, benchmark)}
    plot_pr_curves({name: {benchmark: result.curve}}, Path(folder, "pr_curve.png"), panels=panels)


def _panels(count: int):
    # Figure and not pyplot: works without a display and leaves the user's own figures alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * max(count, 1), 3.8), layout="constrained")
    axes = figure.subplots(1, max(count, 1), squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.4)
    return figure, axes


def _colors(count: int) -> list:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]
