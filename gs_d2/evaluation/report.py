"""A result as a person reads it (tables, percent) and as a program does (results.json, fractions)."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gs_d2.formats.json_text import json_text
from gs_d2.formats.whole_file import write_text

# Above this lowest score, detections that the curve needs were cut off: a threshold of 0.5 costs 3 points on
# hard.
_HIGH_LOWEST_SCORE = 0.05


class Result:
    """What the evaluation by one protocol gives. A subclass says what its metrics are and how they are shown."""

    def metrics(self) -> dict[str, float]:
        """Name -> percent, NaN where there is nothing to count; what `evaluate` of a `DatasetEvaluator` gives."""
        raise NotImplementedError

    def table(self) -> str:
        """The metrics in percent, as :func:`format_table` does."""
        raise NotImplementedError

    def summary(self) -> dict:
        """The metrics for JSON: fractions 0..1 by name, null where there is nothing to count."""
        raise NotImplementedError

    def setting(self) -> dict:
        """What the protocol adds to the setting."""
        return {}

    def notes(self) -> list[str]:
        """Lines that stand below the table and the setting."""
        return []

    def write_curves(self, folder: Path, name: str = "gs_d2") -> None:
        """Writes the curves (npz) and a picture of them, with `name` for the method, into a folder."""


def present(
    result: Result,
    setting: Mapping,
    output: str | os.PathLike | None = None,
    *,
    show: Callable[[str], None] = print,
    write_detections: Callable[[Path], None] | None = None,
    **curves,
) -> None:
    """Shows a result, and writes it: the one way for the evaluators and for tools/evaluate.py.

    Args:
        result: of any protocol.
        setting: name -> value of what the metrics depend on; the protocol's own is added.
        output: folder for results.json, the curves and their picture, made where missing. None: nothing is written.
        show: is given the table, the setting and the notes as one text, before anything is written.
        write_detections: writes the detections into the folder, before the rest: they took the longest.
        curves: arguments of the result's `write_curves`.
    """
    setting = {**setting, **result.setting()}
    lines = [result.table(), *([format_setting(setting)] if setting else []), *result.notes()]
    show("\n".join(lines))
    if output is not None:
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        if write_detections is not None:
            write_detections(output)
        write_summary(result, setting, output / "results.json")
        result.write_curves(output, **curves)


def write_summary(result: Result, setting: Mapping, path: str | os.PathLike) -> None:
    """Writes the summary with `setting` as JSON, whole or not at all, into a folder that is made where missing."""
    summary = {**result.summary(), "setting": {**setting, **result.setting()}}
    write_text(path, json_text(summary, indent=1) + "\n")


def format_setting(setting: Mapping) -> str:
    """One line; what a metric depends on belongs beside it."""
    return "setting: " + ", ".join(f"{name} {value}" for name, value in setting.items())


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


def json_number(value: float) -> float | None:
    """JSON has neither NaN nor infinity: null stands for them."""
    return float(value) if math.isfinite(value) else None


class Scores(NamedTuple):
    """How many detections were given, and their lowest and highest score."""

    count: int
    lowest: float
    highest: float

    @classmethod
    def of(cls, detections: Mapping[str, np.ndarray]) -> "Scores":
        """Of detections whose last column is the score, by image."""
        scores = np.concatenate([np.zeros(0), *(rows[:, -1] for rows in detections.values())])
        return cls(len(scores), float(scores.min(initial=np.inf)), float(scores.max(initial=-np.inf)))

    def note(self) -> str:
        """One line, and a warning if there are none or the low ones were cut off."""
        if not self.count:
            return "WARNING: no detections at all"
        note = f"{self.count} detections, scores {self.lowest:.6g} to {self.highest:.6g}"
        if self.lowest > _HIGH_LOWEST_SCORE:
            note += (
                f"\nWARNING: no score is below {_HIGH_LOWEST_SCORE}: a high score threshold in testing lowers "
                "the AP, use 0.01 or less"
            )
        return note
