"""Scores that mean the same at every anchor scale: a gain and an offset for the logits of each.

Group sampling trains every scale on positives : negatives = 1 : 3, and WRS on its hard samples, however rare faces of
that size are. So a score of 0.5 is a face more often at one scale than at another, and detections of all scales are
ranked together, by NMS and by average precision. Calibration (Platt's scaling, one for each scale) makes the score the
probability that a detection is a face. It is part of the weights afterwards: it costs nothing at test.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gs_d2.sampling import group_by_scale

_MAX_STEPS, _MIN_STEP, _TOLERANCE = 50, 1e-6, 1e-9  # of Newton's method
_MIN_GAIN = 0.1


class ScaleCalibration(NamedTuple):
    """The calibrated logit of a detection is gain * logit + offset, by its anchor scale.

    Attributes:
        scales (list[float]): anchor scales in pixels, ascending.
        gains, offsets (list[float]): of each scale; gains are positive.
    """

    scales: list[float]
    gains: list[float]
    offsets: list[float]


def fit_calibration(
    logits: Tensor, scales: Tensor, is_face: Tensor, anchor_scales: list[float], prior: float = 10.0
) -> ScaleCalibration:
    """Fits gains and offsets by maximum likelihood (logistic regression).

    Args:
        logits (Tensor[N]): of detections of many images; finite.
        scales (Tensor[N]): their anchor scales in pixels; the nearest of `anchor_scales` counts.
        is_face (bool Tensor[N])
        anchor_scales: positive, ascending, in pixels.
        prior: strength of the pull towards the fit to all detections, as a number of detections: scales with few
            detections, or without any face, get close to that.

    Returns:
        ScaleCalibration: with gains of at least 0.1, so that the order of a scale's detections stays.

    Raises:
        ValueError: no detection is a face, or all are.
    """
    num_faces = int(is_face.sum())
    if not 0 < num_faces < len(is_face):
        raise ValueError(f"{num_faces} of {len(is_face)} detections are faces; both kinds are needed")
    logits, is_face = logits.double(), is_face.double()
    scale_idxs = group_by_scale(scales, anchor_scales)
    pooled = _logistic_regression(logits, is_face, torch.tensor([1.0, 0.0], dtype=torch.float64), 1e-6)
    fits = []
    for i in range(len(anchor_scales)):
        rows = scale_idxs == i
        gain, offset = _logistic_regression(logits[rows], is_face[rows], pooled, prior).tolist()
        fits.append((max(gain, _MIN_GAIN), offset))
    gains, offsets = zip(*fits, strict=True)
    return ScaleCalibration(list(anchor_scales), list(gains), list(offsets))


def _logistic_regression(x: Tensor, y: Tensor, start: Tensor, pull: float) -> Tensor:
    """Newton's method for the log loss of gain * x + offset, plus pull / 2 times the squared distance from `start`."""
    design, fit = torch.stack([x, torch.ones_like(x)], dim=1), start.clone()

    def loss(fit):
        z = design @ fit
        return F.softplus(z).sum() - y @ z + pull / 2 * ((fit - start) ** 2).sum()

    for _ in range(_MAX_STEPS):
        p = torch.sigmoid(design @ fit)
        gradient = design.T @ (p - y) + pull * (fit - start)
        hessian = (design.T * (p * (1 - p))) @ design + pull * torch.eye(2, dtype=torch.float64)
        step, size = torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0], 1.0
        while size > _MIN_STEP and loss(fit - size * step) > loss(fit):
            size /= 2
        fit = fit - size * step
        if (size * step).abs().max() < _TOLERANCE:
            break
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
    scale_idxs = group_by_scale(torch.tensor(generator.cell_scales[0]), calibration.scales)
    gains = torch.tensor(calibration.gains)[scale_idxs].repeat_interleave(2)
    offsets = torch.tensor(calibration.offsets)[scale_idxs]
    offsets = torch.stack([torch.zeros_like(offsets), offsets], dim=1).flatten()  # background, face
    layers = head.objectness_logits if isinstance(head.objectness_logits, nn.ModuleList) else [head.objectness_logits]
    sizes = [layer.out_channels for layer in layers]
    for layer, gain, offset in zip(layers, gains.split(sizes), offsets.split(sizes), strict=True):
        gain, offset = gain.to(layer.bias), offset.to(layer.bias)
        layer.weight.mul_(gain[:, None, None, None])
        layer.bias.mul_(gain).add_(offset)
