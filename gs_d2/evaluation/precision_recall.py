"""The arithmetic that the protocols share: box overlap, precision-recall curves, average precision."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


def pixel_iou(gt_boxes: np.ndarray, boxes: np.ndarray, *, touching: bool = True) -> np.ndarray:
    """IoU of boxes whose corners are pixel indices, both inclusive: a box covers (w + 1) * (h + 1) pixels.

    This "+1" is part of the WIDER FACE and of the face-eval protocols and belongs nowhere else; training uses
    `gs_d2.ops.box_iou`.

    Args:
        gt_boxes (ndarray[M, 4]): float64 (x1, y1, x2, y2). Zero or negative sizes are allowed.
        boxes (ndarray[N, 4]): alike.
        touching: whether boxes that share only a border overlap (WIDER FACE: yes; face-eval: no).

    Returns:
        ndarray[M, N]: float64 in [0, 1]; 0 for pairs that do not overlap. Nothing is NaN for finite boxes.
    """
    x1, y1, x2, y2 = boxes.T
    gx1, gy1, gx2, gy2 = gt_boxes.T[:, :, None]
    width = np.minimum(gx2, x2) - np.maximum(gx1, x1)
    height = np.minimum(gy2, y2) - np.maximum(gy1, y1)
    least = -1.0 if touching else 0.0
    overlaps = (width > least) & (height > least)
    intersection = (width + 1) * (height + 1)
    # Pairs without overlap may divide by 0 (two boxes of width -1), and absurd coordinates may overflow to
    # inf.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        gt_areas = (gx2 - gx1 + 1) * (gy2 - gy1 + 1)
        areas = (x2 - x1 + 1) * (y2 - y1 + 1)
        ious = intersection / (areas + gt_areas - intersection)
    return np.where(overlaps, ious, 0.0)


def all_points_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the monotone envelope of a precision-recall curve (VOC 2010 and later, "all points").

    Step 8 of the WIDER FACE protocol; face-eval uses the same.

    Args:
        recall (ndarray[T]): in [0, 1], not decreasing.
        precision (ndarray[T]): in [0, 1]; NaN (0 / 0, no detection yet) counts as 0.

    Returns:
        float: in [0, 1]; 0 for T = 0; NaN if the recall is NaN, i.e. there was no face to find.
    """
    recall = np.asarray(recall, dtype=np.float64)
    if np.isnan(recall).any():
        return float("nan")
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([0.0], np.asarray(precision, dtype=np.float64), [0.0]))
    envelope = np.fmax.accumulate(precision[::-1])[::-1]  # fmax skips NaN, as MATLAB's max does
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * envelope[steps]))


class PrecisionRecall(NamedTuple):
    """What the detections above one score threshold are worth.

    Attributes:
        precision: in [0, 1], the share of hits among the detections that count; NaN where none counts.
        recall: in [0, 1], the share of the faces that are found; NaN where there is no face to find.
    """

    precision: float
    recall: float

    @classmethod
    def from_counts(cls, num_hits: int, num_detections: int, num_faces: int) -> "PrecisionRecall":
        """From the detections that found a face, those that count, and all faces."""
        precision = num_hits / num_detections if num_detections else float("nan")
        return cls(precision, num_hits / num_faces if num_faces else float("nan"))


@dataclass(frozen=True)
class PrecisionRecallCurve:
    """A precision-recall curve, from the highest score threshold to the lowest.

    Attributes:
        recall (ndarray[T]): float64 in [0, 1], not decreasing; all NaN where there is no face to find.
        precision (ndarray[T]): float64 in [0, 1]; NaN where nothing was detected yet.
    """

    recall: np.ndarray
    precision: np.ndarray

    @classmethod
    def from_counts(cls, num_hits: np.ndarray, num_detections: np.ndarray, num_faces: int):
        """From cumulative counts (T,): detections that found a face, detections that count, and all faces."""
        num_hits = np.asarray(num_hits, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return cls(recall=num_hits / np.float64(num_faces), precision=num_hits / num_detections)

    @property
    def ap(self) -> float:
        """Average precision as a fraction, see `all_points_ap`."""
        return all_points_ap(self.recall, self.precision)
