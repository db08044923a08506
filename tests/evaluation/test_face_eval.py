"""AFW and PASCAL faces: the face-eval protocol step by step on random data."""

import numpy as np
import pytest

from gs_d2.evaluation.face_eval import evaluate_face_eval
from gs_d2.formats.face_eval import FaceEvalAnnotations, read_annotations, read_detections


@pytest.mark.parametrize(
    ("benchmark", "file", "ap"),
    [
        # What face-eval's authors print for these two files (percent, two digits).
        ("afw", "AFW/DPM.txt", 97.21),
        ("afw", "AFW/Ours_Headhunter.txt", 97.14),
        ("pascal_face", "PASCAL/DPM.txt", 90.29),
        ("pascal_face", "PASCAL/Ours_Headhunter.txt", 89.63),
    ],
)
def test_published_detectors(shared_data, benchmark, file, ap):
    annotations = read_annotations(shared_data / "afw_pascal", benchmark)
    detections = read_detections(shared_data / "afw_pascal" / "detections" / file)
    assert round(100 * evaluate_face_eval(annotations, detections).curve.ap, 2) == ap


# ---- The protocol, literally: PROTOCOLS D.4 ----


def literal_protocol(annotations, detections, y_shift, iterations=5):
    rows = []
    for image, image_rows in detections.items():
        for x1, y1, x2, y2, score in image_rows:
            y1 = y1 + y_shift * (y2 - y1)
            if x2 - x1 > 21 or y2 - y1 > 21:
                rows.append([image, score, x1, y1, x2, y2])
    rows.sort(key=lambda row: -row[1])
    num_faces = sum(sum(not flag for flag in flags) for flags in annotations.ignore.values())
    shift, scale = np.zeros(2), np.ones(2)
    for _ in range(iterations):
        found, outcomes, fits = set(), [], []
        for image, _, x1, y1, x2, y2 in rows:
            best_iou, best = 0, None
            for g, (gx1, gy1, gx2, gy2) in enumerate(annotations.boxes.get(image, [])):
                intersection = 0
                if x2 > gx1 and gx2 > x1 and y2 > gy1 and gy2 > y1:
                    intersection = (min(x2, gx2) - max(x1, gx1) + 1) * (min(y2, gy2) - max(y1, gy1) + 1)
                areas = (abs(x2 - x1) + 1) * (abs(y2 - y1) + 1) + (gx2 - gx1 + 1) * (gy2 - gy1 + 1)
                iou = intersection / (areas - intersection)
                if iou >= best_iou:
                    best_iou, best = iou, g
            if best_iou <= 0.5:
                outcomes.append("false alarm")
            elif annotations.ignore[image][best]:
                outcomes.append("dropped")
            elif (image, best) in found:
                outcomes.append("false alarm")
            else:
                found.add((image, best))
                outcomes.append("hit")
                gx1, gy1, gx2, gy2 = annotations.boxes[image][best]
                w, h = x2 - x1, y2 - y1
                shifts = ((gx1 + gx2) / 2 - (x1 + x2) / 2) / w, ((gy1 + gy2) / 2 - (y1 + y2) / 2) / h
                fits.append((*shifts, (gx2 - gx1) / w, (gy2 - gy1) / h))
        if not fits:
            break
        tx, ty, sx, sy = np.mean(fits, axis=0)
        shift, scale = np.add(shift, (tx, ty)), np.multiply(scale, (sx, sy))
        for row in rows:
            _, _, x1, y1, x2, y2 = row
            w, h = (x2 - x1) / 2, (y2 - y1) / 2
            cx, cy = (x1 + x2) / 2 + tx * 2 * w, (y1 + y2) / 2 + ty * 2 * h
            row[2:] = cx - w * sx, cy - h * sy, cx + w * sx, cy + h * sy
    recalls, precisions = [], []
    hits = false_alarms = 0
    for outcome in outcomes:
        hits, false_alarms = hits + (outcome == "hit"), false_alarms + (outcome == "false alarm")
        if hits + false_alarms:
            recalls.append(hits / num_faces)
            precisions.append(hits / (hits + false_alarms))
    ap, last = 0.0, 0.0
    for i, recall in enumerate(recalls):
        ap += (recall - last) * max(precisions[i:])
        last = recall
    return ap, (*shift, *scale)


