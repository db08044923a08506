"""The WIDER FACE protocol: average precision on easy, medium, hard, All, by attribute and by size of the faces.

Agrees with the official MATLAB toolbox and with its Python port. Where those two differ we do as MATLAB does:
rows are sorted by score, any range of scores is accepted, an image without a file has no detections.
Arithmetic is float64 throughout, as in the port (MATLAB normalises scores in single precision). Precision and recall
at score thresholds, and results by height, are ours: they need the same matches only.

Shape shorthand in this module:
    I: number of images, M: ground-truth boxes of all images, N: detections of all images, T: the 1000
        thresholds
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from gs_d2.evaluation.curves import plot_pr_curves, save_curves
from gs_d2.evaluation.precision_recall import PrecisionRecall, PrecisionRecallCurve, pixel_iou
from gs_d2.evaluation.report import Result, Scores, format_table, json_number, percent
from gs_d2.formats.progress import track
from gs_d2.formats.wider_face import ATTRIBUTES, OFFICIAL_SUBSETS, WiderGroundTruth

# The subsets on which the outputs of one anchor scale are evaluated: the columns of Table 7.
SCALE_SUBSETS = (*OFFICIAL_SUBSETS, "all")

SCORE_THRESHOLDS = (0.3, 0.5, 0.7)
HEIGHTS = (10, 16, 32, 64, 128, 256)  # pixels: WIDER leaves out faces below 10 px, the others are scales of anchors

_HEIGHT = "height."
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
        curves: subset -> `PrecisionRecallCurve` over the T thresholds; `.ap` is the metric, a fraction. Subsets are
            those of the ground truth, and `height.<low>-<high>` for faces of low <= height < high pixels, where high
            is `up` for the largest.
        num_faces: subset -> number of faces that count.
        at_scores: score threshold -> subset -> `PrecisionRecall` of the detections of at least this score.
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
    at_scores: dict[float, dict[str, PrecisionRecall]] = field(default_factory=dict)
    by_scale: dict[int, "WiderResult"] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """AP in percent of each subset there is, and of each anchor scale as "<subset>@<scale>"."""
        metrics = {name: 100 * self.curves[name].ap for name in _TITLES if name in self.curves}
        return metrics | {name: 100 * ap for name, ap in self._scale_aps()}

    def table(self) -> str:
        """AP and number of faces of every subset with precision and recall at each score threshold, in percent.

        Attributes have no precision: a false alarm has none of them. A second table has AP by anchor scale where there
        are any.
        """
        rows = [self._row(_TITLES[name], name) for name in _TITLES if name in self.curves]
        for attribute, values in ATTRIBUTES.items():
            annotated = [value for value in values if self.num_faces.get(f"{attribute}.{value}")]
            for value in annotated if len(annotated) > 1 else ():  # a list without this attribute has one value for all
                rows.append(self._row(f"{attribute}: {value}", f"{attribute}.{value}"))
        rows += [self._row(f"height: {bin}", f"{_HEIGHT}{bin}") for bin in self._height_bins()]
        points = [f"{letter}@{score:g}" for score in self.at_scores for letter in "PR"]
        lines = [format_table(["subset", "AP", "faces", *points], rows)]
        if self.at_scores:
            lines.append("P@s and R@s: precision and recall of the detections with a score of at least s.")
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
        """AP, precision and recall as fractions 0..1, null for a subset without faces or without ground truth."""
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
            "heights": {bin: json_number(self.curves[f"{_HEIGHT}{bin}"].ap) for bin in self._height_bins()},
            "at_scores": {
                f"{score:g}": {
                    name: {
                        key: json_number(x)
                        for key, x in point._asdict().items()
                        if key == "recall" or _has_alarms(name)
                    }
                    for name, point in points.items()
                }
                for score, points in self.at_scores.items()
            },
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

    def _row(self, title: str, name: str) -> list[str]:
        row = [title, percent(self.curves[name].ap), str(self.num_faces[name])]
        for points in self.at_scores.values():
            row += [percent(points[name].precision) if _has_alarms(name) else "", percent(points[name].recall)]
        return row

    def _height_bins(self) -> list[str]:
        return [name.removeprefix(_HEIGHT) for name in self.curves if name.startswith(_HEIGHT)]

    def _scale_aps(self) -> Iterator[tuple[str, float]]:
        for scale, result in self.by_scale.items():
            yield from ((f"{name}@{scale}", result.curves[name].ap) for name in SCALE_SUBSETS if name in result.curves)


def _has_alarms(subset: str) -> bool:
    """Whether false alarms can be of this subset: they have no attribute."""
    return subset.partition(".")[0] not in ATTRIBUTES


def evaluate_wider_face(
    ground_truth: WiderGroundTruth,
    detections: Mapping[str, np.ndarray],
    *,
    score_thresholds: Sequence[float] = SCORE_THRESHOLDS,
    heights: Sequence[float] = HEIGHTS,
) -> WiderResult:
    """Evaluates one set of predictions on every subset of the ground truth (PROTOCOLS D.1).

    An IoU of 0.5 (boxes with "+1") is needed. A detection belongs to the face of highest IoU, the first on
    ties, among all annotated faces. The first detection of a face in order of score is a hit, the others are
    false alarms; detections whose face the subset ignores are dropped. Equal scores keep the order given.

    By height the faces of other heights are ignored, and so are false alarms whose own height is another one, as COCO
    does for areas: otherwise the many small false alarms would count against the large faces.

    Args:
        ground_truth: the annotated faces.
        detections: `<event>/<image>` -> ndarray[n, 5] `x y w h score`, finite, in any order and range of
            scores. Images that are missing have no detections, their faces still count. Ids that are not in
            the ground truth are not evaluated.
        score_thresholds: scores at which precision and recall are given, in the detector's own range.
        heights: rising limits in pixels between bins of heights; the first bin begins at 0, the last has no end. Empty:
            no results by height.

    Returns:
        WiderResult: AP is 0 for no detections, and also when all scores are one value: the protocol's
        normalisation is then 0 / 0. It is NaN for a subset without faces.

    Raises:
        ValueError: `heights` do not rise, or a threshold is NaN.
    """
    if any(np.isnan(score_thresholds)):
        raise ValueError(f"score_thresholds must be numbers, got {list(score_thresholds)}")
    if any(low >= high for low, high in pairwise([0, *heights])):
        raise ValueError(f"heights must be above 0 and rise, got {list(heights)}")
    matched_gt, is_first, scores, found_heights = _match(ground_truth, detections)
    score_range = (scores.min(), scores.max()) if len(scores) else (np.nan, np.nan)
    bins = _threshold_bins(scores, *score_range)

    def cumulated(selected: np.ndarray) -> np.ndarray:
        return np.cumsum(np.bincount(bins[selected], minlength=_NUM_THRESHOLDS + 1)[:_NUM_THRESHOLDS])

    is_unmatched = matched_gt == _UNMATCHED
    face_heights = ground_truth.boxes[:, 3] - ground_truth.boxes[:, 1]
    subsets = {name: (kept, is_unmatched) for name, kept in ground_truth.subsets.items()}
    for low, high in pairwise([0, *heights, np.inf]) if len(heights) else ():
        subsets[f"{_HEIGHT}{low:g}-{'up' if high == np.inf else f'{high:g}'}"] = (
            (face_heights >= low) & (face_heights < high),
            is_unmatched & (found_heights >= low) & (found_heights < high),
        )
    curves, num_faces = {}, {}
    at_scores = {float(threshold): {} for threshold in score_thresholds}
    for name, (kept, false_alarms) in subsets.items():
        on_kept_face = matched_gt >= 0
        on_kept_face[on_kept_face] = kept[matched_gt[on_kept_face]]
        num_faces[name] = int(kept.sum())
        hits, counted = on_kept_face & is_first, on_kept_face | false_alarms
        curves[name] = PrecisionRecallCurve.from_counts(cumulated(hits), cumulated(counted), num_faces[name])
        for threshold, points in at_scores.items():
            above = scores >= threshold
            points[name] = PrecisionRecall.from_counts((hits & above).sum(), (counted & above).sum(), num_faces[name])
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
        at_scores=at_scores,
    )


def _match(
    ground_truth: WiderGroundTruth, detections: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps 1, 4 and 5 of the protocol, which do not depend on the subset.

    Returns:
        matched_gt (ndarray[N]): int64 index of the face in `ground_truth.boxes`, or `_UNMATCHED`,
            `_NOT_COUNTED`.
        is_first (ndarray[N]): bool, the first detection of its face.
        scores (ndarray[N]), heights (ndarray[N]): float64.
    """
    matched, first = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    scores, heights = [np.zeros(0)], [np.zeros(0)]
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
        heights.append(rows[:, 3])
    return np.concatenate(matched), np.concatenate(first), np.concatenate(scores), np.concatenate(heights)


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
