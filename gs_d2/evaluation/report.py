"""Figures as a person reads them (tables, percent) and as a program does (JSON, fractions)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .face_eval import FaceEvalResult
from .fddb import FALSE_POSITIVES, FddbResult
from .wider_face import ATTRIBUTES, OFFICIAL_SUBSETS, WiderResult

# The subsets on which the outputs of one anchor scale are evaluated: the columns of Table 7.
SCALE_SUBSETS = (*OFFICIAL_SUBSETS, "all")

_TITLES = {"easy": "Easy", "medium": "Medium", "hard": "Hard", "all": "All", "all_valid": "All (valid)"}
FACE_EVAL_TITLES = {"afw": "AFW", "pascal_face": "PASCAL faces"}

# Above this lowest score, detections that the curve needs were cut off: a threshold of 0.5 costs 3 points on
# hard.
_HIGH_LOWEST_SCORE = 0.05


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right, two blanks between."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def percent(fraction: float) -> str:
    """`0.91234` as `91.23`; `-` for NaN, where there is nothing to count."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"


def format_wider_table(
    result: WiderResult, by_scale: Mapping[int, WiderResult] | None = None, setting: Mapping | None = None
) -> str:
    """AP in percent and number of faces of every subset, and a table of AP by anchor scale where `by_scale` has any;
    below, the setting and `score_note`."""
    names = [name for name in (*OFFICIAL_SUBSETS, "all", "all_valid") if name in result.curves]
    rows = [[_TITLES[name], percent(result.curves[name].ap), str(result.num_faces[name])] for name in names]
    for attribute, values in ATTRIBUTES.items():
        annotated = [value for value in values if result.num_faces.get(f"{attribute}.{value}")]
        for value in annotated if len(annotated) > 1 else ():  # a list without this attribute has one value for all
            name = f"{attribute}.{value}"
            rows.append([f"{attribute}: {value}", percent(result.curves[name].ap), str(result.num_faces[name])])
    lines = [format_table(["subset", "AP", "faces"], rows)]
    if by_scale:
        lines.append("AP of each anchor scale's outputs alone, after an NMS among themselves:")
        names = [name for name in SCALE_SUBSETS if name in result.curves]
        rows = [[f"@{scale}", *(percent(r.curves[name].ap) for name in names)] for scale, r in by_scale.items()]
        lines.append(format_table(["scale", *(_TITLES[name] for name in names)], rows))
    if setting:
        lines.append(format_setting(setting))
    lines.append(score_note(result.num_detections, result.score_range))
    if result.num_detections and result.score_range[0] == result.score_range[1]:
        lines.append("WARNING: all scores are equal: the protocol's normalisation of scores gives AP 0")
    return "\n".join(lines)


def score_note(num_detections: int, score_range: tuple[float, float]) -> str:
    """How many detections with which scores, and a warning if the low ones were cut off."""
    if not num_detections:
        return "WARNING: no detections at all"
    lowest, highest = score_range
    note = f"{num_detections} detections, scores {lowest:.6g} to {highest:.6g}"
    if lowest > _HIGH_LOWEST_SCORE:
        note += (
            f"\nWARNING: no score is below {_HIGH_LOWEST_SCORE}: a high score threshold in testing lowers "
            "the AP, use 0.01 or less"
        )
    return note


def format_setting(setting: Mapping) -> str:
    """One line; what a figure depends on belongs beside it."""
    return "setting: " + ", ".join(f"{name} {value}" for name, value in setting.items())


def score_note_of(detections: Mapping[str, np.ndarray]) -> str:
    """`score_note` of detections whose last column is the score."""
    scores = np.concatenate([np.zeros(0), *(rows[:, -1] for rows in detections.values())])
    return score_note(len(scores), (scores.min(initial=np.inf), scores.max(initial=-np.inf)))


def format_fddb_table(result: FddbResult) -> str:
    """True positive rates in percent at each number of false positives."""
    rows = [
        [str(count), percent(result.rate_at(count)), percent(result.rate_at(count, continuous=True))]
        for count in FALSE_POSITIVES
    ]
    return format_table(["FP at most", "discrete TPR", "continuous TPR"], rows)


def fddb_setting(fit_ellipses: bool, num_sizes: int, num_images: int) -> dict:
    """What the protocol adds to the setting; `num_sizes` images have a known size."""
    sizes = f"of {num_sizes} of {num_images} images known"
    return {
        "regions": "fitted ellipses" if fit_ellipses else "as given",
        "sizes": sizes if num_sizes == num_images else sizes + " and the others estimated",
    }


def fddb_summary(result: FddbResult, num_images: int) -> dict:
    """Figures for JSON: rates as fractions 0..1 by number of false positives, null where nothing is annotated."""
    return {
        "disc_tpr": {str(count): json_number(result.rate_at(count)) for count in FALSE_POSITIVES},
        "cont_tpr": {str(count): json_number(result.rate_at(count, continuous=True)) for count in FALSE_POSITIVES},
        "num_faces": result.num_faces,
        "num_detections": result.num_detections,
        "num_images": num_images,
        "num_missing": len(result.missing),
        "num_unknown": result.num_unknown,
    }


def format_face_eval_table(result: FaceEvalResult, benchmark: str) -> str:
    """AP in percent with the number of faces."""
    title = FACE_EVAL_TITLES.get(benchmark, benchmark)
    return format_table([title, "AP"], [[f"{result.num_faces} faces", percent(result.curve.ap)]])


def face_eval_setting(result: FaceEvalResult, y_shift: float) -> dict:
    """What the protocol adds to the setting."""
    tx, ty, sx, sy = result.refinement
    return {
        "y-shift": f"{y_shift:g}",
        "refinement shift": f"{tx:.4f} {ty:.4f}",
        "refinement scale": f"{sx:.4f} {sy:.4f}",
    }


def face_eval_summary(result: FaceEvalResult, num_images: int, y_shift: float) -> dict:
    """Figures for JSON: AP as a fraction 0..1, null where nothing is annotated."""
    return {
        "ap": json_number(result.curve.ap),
        "num_faces": result.num_faces,
        "num_detections": result.num_detections,
        "num_images": num_images,
        "num_missing": len(result.missing),
        "num_unknown": result.num_unknown,
        "y_shift": y_shift,
        "refinement": list(result.refinement),
    }


def json_number(value: float) -> float | None:
    """JSON has no NaN: null stands for it."""
    return None if math.isnan(value) else float(value)


def scale_figures(by_scale: Mapping[int, WiderResult]) -> dict[str, float]:
    """AP of each anchor scale's outputs as "<subset>@<scale>" -> fraction, of the subsets there are."""
    return {
        f"{name}@{scale}": result.curves[name].ap
        for scale, result in by_scale.items()
        for name in SCALE_SUBSETS
        if name in result.curves
    }


def wider_summary(result: WiderResult, by_scale: Mapping[int, WiderResult] | None = None) -> dict:
    """Figures for JSON: AP as fractions 0..1, null for a subset without faces or without ground truth."""

    figures = {name: json_number(result.curves[name].ap) if name in result.curves else None for name in _TITLES}
    figures |= {name: json_number(ap) for name, ap in scale_figures(by_scale or {}).items()}
    attributes = {
        attribute: {value: json_number(result.curves[f"{attribute}.{value}"].ap) for value in values}
        for attribute, values in ATTRIBUTES.items()
        if f"{attribute}.{values[0]}" in result.curves
    }
    return {
        **figures,
        "attributes": attributes,
        "num_faces": result.num_faces,
        "num_detections": result.num_detections,
        "score_range": [json_number(score) for score in result.score_range],
    }
