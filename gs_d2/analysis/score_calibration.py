"""Detections of a data set with the truth about each, from which scores are calibrated by anchor scale."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gs_d2 import ops
from gs_d2.analysis.hits import match_detections
from gs_d2.data.records import faces_of
from gs_d2.modeling.calibration import ScaleCalibration, fit_calibration
from gs_d2.sampling import group_by_scale

_MAX_LOGIT = 30.0  # a probability that rounds to 0 or 1 has no finite one


def judge(boxes: np.ndarray, gt_boxes: np.ndarray, ignore_boxes: np.ndarray) -> np.ndarray:
    """Which detections of an image are faces, by :func:`gs_d2.analysis.hits.match_detections`.

    Args:
        boxes: [N, 4], XYXY, by falling score.
        gt_boxes, ignore_boxes: [M, 4], [K, 4].

    Returns:
        int8 [N]: 1 for a face; 0 for a false alarm, such as a second detection of a face; -1 for a detection that is no
        face and has an IoU of at least 0.5 with a region to ignore.
    """
    _, found = match_detections(gt_boxes, boxes)
    labels = found.astype(np.int8)
    if len(ignore_boxes) and len(boxes):
        ious = ops.box_iou(torch.from_numpy(np.float32(boxes)), torch.from_numpy(np.float32(ignore_boxes))).numpy()
        labels[~found & (ious.max(axis=1) >= 0.5)] = -1
    return labels


class JudgedDetections(NamedTuple):
    """What a detector finds on one image, and the truth about it; without detections on ignore regions.

    Attributes:
        boxes (float32 Tensor[N, 4]): XYXY, by falling score.
        logits (float64 Tensor[N]): of the scores, clamped to be finite.
        scales (Tensor[N]): anchor scales in pixels.
        is_face (bool Tensor[N]): see :func:`judge`.
        gt_boxes (ndarray[M, 4]): XYXY, the faces of the image.
    """

    boxes: Tensor
    logits: Tensor
    scales: Tensor
    is_face: Tensor
    gt_boxes: np.ndarray


@torch.no_grad()
def judged_detections(model, images: Iterable[tuple[dict, dict]]) -> list[JudgedDetections]:
    """Runs a detector on images.

    Args:
        model: in eval mode; a detector whose detections have `anchor_scales`, such as :class:`RPNDetector`.
        images: what the model takes of each image, and its dataset dict, of which :func:`faces_of` reads the boxes.
    """
    judged = []
    for inputs, dataset_dict in images:
        found = model([inputs])[0]["instances"].to("cpu")
        gt_boxes, ignore, _ = faces_of(dataset_dict)
        truth = torch.from_numpy(judge(found.pred_boxes.tensor.numpy(), gt_boxes[~ignore], gt_boxes[ignore]))
        found, truth = found[truth >= 0], truth[truth >= 0]
        logits = found.scores.double().logit().clamp(-_MAX_LOGIT, _MAX_LOGIT)
        judged.append(
            JudgedDetections(found.pred_boxes.tensor, logits, found.anchor_scales, truth == 1, gt_boxes[~ignore])
        )
    return judged


def calibration_of(found: list[JudgedDetections], scales: list[float]) -> tuple[ScaleCalibration, list]:
    """Fits a calibration to what a detector finds.

    Args:
        scales: the detector's anchor scales, ascending, in pixels.

    Returns:
        The calibration; and for each scale (number of detections, number of those that are faces).

    Raises:
        ValueError: see :func:`gs_d2.modeling.calibration.fit_calibration`.
    """
    logits, of_scale, is_face = (
        torch.cat([getattr(x, name) for x in found]) if found else torch.empty(0)
        for name in ("logits", "scales", "is_face")
    )
    calibration = fit_calibration(logits, of_scale, is_face, scales)
    scale_idxs = group_by_scale(of_scale, scales)
    of_scales = [is_face[scale_idxs == i] for i in range(len(scales))]
    return calibration, [(len(x), int(x.sum())) for x in of_scales]
