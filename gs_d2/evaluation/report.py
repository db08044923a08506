"""Figures as a person reads them (tables, percent) and as a program does (JSON, fractions)."""

import math
from collections.abc import Mapping, Sequence

from .wider_face import ATTRIBUTES, OFFICIAL_SUBSETS, WiderResult

_TITLES = {"easy": "Easy", "medium": "Medium", "hard": "Hard", "all": "All", "all_valid": "All (valid)"}

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
    """AP in percent and number of faces of every subset; below, the setting and `score_note`."""
    names = [name for name in (*OFFICIAL_SUBSETS, "all", "all_valid") if name in result.curves]
    rows = [[_TITLES[name], percent(result.curves[name].ap), str(result.num_faces[name])] for name in names]
    for scale, scale_result in (by_scale or {}).items():
        rows.append([f"All @{scale}", percent(scale_result.curves["all"].ap), str(scale_result.num_faces["all"])])
    for attribute, values in ATTRIBUTES.items():
        annotated = [value for value in values if result.num_faces.get(f"{attribute}.{value}")]
        for value in annotated if len(annotated) > 1 else ():  # a list without this attribute has one value for all
            name = f"{attribute}.{value}"
            rows.append([f"{attribute}: {value}", percent(result.curves[name].ap), str(result.num_faces[name])])
    lines = [format_table(["subset", "AP", "faces"], rows)]
    if setting:
        lines.append("setting: " + ", ".join(f"{name} {value}" for name, value in setting.items()))
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


def json_number(value: float) -> float | None:
    """JSON has no NaN: null stands for it."""
    return None if math.isnan(value) else float(value)


def wider_summary(result: WiderResult, by_scale: Mapping[int, WiderResult] | None = None) -> dict:
    """Figures for JSON: AP as fractions 0..1, null for a subset without faces or without ground truth."""

    figures = {name: json_number(result.curves[name].ap) if name in result.curves else None for name in _TITLES}
    figures |= {f"all@{scale}": json_number(r.curves["all"].ap) for scale, r in (by_scale or {}).items()}
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
