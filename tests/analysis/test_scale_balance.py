"""Balanced scales: against hand-made detectors whose small scale has many false alarms."""

import numpy as np
import pytest
import torch

from gs_d2.analysis.scale_balance import balance, best_operating_point, centre, mean_ap
from gs_d2.analysis.score_calibration import JudgedDetections
from gs_d2.modeling.calibration import ScaleCalibration

SCALES = [16.0, 64.0]
IDENTITY = ScaleCalibration(SCALES, [1.0, 1.0], [0.0, 0.0])


def image(small_logits, large_logit, num_small_faces=1):
    """One large face, found with a logit, and detections of small scale, of which the first are faces."""
    small = torch.tensor([[100.0 + 20 * i, 0, 110 + 20 * i, 10] for i in range(len(small_logits))])
    large = torch.tensor([[0.0, 0, 80, 80]])
    boxes = torch.cat([large, small])
    logits = torch.tensor([large_logit, *small_logits], dtype=torch.float64)
    is_face = torch.tensor([True] * (1 + num_small_faces) + [False] * (len(small) - num_small_faces))
    order = logits.argsort(descending=True, stable=True)
    scales = torch.tensor([64.0] + [16.0] * len(small))
    return JudgedDetections(boxes[order], logits[order], scales[order], is_face[order], boxes[is_face].numpy())


def test_small_detections_must_be_surer_where_small_faces_do_not_count():
    found = [image([2.0, 1.5, 1.0], large_logit) for large_logit in (0.0, 0.5, 3.0)]
    balanced = balance(IDENTITY, found, [50])
    assert mean_ap(IDENTITY, found, [50]) < 0.6
    assert mean_ap(balanced, found, [50]) == pytest.approx(1.0)
    assert balanced.gains == IDENTITY.gains and balanced.scales == SCALES
    assert balanced.offsets[0] <= -1.25 and balanced.offsets[1] == 0  # the scale that is trusted keeps its offset


def test_scales_that_need_no_balance_stay():
    found = [image([2.0, -3.0], 2.0), image([1.0, -3.0], 1.5)]
    assert mean_ap(IDENTITY, found, [50, 5]) == pytest.approx(1.0)
    assert balance(IDENTITY, found, [50, 5]) == IDENTITY


def test_it_begins_with_the_calibration():
    calibration = ScaleCalibration(SCALES, [2.0, 0.5], [-10.0, 3.0])
    found = [image([2.0, 1.5], 0.0), image([2.0, 1.5], 1.0)]
    assert mean_ap(calibration, found, [50]) == pytest.approx(1.0)
    assert balance(calibration, found, [50]) == calibration


def test_never_worse():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        logits = [torch.randn(6, generator=generator).tolist() for _ in range(8)]
        found = [image(x[1:], x[0], num_small_faces=2) for x in logits]
        for heights in ([50], [50, 5], [5]):
            balanced = balance(IDENTITY, found, heights)
            assert mean_ap(balanced, found, heights) >= mean_ap(IDENTITY, found, heights)
            assert max(balanced.offsets) == 0


def test_images_without_faces_or_detections():
    empty = JudgedDetections(
        torch.zeros(0, 4), torch.zeros(0).double(), torch.zeros(0), torch.zeros(0, dtype=torch.bool), np.zeros((0, 4))
    )
    found = [empty, image([2.0, 1.5], 0.0), image([1.0, 0.5], 0.7)]
    assert balance(IDENTITY, found, [50]).offsets[0] < 0


def test_a_height_that_no_face_has():
    with pytest.raises(ValueError, match="no face that is at least 500 px high"):
        balance(IDENTITY, [image([1.0], 1.0)], [50, 500])


def test_best_operating_point_by_hand():
    # by falling logit: face 2.5, face 2, false 1.5, face 1; a fourth face is not found
    found = [image([2.5], 2.0), image([1.5], 1.0, num_small_faces=0)]
    found[0] = found[0]._replace(gt_boxes=np.concatenate([found[0].gt_boxes, [[300.0, 0, 320, 20]]]))
    point = best_operating_point(IDENTITY, found)
    assert point == pytest.approx((1.0, 3 / 4, 3 / 4))
    centred = centre(IDENTITY, point)
    assert centred.offsets == [-1.0, -1.0]
    assert best_operating_point(centred, found) == pytest.approx((0.0, 3 / 4, 3 / 4))


def test_a_threshold_does_not_part_equal_scores():
    found = [image([1.0, 1.0, 1.0, 1.0], 2.0, num_small_faces=1)]
    assert best_operating_point(IDENTITY, found) == pytest.approx((2.0, 1.0, 0.5))


def test_no_operating_point_without_a_face():
    with pytest.raises(ValueError, match="no detection is a face"):
        best_operating_point(IDENTITY, [image([1.0], 1.0)._replace(is_face=torch.tensor([False, False]))])
