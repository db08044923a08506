"""FDDB: the official ROC files, and the protocol step by step on random data."""

import itertools
import math
from pathlib import Path

import fit_fddb_ellipse
import numpy as np
import pytest

from gs_d2.evaluation import fddb, fddb_ellipse_fit
from gs_d2.evaluation.fddb_regions import (
    ellipse_spans,
    estimate_image_size,
    image_sizes_of,
    rectangle_spans,
)
from gs_d2.formats.fddb import bounding_boxes, read_annotations, read_detections

SIZE = (40, 30)


@pytest.fixture(scope="module")
def annotations(shared_data):
    return read_annotations(shared_data / "fddb" / "folds")


@pytest.mark.parametrize("detector", ["s3fd", "mtcnn_lqy"])
def test_official_roc(annotations, shared_data, detector):
    results = shared_data / "fddb" / "results"
    detections = read_detections(results / f"fddb_{detector}_result.txt")
    result = fddb.evaluate_fddb(annotations, detections)
    for kind in ("Disc", "Cont"):
        official = np.loadtxt(results / f"fddb_{detector}_{kind}ROC.txt")
        for count in (10, 50, *fddb.FALSE_POSITIVES):
            expected = official[official[:, 1] <= count, 0].max()
            assert result.rate_at(count, continuous=kind == "Cont") == pytest.approx(expected, abs=1e-3)
    assert len(result.discrete) == len(official) + 1  # and the point without any detection
    assert result.missing == [] and result.num_unknown == 0


# ---- Regions ----


def masks_of(spans, size=SIZE):
    columns = np.arange(size[0])
    return (columns >= spans.left[:, :, None]) & (columns <= spans.right[:, :, None])


def test_rectangles_include_both_corners_and_are_clipped():
    rectangles = np.array([[1.4, 2.5, 3, 4], [-5, -5, 7, 6.6], [38, 28, 9, 9], [50, 1, 3, 3], [9, 9, -4, -3]])
    expected = np.zeros((5, SIZE[1], SIZE[0]), bool)
    expected[0, 2:7, 1:5] = True  # 2.5 and 6.5 to even
    expected[1, :3, :3] = True
    expected[2, 28:, 38:] = True
    expected[4, 6:10, 5:10] = True
    np.testing.assert_array_equal(masks_of(rectangle_spans(rectangles, SIZE)), expected)
    np.testing.assert_array_equal(rectangle_spans(rectangles, SIZE).areas, expected.sum(axis=(1, 2)))


def test_ellipses_cover_the_points_inside_and_the_border():
    """Pixels well inside are covered, pixels well outside are not, for many angles; corners lie on the ellipse."""
    rng = np.random.default_rng(0)
    size = (200, 150)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    for _ in range(40):
        major, minor = rng.uniform(15, 60, size=2)
        angle, cx, cy = rng.uniform(-2, 2), *rng.uniform(0, 150, size=2)
        mask = masks_of(ellipse_spans(np.array([[major, minor, angle, cx, cy]]), size), size)[0]
        dx, dy = x - round(cx), y - round(cy)
        turned = math.radians(round(math.degrees(angle)))
        along = dx * math.cos(turned) + dy * math.sin(turned)
        across = dy * math.cos(turned) - dx * math.sin(turned)
        inside = np.hypot(along / (int(major) - 1), across / (int(minor) - 1)) < 1
        outside = np.hypot(along / (int(major) + 1), across / (int(minor) + 1)) > 1
        assert mask[inside].all() and not mask[outside].any()


def test_angle_turns_clockwise_on_the_screen():
    mask = masks_of(ellipse_spans(np.array([[14, 3, math.pi / 4, 15, 15]]), SIZE))[0]
    assert mask[22, 22] and not mask[8, 22]


@pytest.mark.parametrize(("radii", "pixels"), [((0, 0), 1), ((0.9, 0.9), 1), ((1.9, 1.2), 5), ((-3, -3), None)])
def test_tiny_ellipses(radii, pixels):
    area = ellipse_spans(np.array([[*radii, 0.3, 10, 10]]), SIZE).areas[0]
    assert area == (pixels if pixels else ellipse_spans(np.array([[3, 3, 0.3, 10, 10]]), SIZE).areas[0])


