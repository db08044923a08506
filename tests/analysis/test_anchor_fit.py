"""Faces matched to a config's anchors: against the slow reference of matching, and by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gs_d2.analysis.anchor_fit import AnchorFit, _fit_of_view, anchor_fit
from gs_d2.analysis.views import ViewAnchors
from gs_d2.ops import reference

CONFIG = Path(__file__).resolve().parents[2] / "configs/wider_gs.yaml"


@pytest.fixture(scope="module")
def anchors():
    return ViewAnchors(CONFIG)


def faces(*boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def test_by_hand(anchors):
    """Anchors of 16 px every 4 px from 2 px on: a face on one, one of half its width, and one far too small."""
    fit = _fit_of_view(anchors, (64, 64), faces([10, 10, 26, 26], [34, 30, 42, 46], [50, 50, 53, 53]))
    assert fit.best_ious.tolist() == [1.0, 0.5, pytest.approx(9 / 256)]
    assert fit.num_first_pass.tolist() == [5, 0, 0], "itself, and its four neighbours of IoU 0.6"
    assert fit.num_positives.tolist() == [5, 1, 0], "the second pass gives the narrow one an anchor"
    assert fit.widths.tolist() == [16, 8, 3] and fit.heights.tolist() == [16, 16, 3]


def test_equals_the_reference(anchors):
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(0, 150, (30, 2)), rng.uniform(5, 60, (30, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + sides], axis=1).astype(np.float32))
    fit, all_anchors = _fit_of_view(anchors, (192, 160), boxes), anchors.anchors((192, 160))
    for second_pass, numbers in (("none", fit.num_first_pass), ("best", fit.num_positives)):
        idxs, labels, _ = reference.two_pass_match(boxes, all_anchors, second_pass=second_pass)
        assert numbers.tolist() == [int(((idxs == j) & (labels == 1)).sum()) for j in range(30)]
    torch.testing.assert_close(torch.from_numpy(fit.best_ious), reference.box_iou(boxes, all_anchors).amax(dim=1))


def test_a_view_without_faces(anchors):
    assert [x.shape for x in _fit_of_view(anchors, (64, 64), faces())] == [(0,)] * 5


def test_views_are_those_of_training(generated_train, anchors):
    fit = anchor_fit(anchors, generated_train)
    assert len(fit.heights) > 6 and (fit.num_first_pass <= fit.num_positives).all() and fit.num_positives.any()
    for again, equal in (
        (anchor_fit(anchors, generated_train), True),
        (anchor_fit(anchors, generated_train, seed=1), False),
    ):
        assert np.array_equal(again.heights, fit.heights) == equal
    assert len(anchor_fit(anchors, generated_train, num_images=2).heights) < len(fit.heights)


def test_summary():
    ones, numbers = np.ones(4, np.float32), np.array([0, 0, 2, 7])
    fit = AnchorFit(ones, ones, numbers, np.maximum(numbers, [0, 1, 0, 0]), np.float32([0.2, 0.4, 0.6, 0.8]))
    summary = fit.summary(np.ones(4, bool))
    assert summary == {
        "faces": 4,
        "without_first_pass": 0.5,
        "without_anchor": 0.25,
        "median_positives": 1.5,
        "median_best_iou": pytest.approx(0.5),
    }
    empty = fit.summary(np.zeros(4, bool))
    assert empty.pop("faces") == 0 and all(np.isnan(value) for value in empty.values())
