"""Calibration of scores by anchor scale."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_d2.config import load_config
from gs_d2.modeling.calibration import ScaleCalibration, calibrate_head, fit_calibration

SCALES = [16.0, 32.0, 64.0]


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def simulated(rng, scale, gain, offset, num=20_000):
    """Logits, scales and faces of detections whose calibration is known."""
    logits = rng.normal(size=num) * 2
    return logits, np.full(num, scale), rng.random(num) < 1 / (1 + np.exp(-(gain * logits + offset)))


def test_finds_the_gain_and_offset_of_each_scale(rng):
    true = {16.0: (2.0, -2.0), 32.0: (0.5, 0.0), 64.0: (1.0, 1.5)}
    detections = [np.concatenate(x) for x in zip(*(simulated(rng, k, *v) for k, v in true.items()), strict=True)]
    found = fit(*detections, prior=0.0)
    assert found.scales == SCALES
    for scale, gain, offset in zip(*found, strict=True):
        assert (gain, offset) == pytest.approx(true[scale], abs=0.15)


def test_calibrated_scores_have_the_mean_of_the_truth(rng):
    """What maximum likelihood with an offset gives, whatever the detections are like."""
    logits, scales = rng.normal(size=3000), rng.choice(SCALES, 3000)
    is_face = logits**3 + 4 * rng.normal(size=3000) > 2
    found = fit(logits, scales, is_face, prior=0.0)
    for scale, gain, offset in zip(*found, strict=True):
        rows = scales == scale
        assert (1 / (1 + np.exp(-gain * logits[rows] - offset))).mean() == pytest.approx(is_face[rows].mean(), abs=1e-6)


def test_a_scale_without_faces_gets_the_fit_of_all(rng):
    logits, scales, is_face = simulated(rng, 16.0, 2.0, -1.0)
    found = fit(np.append(logits, [0.5]), np.append(scales, [60.0]), np.append(is_face, [False]), prior=50.0)
    assert found.gains[1:] == pytest.approx([found.gains[0]] * 2, rel=0.05)
    assert found.offsets[1:] == pytest.approx([found.offsets[0]] * 2, rel=0.05)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.integers(2, 60))
@settings(max_examples=50, deadline=None)
def test_the_order_within_a_scale_stays(seed, spread, num):
    rng = np.random.default_rng(seed)
    is_face = rng.random(num) < 0.5
    is_face[:2] = True, False
    found = fit(rng.normal(size=num) * spread, rng.choice(SCALES, num), is_face)
    assert min(found.gains) > 0 and np.isfinite([found.gains, found.offsets]).all()


@pytest.mark.parametrize("is_face", [[True, True], [False, False]])
def test_both_kinds_are_needed(is_face):
    with pytest.raises(ValueError, match=f"{sum(is_face)} of 2 detections are faces; both kinds are needed"):
        fit([0.0, 1.0], [16.0, 16.0], is_face)


@pytest.mark.parametrize("head", ["SoftmaxRPNHead", "DilatedRPNHead"])
def test_the_model_then_gives_calibrated_logits(head):
    model = small_model("MODEL.RPN.HEAD_NAME", head, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 2.0]])
    rpn = model.proposal_generator
    for name, weight in rpn.rpn_head.named_parameters():
        if name.startswith("objectness_logits"):
            torch.nn.init.normal_(weight)
    features = {"p2": torch.randn(1, 32, 5, 7, generator=torch.Generator().manual_seed(0))}
    calibration = ScaleCalibration([16.0, 32.0, 64.0, 128.0], [2.0, 0.5, 1.5, 1.0], [-1.0, 0.25, 0.0, 3.0])
    with torch.no_grad():
        anchors, before, _ = rpn.predict(features)
        calibrate_head(rpn, calibration)
        _, after, _ = rpn.predict(features)
    scales = (anchors[:, 2:] - anchors[:, :2]).prod(dim=1).sqrt()
    for scale, gain, offset in zip(*calibration, strict=True):
        rows = (scales - scale).abs() < 1
        assert rows.sum() == 5 * 7 * 2
        torch.testing.assert_close(logit(after)[:, rows], gain * logit(before)[:, rows] + offset)


def test_other_scales_and_several_maps_are_refused():
    rpn = small_model().proposal_generator
    with pytest.raises(ValueError, match=r"has the anchor scales \[8.0\], the model \[16.0, 32.0, 64.0, 128.0\]"):
        calibrate_head(rpn, ScaleCalibration([8.0], [1.0], [0.0]))
    rpn = small_model(
        "MODEL.RPN.IN_FEATURES", ["p2", "p3"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32]]
    ).proposal_generator
    with pytest.raises(ValueError, match="must predict from one feature map, it has 2"):
        calibrate_head(rpn, ScaleCalibration([16.0, 32.0], [1.0, 1.0], [0.0, 0.0]))


def fit(logits, scales, is_face, **options):
    return fit_calibration(torch.tensor(logits), torch.tensor(scales), torch.tensor(is_face), SCALES, **options)


def logit(logits):
    return logits[..., 1] - logits[..., 0]


def small_model(*opts):
    opts = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.DEVICE", "cpu", *opts]
    return build_model(load_config("configs/quick/demo.yaml", opts)).eval()