def random_case(seed):
    rng = np.random.default_rng(seed)
    boxes, ignored, detections = {}, {}, {}
    for i in range(8):
        count = rng.integers(0, 5)
        corners = rng.integers(0, 150, (count, 2))
        boxes[f"i{i}"] = np.concatenate([corners, corners + rng.integers(20, 70, (count, 2))], axis=1).astype(float)
        if count > 2:
            boxes[f"i{i}"][1] = boxes[f"i{i}"][0]  # a tie in IoU
        ignored[f"i{i}"] = rng.random(count) < 0.3
        num = rng.integers(0, 12)
        base = boxes[f"i{i}"][rng.integers(0, count, num)] if count else rng.integers(0, 90, (num, 4))
        rows = base + rng.normal(size=(num, 4)) * [6, 6, 6, 6] + [3, 4, 5, -4]
        scores = rng.integers(-3, 4, (num, 1))
        detections[f"i{i}"] = np.concatenate([rows, scores], axis=1)
        if num > 3:
            detections[f"i{i}"][1] = detections[f"i{i}"][0]
    detections["unknown"] = np.array([[0.0, 0, 50, 50, 1]])
    del detections["i3"]
    return FaceEvalAnnotations(boxes, ignored, "afw"), detections


# In case 192 the set of hits still changes in the fifth refinement, so that four or six give other metrics.
@pytest.mark.parametrize("seed", [*range(30), 192])
@pytest.mark.parametrize("y_shift", [0.0, 0.2])
def test_against_the_literal_protocol(seed, y_shift):
    annotations, detections = random_case(seed)
    result = evaluate_face_eval(annotations, detections, y_shift=y_shift)
    ap, refinement = literal_protocol(annotations, detections, y_shift)
    assert result.curve.ap == pytest.approx(ap, abs=1e-9)
    assert result.refinement == pytest.approx(refinement, abs=1e-9)
    assert "i3" in result.missing and result.num_unknown == 1


def test_refinement_recovers_a_constant_offset():
    rng = np.random.default_rng(0)
    boxes = {f"i{i}": np.array([[x, y, x + s, y + s]]) for i, (x, y, s) in enumerate(rng.uniform(40, 90, (20, 3)))}
    annotations = FaceEvalAnnotations(boxes, {image: np.zeros(1, bool) for image in boxes}, "afw")
    detections = {}
    for i, (image, box) in enumerate(boxes.items()):
        size = box[0, 2] - box[0, 0]
        moved = box[0] + size * np.array([0.1, 0.05, 0.1, 0.05])
        detections[image] = np.array([[*moved, i]])
    result = evaluate_face_eval(annotations, detections)
    assert result.refinement == pytest.approx((-0.1, -0.05, 1, 1))
    assert result.curve.ap == 1


def test_small_detections_are_dropped():
    annotations = FaceEvalAnnotations({"a": np.array([[0.0, 0, 40, 40]])}, {"a": np.array([False])}, "afw")
    rows = np.array([[0.0, 0, 21, 21, 2], [0, 0, 21, 22, 1], [0, 0, 40, 40, 0]])
    result = evaluate_face_eval(annotations, {"a": rows})
    assert (result.num_detections, result.num_small) == (2, 1)
    assert result.curve.ap == 0.5


def test_iou_of_one_half_is_not_enough():
    # 31 x 31 pixels against 31 x 62: with the +1 exactly one half.
    annotations = FaceEvalAnnotations({"a": np.array([[0.0, 0, 30, 30]])}, {"a": np.array([False])}, "afw")
    assert evaluate_face_eval(annotations, {"a": np.array([[0.0, 0, 30, 61, 1]])}).curve.ap == 0
    assert evaluate_face_eval(annotations, {"a": np.array([[0.0, 0, 30, 60.9, 1]])}).curve.ap == 1


def test_boxes_that_only_touch_do_not_overlap():
    # An ignored face without width, and a detection that equals it: a false alarm and not dropped, as in the tool.
    boxes = {"a": np.array([[10.0, 0, 10, 40], [50, 0, 90, 40]])}
    annotations = FaceEvalAnnotations(boxes, {"a": np.array([True, False])}, "afw")
    rows = np.array([[10.0, 0, 10, 40, 2], [50, 0, 90, 40, 1]])
    assert evaluate_face_eval(annotations, {"a": rows}).curve.ap == 0.5


def test_nothing_detected():
    annotations = FaceEvalAnnotations({"a": np.array([[0.0, 0, 40, 40]])}, {"a": np.array([False])}, "afw")
    assert evaluate_face_eval(annotations, {}).curve.ap == 0
    assert evaluate_face_eval(annotations, {"a": np.array([[200.0, 0, 240, 40, 1]])}).curve.ap == 0
