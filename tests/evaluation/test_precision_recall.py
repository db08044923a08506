"""Average precision, the overlap with +1, and curves on disk and on paper."""

import os

import numpy as np
import pytest

from gs_d2.evaluation.curves import load_curves, plot_pr_curves, save_curves
from gs_d2.evaluation.precision_recall import PrecisionRecallCurve, all_points_ap, pixel_iou


def test_ap_of_a_curve_done_by_hand():
    # Envelope: 1 up to recall 0.25, 0.75 up to 0.75, then nothing.
    assert all_points_ap([0.25, 0.25, 0.5, 0.75], [1.0, 0.5, 0.6, 0.75]) == pytest.approx(0.25 + 0.5 * 0.75)


@pytest.mark.parametrize(
    ("recall", "precision", "ap"),
    [
        ([], [], 0.0),
        ([0.0, 0.0], [np.nan, np.nan], 0.0),
        ([0.0, 1.0], [np.nan, 1.0], 1.0),
        ([0.5, 0.5], [1.0, 0.1], 0.5),
        ([1.0], [0.25], 0.25),
    ],
)
def test_ap_of_small_curves(recall, precision, ap):
    assert all_points_ap(recall, precision) == ap


def test_ap_without_faces_is_nan():
    curve = PrecisionRecallCurve.from_counts(np.zeros(3), np.arange(3), 0)
    assert np.isnan(curve.ap)


@pytest.mark.parametrize("seed", range(20))
def test_ap_against_its_definition(seed):
    """The area under max(precision at this recall or more), integrated step by step."""
    rng = np.random.default_rng(seed)
    recall = np.sort(rng.integers(0, 12, size=30)) / 12
    precision = np.where(rng.random(30) < 0.1, np.nan, rng.random(30))
    expected, previous = 0.0, 0.0
    for value in sorted(set(recall)):
        best = np.nanmax(precision[recall >= value], initial=0.0)
        expected += (value - previous) * best
        previous = value
    assert all_points_ap(recall, precision) == pytest.approx(expected, abs=1e-12)


def literal_iou(a, b, touching):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if (width + 1 <= 0 or height + 1 <= 0) if touching else (width <= 0 or height <= 0):
        return 0.0
    intersection = (width + 1) * (height + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return intersection / (sum(areas) - intersection)


@pytest.mark.parametrize("touching", [True, False])
def test_pixel_iou_against_one_pair_at_a_time(touching):
    rng = np.random.default_rng(0)
    gt, boxes = (rng.integers(0, 12, size=(n, 4)).astype(float) for n in (30, 40))  # many inverted or degenerate
    boxes[::3] += rng.random((len(boxes[::3]), 4))
    with np.errstate(all="raise"):
        ious = pixel_iou(gt, boxes, touching=touching)
    expected = [[literal_iou(a, b, touching) for b in boxes] for a in gt]
    np.testing.assert_allclose(ious, expected, rtol=1e-14)
    assert (np.array(expected) > 0).any()


def test_pixel_iou_counts_pixels():
    # One pixel against itself, two neighbours of one pixel each, and absurd coordinates.
    assert pixel_iou(np.array([[5.0, 5, 5, 5]]), np.array([[5.0, 5, 5, 5]])) == 1
    assert pixel_iou(np.array([[0.0, 0, 9, 9]]), np.array([[9.0, 0, 18, 9]])) == pytest.approx(10 / 190)
    assert pixel_iou(np.array([[0.0, 0, 9, 9]]), np.array([[9.0, 0, 18, 9]]), touching=False) == 0
    assert pixel_iou(np.array([[0.0, 0, 9, 9]]), np.array([[0.0, 0, 1e308, 1e308]])) == 0
    assert pixel_iou(np.zeros((0, 4)), np.zeros((3, 4))).shape == (0, 3)


def test_curves_on_disk(tmp_path):
    curves = {"easy": PrecisionRecallCurve(np.array([0.0, 0.5]), np.array([np.nan, 0.75]))}
    save_curves(curves | {"blur.heavy": curves["easy"]}, tmp_path / "curves.npz")
    loaded = load_curves(tmp_path / "curves.npz")
    assert set(loaded) == {"easy", "blur.heavy"}
    np.testing.assert_array_equal(loaded["easy"].precision, curves["easy"].precision)
    np.testing.assert_array_equal(loaded["easy"].recall, curves["easy"].recall)


def test_plot_has_a_line_for_each_method(tmp_path):
    recall = np.linspace(0, 0.9, 50)
    methods = {
        f"m{i}": {
            "easy": PrecisionRecallCurve(recall, 1 - recall * i / 20),
            "all": PrecisionRecallCurve(recall, recall),
        }
        for i in range(12)
    }
    plot_pr_curves(methods, tmp_path / "curve.svg", {"easy": "Easy", "hard": "Hard", "all": "All"})
    picture = (tmp_path / "curve.svg").read_text()
    assert picture.count("<!-- m") == 2 * 12  # matplotlib notes each legend text so


class Code:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_hostile_npz_files(tmp_path):
    path, ones = tmp_path / "curves.npz", np.ones(3)
    for arrays in (
        {"a.recall": np.array([Code(tmp_path / "trap")], object), "a.precision": ones},
        {"a.recall": ones},
        {"a.recall": ones, "a.precision": np.ones(4)},
        {"a.recall": np.ones((3, 1)), "a.precision": np.ones((3, 1))},
        {"a.recall": np.array(["x"]), "a.precision": np.array(["y"])},
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=r"curves\.npz: not the npz of curves"):
            load_curves(path)
    assert not (tmp_path / "trap").exists()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"curves\.npz"):
        load_curves(path)
    np.savez_compressed(path, **{"a.recall": np.zeros(10**6), "a.precision": np.zeros(10**6)})
    with pytest.raises(ValueError, match="unpacks to more than 100 times its size"):
        load_curves(path)
