"""Curves on disk and on paper: npz, plots like the paper's Fig. 7 and 9."""

import io
import os
from collections.abc import Mapping

import numpy as np

from gs_d2.evaluation.precision_recall import PrecisionRecallCurve
from gs_d2.formats.files import FileTree


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


def plot_pr_curves(
    methods: Mapping[str, Mapping[str, PrecisionRecallCurve]],
    path: str | os.PathLike,
    panels: Mapping[str, str],
) -> None:
    """Draws precision over recall, one panel a subset, one line a method, best AP first (the paper's Fig. 7).

    Args:
        methods: method -> subset -> curve; a method may lack subsets.
        path: the picture; its ending decides the format (png, pdf, ...).
        panels: subset -> title, in the order drawn; those without any curve are left out.
    """
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