def test_iou_is_that_of_the_masks():
    rng = np.random.default_rng(1)
    ellipses = np.concatenate([rng.uniform(0, 12, (6, 2)), rng.uniform(-2, 2, (6, 1)), rng.uniform(-3, 43, (6, 2))], 1)
    rectangles = np.concatenate([rng.uniform(-5, 40, (7, 2)), rng.uniform(0, 20, (7, 2))], axis=1)
    a, b = ellipse_spans(ellipses, SIZE), rectangle_spans(rectangles, SIZE)
    for i, j in itertools.product(range(6), range(7)):
        first, second = masks_of(a)[i], masks_of(b)[j]
        union = (first | second).sum()
        assert a.iou(b)[i, j] == ((first & second).sum() / union if union else 0)


# ---- The size of the image where it is not known ----


FACE = np.array([[60.0, 40.0, math.pi / 2, 280.0, 200.0]])  # covers x 240..320, y 140..260


@pytest.mark.parametrize(
    ("rectangles", "size"),
    [
        ([[240, 140, 80, 120]], (450, 450)),
        ([[240, 140, 60, 120]], (301, 450)),  # stops short on the right
        ([[240, 140, 80, 90]], (450, 231)),  # stops short at the bottom
        ([[240, 140, 60, 120], [350, 10, 5, 5]], (450, 450)),  # but something was detected beyond
        ([[240, 140, 70, 120]], (450, 450)),  # only a little short
        ([[260, 140, 20, 120]], (450, 450)),  # not the face as a whole
        ([[240, 140, 30, 120]], (281, 450)),  # the centre of a face is within the image
        (np.zeros((0, 4)), (450, 450)),
    ],
)
def test_estimated_size(rectangles, size):
    assert estimate_image_size(FACE, np.array(rectangles, float).reshape(-1, 4)) == size


def test_estimated_size_without_faces():
    assert estimate_image_size(np.zeros((0, 5)), np.array([[1.0, 2, 3, 4]])) == (450, 450)


def test_sizes_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    (tmp_path / "2002").mkdir()
    image.new("L", (45, 30)).save(tmp_path / "2002" / "a.jpg")
    assert image_sizes_of(tmp_path, ["2002/a", "2002/b"]) == {"2002/a": (45, 30)}


# ---- The protocol, literally: PROTOCOLS D.3 with every assignment tried ----


def literal_counts(annotations, detections, threshold):
    """Total (continuous, discrete, false positives) of the detections of at least this score."""
    continuous, discrete, false_positives = 0.0, 0, 0
    for image, ellipses in annotations.items():
        rows = [row for row in detections.get(image, []) if row[-1] >= threshold]
        if not rows:
            continue
        regions = rectangle_spans if len(rows[0]) == 5 else ellipse_spans
        faces = masks_of(ellipse_spans(ellipses, SIZE))
        found = masks_of(regions(np.array(rows)[:, :-1], SIZE))
        ious = [[(f & d).sum() / max((f | d).sum(), 1) for d in found] for f in faces]
        best, pairs = 0.0, []
        slots = [*range(len(rows)), *[None] * len(faces)]
        for chosen in set(itertools.permutations(slots, len(faces))):
            taken = [ious[f][d] for f, d in enumerate(chosen) if d is not None]
            if sum(taken) > best:
                best, pairs = sum(taken), taken
        hits = sum(iou > 0.5 for iou in pairs)
        continuous, discrete = continuous + best, discrete + hits
        false_positives += len(rows) - hits
    return continuous, discrete, false_positives


