"""The WIDER FACE protocol: average precision on easy, medium, hard, All, and per attribute.

Agrees with the official MATLAB toolbox and with its Python port. Where those two differ we do as MATLAB does:
rows are sorted by score, any range of scores is accepted, an image without a file has no detections.
Arithmetic is float64 throughout, as in the port (MATLAB normalises scores in single precision).

Shape shorthand in this module:
    I: number of images, M: ground-truth boxes of all images, N: detections of all images, T: the 1000
        thresholds
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gs_d2.evaluation.curves import plot_pr_curves, save_curves
from gs_d2.evaluation.precision_recall import PrecisionRecallCurve, pixel_iou
from gs_d2.evaluation.report import Result, Scores, format_table, json_number, percent
from gs_d2.formats.progress import track
from gs_d2.formats.wider_face import ATTRIBUTES, OFFICIAL_SUBSETS, WiderGroundTruth

# The subsets on which the outputs of one anchor scale are evaluated: the columns of Table 7.
SCALE_SUBSETS = (*OFFICIAL_SUBSETS, "all")

_TITLES = {"easy": "Easy", "medium": "Medium", "hard": "Hard", "all": "All", "all_valid": "All (valid)"}
_IOU_THRESH = 0.5
_NUM_THRESHOLDS = 1000
_UNMATCHED = -1
_NOT_COUNTED = -2  # on an image without any annotated face, which the official tool skips
_IOU_CHUNK = 2_000_000  # pairs at a time, about 100 MB: the crowds have 709 faces in one image


@dataclass(frozen=True)
class WiderResult(Result):
    """What the evaluation of one set of predictions gives.

    Attributes:
        curves: subset -> `PrecisionRecallCurve` over the T thresholds; `.ap` is the metric, a fraction.
        num_faces: subset -> number of faces that count.
        num_detections: detections on images of the ground truth.
        score_range: their lowest and highest score; (nan, nan) without detections.
        num_images: of the ground truth.
        missing: those of them for which there is no entry; their faces are missed.
        num_empty: those of them whose entry has no detection.
        num_unknown: images with an entry that are not in the ground truth; not evaluated.
        by_scale: anchor scale -> result of its outputs alone, on `SCALE_SUBSETS`; empty where they are not known.
    """

    curves: dict[str, PrecisionRecallCurve]
    num_faces: dict[str, int]
    num_detections: int
    score_range: tuple[float, float]
    num_images: int
    missing: list[str]
    num_empty: int
    num_unknown: int
    by_scale: dict[int, "WiderResult"] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """AP in percent of each subset there is, and of each anchor scale as "<subset>@<scale>"."""
        metrics = {name: 100 * self.curves[name].ap for name in _TITLES if name in self.curves}
        return metrics | {name: 100 * ap for name, ap in self._scale_aps()}

    def table(self) -> str:
        """AP in percent and number of faces of every subset, and a table of AP by anchor scale where there are any."""
        names = [name for name in _TITLES if name in self.curves]
        rows = [[_TITLES[name], percent(self.curves[name].ap), str(self.num_faces[name])] for name in names]
        for attribute, values in ATTRIBUTES.items():
            annotated = [value for value in values if self.num_faces.get(f"{attribute}.{value}")]
            for value in annotated if len(annotated) > 1 else ():  # a list without this attribute has one value for all
                name = f"{attribute}.{value}"
                rows.append([f"{attribute}: {value}", percent(self.curves[name].ap), str(self.num_faces[name])])
        lines = [format_table(["subset", "AP", "faces"], rows)]
        if self.by_scale:
            lines.append("AP of each anchor scale's outputs alone, after an NMS among themselves:")
            names = [name for name in SCALE_SUBSETS if name in self.curves]
            rows = [
                [f"@{scale}", *(percent(r.curves[name].ap) for name in names)] for scale, r in self.by_scale.items()
            ]
            lines.append(format_table(["scale", *(_TITLES[name] for name in names)], rows))
        return "\n".join(lines)

    def notes(self) -> list[str]:
        notes = [Scores(self.num_detections, *self.score_range).note()]
        if self.num_detections and self.score_range[0] == self.score_range[1]:
            notes.append("WARNING: all scores are equal: the protocol's normalisation of scores gives AP 0")
        return notes

    def summary(self) -> dict:
        """AP as fractions 0..1, null for a subset without faces or without ground truth."""
        metrics = {name: json_number(self.curves[name].ap) if name in self.curves else None for name in _TITLES}
        attributes = {
            attribute: {value: json_number(self.curves[f"{attribute}.{value}"].ap) for value in values}
            for attribute, values in ATTRIBUTES.items()
            if f"{attribute}.{values[0]}" in self.curves
        }
        return {
            **metrics,
            **{name: json_number(ap) for name, ap in self._scale_aps()},
            "attributes": attributes,
            "num_faces": self.num_faces,
            "num_detections": self.num_detections,
            "score_range": [json_number(score) for score in self.score_range],
            "num_images": self.num_images,
            "num_missing": len(self.missing),
            "num_empty": self.num_empty,
            "num_unknown": self.num_unknown,
        }

    def write_curves(
        self,
        folder: Path,
        name: str = "gs_d2",
        others: Mapping[str, Mapping[str, PrecisionRecallCurve]] | None = None,
    ) -> None:
        """Writes pr_curves.npz, and pr_curve.png with the curves of `others`, method -> subset -> curve, beside."""
        save_curves(self.curves, folder / "pr_curves.npz")
        panels = {subset: _TITLES[subset] for subset in SCALE_SUBSETS}
        plot_pr_curves({name: self.curves, **(others or {})}, folder / "pr_curve.png", panels)

    def _scale_aps(self) -> Iterator[tuple[str, float]]:
        for scale, result in self.by_scale.items():
            yield from ((f"{name}@{scale}", result.curves[name].ap) for name in SCALE_SUBSETS if name in result.curves)


def evaluate_wider_face(ground_truth: WiderGroundTruth, detections: Mapping[str, np.ndarray]) -> WiderResult:
    """Evaluates one set of predictions on every subset of the ground truth (PROTOCOLS D.1).

    An IoU of 0.5 (boxes with "+1") is needed. A detection belongs to the face of highest IoU, the first on
    ties, among all annotated faces. The first detection of a face in order of score is a hit, the others are
    false alarms; detections whose face the subset ignores are dropped. Equal scores keep the order given.

    Args:
        ground_truth: the annotated faces.
        detections: `<event>/<image>` -> ndarray[n, 5] `x y w h score`, finite, in any order and range of
            scores. Images that are missing have no detections, their faces still count. Ids that are not in
            the ground truth are not evaluated.

    Returns:
        WiderResult: AP is 0 for no detections, and also when all scores are one value: the protocol's
        normalisation is then 0 / 0. It is NaN for a subset without faces.
    """
    matched_gt, is_first, scores = _match(ground_truth, detections)
    score_range = (scores.min(), scores.max()) if len(scores) else (np.nan, np.nan)
    bins = _threshold_bins(scores, *score_range)

    def cumulated(selected: np.ndarray) -> np.ndarray:
        return np.cumsum(np.bincount(bins[selected], minlength=_NUM_THRESHOLDS + 1)[:_NUM_THRESHOLDS])

    countable = matched_gt != _NOT_COUNTED
    unmatched = cumulated(countable & (matched_gt == _UNMATCHED))
    curves, num_faces = {}, {}
    for name, kept in ground_truth.subsets.items():
        on_kept_face = countable & (matched_gt >= 0)
        on_kept_face[on_kept_face] = kept[matched_gt[on_kept_face]]
        num_faces[name] = int(kept.sum())
        num_hits, num_counted = cumulated(on_kept_face & is_first), cumulated(on_kept_face) + unmatched
        curves[name] = PrecisionRecallCurve.from_counts(num_hits, num_counted, num_faces[name])
    known = [len(detections[image_id]) for image_id in ground_truth.image_ids if image_id in detections]
    return WiderResult(
        curves,
        num_faces,
        num_detections=len(scores),
        score_range=(float(score_range[0]), float(score_range[1])),
        num_images=len(ground_truth.image_ids),
        missing=[image_id for image_id in ground_truth.image_ids if image_id not in detections],
        num_empty=known.count(0),
        num_unknown=len(detections) - len(known),
    )


def _match(
    ground_truth: WiderGroundTruth, detections: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps 1, 4 and 5 of the protocol, which do not depend on the subset.

    Returns:
        matched_gt (ndarray[N]): int64 index of the face in `ground_truth.boxes`, or `_UNMATCHED`,
            `_NOT_COUNTED`.
        is_first (ndarray[N]): bool, the first detection of its face.
        scores (ndarray[N]): float64.
    """
    matched, first, scores = [np.zeros(0, np.int64)], [np.zeros(0, bool)], [np.zeros(0)]
    for i, image_id in enumerate(track(ground_truth.image_ids, "matching")):
        rows = np.asarray(detections.get(image_id, ()), dtype=np.float64).reshape(-1, 5)
        if not len(rows):
            continue
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        start, end = ground_truth.offsets[i : i + 2]
        best = np.full(len(rows), _UNMATCHED if end > start else _NOT_COUNTED, dtype=np.int64)
        if end > start:
            boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)
            step = max(1, _IOU_CHUNK // int(end - start))
            for at in range(0, len(boxes), step):
                ious = pixel_iou(ground_truth.boxes[start:end], boxes[at : at + step])
                chunk = ious.argmax(axis=0)
                hit = ious[chunk, np.arange(len(chunk))] >= _IOU_THRESH
                best[at : at + step][hit] = start + chunk[hit]
        is_first = np.zeros(len(rows), dtype=bool)
        faces, first_rows = np.unique(best, return_index=True)
        is_first[first_rows[faces >= 0]] = True
        matched.append(best)
        first.append(is_first)
        scores.append(rows[:, 4])
    return np.concatenate(matched), np.concatenate(first), np.concatenate(scores)


def _threshold_bins(scores: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    """Steps 2 and 6: which of the T thresholds 1 - t / T each score (N,) passes first, from 0; T for none."""
    limits = np.finfo(np.float32)
    lowest = min(lowest, float(limits.max))
    highest = max(highest, float(limits.tiny))  # the tool's running maximum starts there: matters if all are <= 0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        normalized = (scores - lowest) / (highest - lowest)
    thresholds = 1 - np.arange(1, _NUM_THRESHOLDS + 1) / _NUM_THRESHOLDS
    bins = _NUM_THRESHOLDS - np.searchsorted(thresholds[::-1], normalized, side="right")
    return np.where(np.isnan(normalized), _NUM_THRESHOLDS, bins)
