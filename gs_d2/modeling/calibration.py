"""Scores that mean the same at every anchor scale: a gain and an offset for the logits of each.

Group sampling trains every scale on positives : negatives = 1 : 3, and WRS on its hard samples, however rare faces of
that size are. So a score of 0.5 is a face more often at one scale than at another, and detections of all scales are
ranked together, by NMS and by average precision. Calibration (Platt's scaling, one for each scale) makes the score the
probability that a detection is a face. It is part of the weights afterwards: it costs nothing at test.
"""

from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor, nn

_IOU = 0.5  # from which a detection is a face, as in WIDER FACE's protocol
_MAX_STEPS = 50
_MIN_GAIN = 0.1  # the order of a scale's detections must stay


class ScaleCalibration(NamedTuple):
    """The calibrated logit of a detection is gain * logit + offset, by its anchor scale.

    Attributes:
        scales (list[float]): anchor scales in pixels, ascending.
        gains, offsets (list[float]): of each scale; gains are positive.
    """

    scales: list[float]
    gains: list[float]
    offsets: list[float]


def hits(boxes: Tensor, scores: Tensor, gt_boxes: Tensor, ignore_boxes: Tensor) -> Tensor:
    """Which detections of an image are faces.

    By falling score each detection takes the face that it overlaps most, from an IoU of 0.5. A second detection of a
    face is a false alarm.

    Args:
        boxes (Tensor[N, 4]), scores (Tensor[N]): detections; XYXY.
        gt_boxes (Tensor[M, 4]), ignore_boxes (Tensor[K, 4])

    Returns:
        int8 Tensor[N]: 1 for a face, 0 for a false alarm, -1 for a detection that overlaps an ignore region most.
    """
    labels = torch.zeros(len(boxes), dtype=torch.int8)
    if len(gt_boxes) + len(ignore_boxes) == 0:
        return labels
    ious, matched = pairwise_iou(Boxes(boxes), Boxes(torch.cat([gt_boxes, ignore_boxes]))).max(dim=1)
    taken = set()
    for i in scores.argsort(descending=True, stable=True).tolist():
        face = int(matched[i])
        if ious[i] >= _IOU and face not in taken:
            labels[i] = 1 if face < len(gt_boxes) else -1
            if face < len(gt_boxes):
                taken.add(face)
    return labels


def fit_calibration(
    logits: np.ndarray, scales: np.ndarray, is_face: np.ndarray, anchor_scales: list[float], prior: float = 10.0
) -> ScaleCalibration:
    """Fits gains and offsets by maximum likelihood (logistic regression).

    Args:
        logits (float [N]): of detections of many images.
        scales (float [N]): their anchor scales; the nearest of `anchor_scales` counts.
        is_face (bool [N])
        anchor_scales: positive, ascending, in pixels.
        prior: strength of the pull towards the fit to all detections, as a number of detections: scales with few
            detections, or without any face, get close to that.

    Raises:
        ValueError: no detection is a face, or all are.
    """
    is_face = np.asarray(is_face, dtype=np.float64)
    if not 0 < is_face.sum() < len(is_face):
        raise ValueError(f"{int(is_face.sum())} of {len(is_face)} detections are faces; both kinds are needed")
    nearest = np.abs(np.log2(np.asarray(scales)[:, None]) - np.log2(anchor_scales)).argmin(axis=1)
    logits = np.asarray(logits, dtype=np.float64)
    pooled = _logistic_regression(logits, is_face, np.array([1.0, 0.0]), 1e-6)
    fits = [_logistic_regression(logits[nearest == i], is_face[nearest == i], pooled, prior)
            for i in range(len(anchor_scales))]  # fmt: skip
    return ScaleCalibration(list(anchor_scales), [float(x[0]) for x in fits], [float(x[1]) for x in fits])


def _logistic_regression(x: np.ndarray, y: np.ndarray, start: np.ndarray, pull: float) -> np.ndarray:
    """Newton's method for the log loss of gain * x + offset, plus pull / 2 times the squared distance from `start`."""
    design, fit = np.stack([x, np.ones_like(x)], axis=1), start.copy()

    def loss(fit):
        z = design @ fit
        return np.logaddexp(0, z).sum() - y @ z + pull / 2 * ((fit - start) ** 2).sum()

    for _ in range(_MAX_STEPS):
        p = 0.5 * (1 + np.tanh(design @ fit / 2))
        gradient = design.T @ (p - y) + pull * (fit - start)
        step = np.linalg.solve((design.T * (p * (1 - p))) @ design + pull * np.eye(2), gradient)
        size = 1.0
        while size > 1e-6 and loss(fit - size * step) > loss(fit):
            size /= 2
        fit = fit - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    fit[0] = max(fit[0], _MIN_GAIN)
    return fit


@torch.no_grad()
def calibrate_head(proposal_generator: nn.Module, calibration: ScaleCalibration) -> None:
    """Puts a calibration into the weights of the layers that predict logits; in place.

    Args:
        proposal_generator: a :class:`GroupSamplingRPN` whose head predicts from a single feature map by convolutions
            named `objectness_logits`, background and face of each anchor in turn, as all heads here do.

    Raises:
        ValueError: the model has other anchor scales, or several feature maps, whose anchors share weights.
    """
    generator, head = proposal_generator.anchor_generator, proposal_generator.rpn_head
    if generator.scales != list(calibration.scales):
        raise ValueError(f"the calibration has the anchor scales {calibration.scales}, the model {generator.scales}")
    if len(generator.num_anchors) != 1:
        raise ValueError(f"the detector must predict from one feature map, it has {len(generator.num_anchors)}")
    distances = torch.tensor(generator.cell_scales[0]).log2()[:, None] - torch.tensor(calibration.scales).log2()
    scale_idxs = distances.abs().argmin(dim=1)
    gains = torch.tensor(calibration.gains)[scale_idxs].repeat_interleave(2)
    offsets = torch.tensor(calibration.offsets)[scale_idxs]
    offsets = torch.stack([torch.zeros_like(offsets), offsets], dim=1).flatten()  # background, face
    layers = head.objectness_logits if isinstance(head.objectness_logits, nn.ModuleList) else [head.objectness_logits]
    sizes = [layer.out_channels for layer in layers]
    for layer, gain, offset in zip(layers, gains.split(sizes), offsets.split(sizes), strict=True):
        gain, offset = gain.to(layer.bias), offset.to(layer.bias)
        layer.weight.mul_(gain[:, None, None, None])
        layer.bias.mul_(gain).add_(offset)