@pytest.mark.parametrize("seed", range(24))
def test_against_the_literal_protocol(seed):
    rng = np.random.default_rng(seed)
    annotations, detections = {}, {}
    for i in range(5):
        count = rng.integers(0, 4)
        radii, centers = rng.uniform(3, 9, (count, 2)), rng.uniform(2, 30, (count, 2))
        annotations[f"image_{i}"] = np.concatenate([radii, rng.uniform(-2, 2, (count, 1)), centers], axis=1)
        num = rng.integers(0, 5)
        if num == 0 and i % 2:
            continue
        chosen = rng.integers(0, count, num) if count else np.zeros(num, int)
        near = annotations[f"image_{i}"][chosen] if count else np.tile([5.0, 5, 0, 9, 9], (num, 1))
        near = near + rng.normal(size=(num, 5)) * [1, 1, 0.1, 2, 2]
        near[:, 3:] = np.where(rng.random((num, 1)) < 0.3, 34 - near[:, 3:], near[:, 3:])  # some far from any face
        scores = rng.integers(0, 2 + seed % 3, (num, 1)) / 3.0  # ties within an image and between images
        if seed % 2:
            regions = near
        else:
            corners = bounding_boxes(near)
            regions = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        detections[f"image_{i}"] = np.concatenate([regions, scores], axis=1)
    result = fddb.evaluate_fddb(annotations, detections, dict.fromkeys(annotations, SIZE))
    num_faces = sum(map(len, annotations.values()))
    thresholds = sorted({row[-1] for rows in detections.values() for row in rows}, reverse=True)
    assert result.thresholds.tolist() == [np.inf, *thresholds]
    assert (result.discrete[0], result.continuous[0], result.false_positives[0]) == (0, 0, 0)
    for i, threshold in enumerate(thresholds, 1):
        continuous, discrete, false_positives = literal_counts(annotations, detections, threshold)
        assert result.continuous[i] == pytest.approx(continuous / num_faces, abs=1e-12)
        assert result.discrete[i] == pytest.approx(discrete / num_faces, abs=1e-12)
        assert result.false_positives[i] == false_positives


def test_assignment_is_the_best_in_total():
    """The detection of higher score takes the face of lower IoU if that is better for both."""
    annotations = {"a": np.array([[6.0, 6, 0, 10, 10], [6, 6, 0, 17, 10]])}
    detections = {"a": np.array([[7.0, 4, 13, 12, 0.9], [3, 3, 13, 13, 0.8]])}
    result = fddb.evaluate_fddb(annotations, detections, {"a": SIZE})
    ious = ellipse_spans(annotations["a"], SIZE).iou(rectangle_spans(detections["a"][:, :4], SIZE))
    assert result.continuous[-1] * 2 == pytest.approx(max(ious[0, 0] + ious[1, 1], ious[0, 1] + ious[1, 0]))


def test_missing_images_still_have_faces():
    annotations = {name: np.array([[6.0, 6, 0, 10, 10]]) for name in "abc"}
    detections = {
        "a": np.array([[4.0, 4, 12, 12, 0.5]]),
        "b": np.zeros((0, 5)),
        "x": np.array([[0.0, 0, 1, 1, 9]]),
    }
    result = fddb.evaluate_fddb(annotations, detections, dict.fromkeys("abc", SIZE))
    assert (result.num_faces, result.missing, result.num_unknown, result.num_detections) == (3, ["c"], 1, 1)
    assert result.rate_at(0) == pytest.approx(1 / 3)
    nothing = fddb.evaluate_fddb(annotations, {})
    assert nothing.rate_at(100) == 0 and nothing.rate_at(100, continuous=True) == 0


# ---- Our own ellipses ----


def test_committed_fit_is_what_the_tool_fits(shared_data, run_command):
    status, out, _ = run_command(fit_fddb_ellipse.main, "--ground-truth", shared_data / "fddb" / "folds")
    assert status == 0 and out.startswith(Path(fddb_ellipse_fit.__file__).read_text())


def test_fitted_ellipses_raise_the_continuous_score(annotations, shared_data):
    path = shared_data / "fddb" / "results" / "fddb_mtcnn_lqy_result.txt"
    rectangles = dict(list(read_detections(path).items())[::5])
    annotations = {image: annotations[image] for image in rectangles}
    ellipses = {image: fddb.ellipses_from_rectangles(rows) for image, rows in rectangles.items()}
    rates = [fddb.evaluate_fddb(annotations, d).rate_at(1000, continuous=True) for d in (rectangles, ellipses)]
    assert rates[1] > rates[0] + 0.02


def test_ellipses_move_and_scale_with_the_rectangle():
    rectangles = np.array([[10.0, 20, 30, 40, 0.5], [110, 220, 30, 40, 0.5], [0, 0, 60, 80, 0.5]])
    first, moved, scaled = fddb.ellipses_from_rectangles(rectangles)
    np.testing.assert_allclose(moved - first, [0, 0, 0, 100, 200, 0], atol=1e-12)
    np.testing.assert_allclose(scaled[:2], 2 * first[:2])
    assert first[3:].tolist() == [25, 40, 0.5]
    with pytest.raises(ValueError, match="already"):
        fddb.ellipses_from_rectangles(np.zeros((1, 6)))
