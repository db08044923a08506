"""Detections with the truth about each: by hand, and with a detector that is known."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from gs_d2.analysis.score_calibration import calibration_of, judge, judged_detections

FACES = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10]])
REGION = np.array([[40.0, 0, 50, 10]])


def test_judge_by_hand():
    boxes = [[0, 0, 10, 10], [60, 0, 70, 10], [0, 0, 10, 9], [20, 0, 30, 4], [40, 0, 50, 9], [41, 0, 51, 10]]
    boxes = np.array(boxes, dtype=float)
    assert judge(boxes, FACES, REGION).tolist() == [1, 0, 0, 0, -1, -1]
    assert judge(boxes, FACES[:0], REGION[:0]).tolist() == [0] * 6
    assert judge(boxes[:0], FACES, REGION).tolist() == []


def test_a_face_on_an_ignore_region_is_a_face():
    assert judge(FACES[:1], FACES, FACES[:1]).tolist() == [1]


class Known:
    """Finds every face with the given probability, and as many false alarms as make that probability wrong."""

    def __call__(self, inputs):
        boxes = torch.tensor([[0.0, 0, 10, 10], [60, 0, 70, 10], [60, 20, 70, 30], [60, 40, 70, 50]])
        found = Instances((100, 100), pred_boxes=Boxes(boxes), scores=torch.tensor([0.9, 0.8, 0.8, 0.8]))
        found.anchor_scales = torch.tensor([16.0, 16, 16, 33])
        return [{"instances": found}]


def test_calibration_of_a_detector_that_is_too_sure():
    image = {}, {"gt_boxes": FACES, "gt_ignore": np.array([False, False])}
    calibration, counts = calibration_of(judged_detections(Known(), [image] * 200), [16.0, 32.0])
    assert counts == [(600, 200), (200, 0)]
    gain, offset = calibration.gains[0], calibration.offsets[0]
    probability = {p: 1 / (1 + np.exp(-gain * np.log(p / (1 - p)) - offset)) for p in (0.9, 0.8)}
    assert probability[0.9] > 0.9 and probability[0.8] < 0.1


def test_scores_that_round_to_one_count():
    class Sure(Known):
        def __call__(self, inputs):
            (output,) = super().__call__(inputs)
            output["instances"].scores[:] = torch.tensor([1.0, 0.5, 0.0, 0.5])
            return [output]

    image = {}, {"gt_boxes": FACES, "gt_ignore": np.array([False, True])}
    calibration, _ = calibration_of(judged_detections(Sure(), [image]), [16.0, 32.0])
    assert np.isfinite([calibration.gains, calibration.offsets]).all()


def test_without_images():
    with pytest.raises(ValueError, match="0 of 0 detections are faces"):
        calibration_of([], [16.0])
