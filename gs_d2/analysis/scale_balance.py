"""Scores of the anchor scales balanced against each other, so that faces of every size are found with few false alarms.

A calibrated score is a probability, and ranks detections well as long as faces of all sizes count. Where only large
faces count, as in the easy subset of WIDER FACE or for a user with a portrait, it does not: there are far more places
for a small face than for a large one, and so most false alarms are small. Small detections then have to be surer than
large ones. How much surer is chosen here by average precision.
"""

from typing import NamedTuple

import numpy as np
import torch

from gs_d2.analysis.score_calibration import JudgedDetections
from gs_d2.evaluation.wider_face import evaluate_wider_face
from gs_d2.formats.wider_face import WiderGroundTruth
from gs_d2.modeling.calibration import ScaleCalibration
from gs_d2.sampling import group_by_scale

_STEPS = (1.0, 0.5, 0.25)  # of a logit
_LEAST_GAIN = 1e-4  # of mean average precision, below which a step is noise


def mean_ap(calibration: ScaleCalibration, found: list[JudgedDetections], min_heights: list[float]) -> float:
    """Average precision by the WIDER FACE protocol, a mean over subsets of faces.

    Args:
        calibration: of the scores.
        found: of each image, before calibration.
        min_heights: for each subset the height in pixels that a face must have to count; smaller faces are ignored.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: a subset has no face.
    """
    return _mean_ap(_ground_truth(found, min_heights), _rows(found, calibration.scales), calibration, min_heights)


def balance(calibration: ScaleCalibration, found: list[JudgedDetections], min_heights: list[float]) -> ScaleCalibration:
    """Lowers the offsets of some scales so that :func:`mean_ap` is highest.

    One scale after the other moves by a logit, half and a quarter of one, as long as that helps: a local optimum. Only
    the differences between scales have a meaning, and the scale that is trusted most keeps its offset.

    Args:
        calibration: to begin with, of probabilities.
        found, min_heights: see :func:`mean_ap`. The order in which detections suppressed each other stays what it was.

    Returns:
        ScaleCalibration: with the same gains.

    Raises:
        ValueError: see :func:`mean_ap`.
    """
    ground_truth, rows = _ground_truth(found, min_heights), _rows(found, calibration.scales)

    def moved(shifts):
        offsets = [offset + shift - max(shifts) for offset, shift in zip(calibration.offsets, shifts, strict=True)]
        return calibration._replace(offsets=offsets)

    def value(shifts):
        return _mean_ap(ground_truth, rows, moved(shifts), min_heights)

    best, best_value = [0.0] * len(calibration.scales), None
    best_value = value(best)
    for step in _STEPS:
        improved = True
        while improved:
            improved = False
            for i in range(len(best)):
                for change in (-step, step):
                    shifts = [shift + change * (j == i) for j, shift in enumerate(best)]
                    if (new_value := value(shifts)) > best_value + _LEAST_GAIN:
                        best, best_value, improved = shifts, new_value, True
    return moved(best)


class OperatingPoint(NamedTuple):
    """A score threshold, as a logit, and what it gives: precision and recall in [0, 1]."""

    logit: float
    precision: float
    recall: float


def best_operating_point(calibration: ScaleCalibration, found: list[JudgedDetections]) -> OperatingPoint:
    """The threshold with the highest F1 over all faces; of equal ones the highest threshold.

    Raises:
        ValueError: no detection is a face.
    """
    logits = torch.from_numpy(
        np.concatenate([np.zeros(0), *_calibrated(_rows(found, calibration.scales), calibration)])
    )
    is_face = torch.cat([torch.zeros(0, dtype=torch.bool), *(image.is_face for image in found)])
    if not is_face.any():
        raise ValueError("no detection is a face")
    num_faces = sum(len(image.gt_boxes) for image in found)
    logits, order = logits.sort(descending=True, stable=True)
    hits, counted = is_face[order].cumsum(0).double(), torch.arange(1, len(order) + 1)
    f1 = 2 * hits / (counted + num_faces)
    f1[:-1][logits[:-1] == logits[1:]] = -1  # a threshold takes all detections of equal score or none
    best = int(f1.argmax())
    return OperatingPoint(float(logits[best]), float(hits[best] / counted[best]), float(hits[best] / num_faces))


def centre(calibration: ScaleCalibration, point: OperatingPoint) -> ScaleCalibration:
    """Moves all scales by the same offset, so that the threshold of an operating point is the score 0.5."""
    return calibration._replace(offsets=[offset - point.logit for offset in calibration.offsets])


def _ground_truth(found, min_heights) -> WiderGroundTruth:
    truth = WiderGroundTruth.from_boxes([str(i) for i in range(len(found))], [image.gt_boxes for image in found])
    heights = truth.boxes[:, 3] - truth.boxes[:, 1]
    for min_height in min_heights:
        truth.subsets[_subset(min_height)] = heights >= min_height
        if not (heights >= min_height).any():
            raise ValueError(f"the images have no face that is at least {min_height:g} px high")
    return truth


def _subset(min_height) -> str:
    return f"height {min_height:g}"


def _rows(found, scales) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each image x, y, w, h of its detections, their logits, and the indices of their scales."""
    rows = []
    for image in found:
        boxes = image.boxes.double().numpy()
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        rows.append((boxes, image.logits.numpy(), group_by_scale(image.scales, scales).numpy()))
    return rows


def _calibrated(rows, calibration) -> list[np.ndarray]:
    """The logits of each image after calibration."""
    gains, offsets = np.array(calibration.gains), np.array(calibration.offsets)
    return [gains[scale_idxs] * logits + offsets[scale_idxs] for _, logits, scale_idxs in rows]


def _mean_ap(ground_truth, rows, calibration, min_heights) -> float:
    detections = {}
    for i, ((boxes, _, _), logits) in enumerate(zip(rows, _calibrated(rows, calibration), strict=True)):
        scores = torch.sigmoid(torch.from_numpy(logits)).numpy()
        detections[str(i)] = np.concatenate([boxes, scores[:, None]], axis=1)
    curves = evaluate_wider_face(ground_truth, detections, score_thresholds=(), heights=()).curves
    return float(np.mean([curves[_subset(min_height)].ap for min_height in min_heights]))
