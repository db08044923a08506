"""WIDER FACE: the official metrics, and the protocol step by step on random data."""

import json

import numpy as np
import pytest

from gs_d2.evaluation.wider_face import evaluate_wider_face
from gs_d2.formats.wider_face import WiderGroundTruth
from gs_d2.formats.wider_predictions import read_wider_predictions

SUBSETS = ("easy", "medium", "hard")


@pytest.mark.parametrize(
    "predictions",
    [
        "wider_face/predictions_detector_a.zip",
        "wider_face/predictions_edge_cases.zip",
        "mini_wider/predictions_detector_a.zip",
    ],
)
def test_expected_ap(shared_data, predictions):
    expected = json.loads((shared_data / "expected_ap.json").read_text())[predictions]
    folder = "wider_face" if predictions.startswith("wider_face") else "mini_wider/widerface"
    ground_truth = WiderGroundTruth.from_mat_files(shared_data / folder / "ground_truth")
    detections = read_wider_predictions(shared_data / predictions, ground_truth.image_ids).detections
    rng = np.random.default_rng(0)
    for shuffled in (False, True):
        if shuffled:
            detections = {k: stably_shuffled(rows, rng) for k, rows in detections.items()}
        result = evaluate_wider_face(ground_truth, detections)
        assert {name: result.curves[name].ap for name in SUBSETS} == pytest.approx(expected, abs=1e-6)


def stably_shuffled(rows, rng):
    """Another order of the rows in which those of equal score keep theirs."""
    moved = rows[rng.permutation(len(rows))]
    for score in np.unique(rows[:, 4]):
        moved[moved[:, 4] == score] = rows[rows[:, 4] == score]
    return moved


# ---- The protocol, literally: PROTOCOLS D.1, one step after the other, for one subset. ----


def literal_protocol(image_ids, gt_boxes, kept, detections, num_thresholds=1000):
    """gt_boxes: lists of x1 y1 x2 y2; kept: lists of bool; detections: id -> rows x y w h score."""
    sorted_rows = {}
    for image_id in image_ids:  # 1
        rows = [tuple(row) for row in detections.get(image_id, [])]
        sorted_rows[image_id] = sorted(rows, key=lambda row: -row[4])
    highest, lowest = 1.1754943508222875e-38, 3.4028234663852886e38  # 2
    for rows in sorted_rows.values():
        for row in rows:
            highest, lowest = max(highest, row[4]), min(lowest, row[4])
    counts = np.zeros((num_thresholds, 2))
    num_faces = 0
    for image_id, boxes, keep in zip(image_ids, gt_boxes, kept, strict=True):
        num_faces += sum(keep)  # 3
        rows = sorted_rows[image_id]
        if not len(boxes) or not rows:
            continue
        recall_list, proposal_list, found = [0] * len(boxes), [1] * len(rows), []
        for h, (x, y, w, height, _) in enumerate(rows):
            overlaps = []
            for x1, y1, x2, y2 in boxes:  # 4
                iw, ih = min(x2, x + w) - max(x1, x) + 1, min(y2, y + height) - max(y1, y) + 1
                overlap = 0.0
                if iw > 0 and ih > 0:
                    area, gt_area = (x + w - x + 1) * (y + height - y + 1), (x2 - x1 + 1) * (y2 - y1 + 1)
                    overlap = iw * ih / (area + gt_area - iw * ih)
                overlaps.append(overlap)
            idx = overlaps.index(max(overlaps))  # 5
            if overlaps[idx] >= 0.5:
                if not keep[idx]:
                    recall_list[idx] = proposal_list[h] = -1
                elif recall_list[idx] == 0:
                    recall_list[idx] = 1
            found.append(recall_list.count(1))
        for t in range(1, num_thresholds + 1):  # 6
            passing = []
            if highest != lowest:  # else 0 / 0: NaN passes no threshold
                passing = [i for i, row in enumerate(rows) if (row[4] - lowest) / (highest - lowest) >= 1 - t / 1000]
            if passing:
                counts[t - 1, 0] += proposal_list[: passing[-1] + 1].count(1)
                counts[t - 1, 1] += found[passing[-1]]
    recall, precision = [0.0], [0.0]  # 7, 8
    for counted, hits in counts:
        recall.append(hits / num_faces if num_faces else float("nan"))
        precision.append(hits / counted if counted else float("nan"))
    recall, precision = [*recall, 1.0], [*precision, 0.0]
    for i in range(len(precision) - 2, -1, -1):
        if not precision[i] >= precision[i + 1]:  # NaN gives way
            precision[i] = precision[i + 1]
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)) if recall[i] != recall[i - 1])


def random_case(seed):
    """Few pixels and few scores: ties in IoU and in score, duplicates, IoU of exactly 0.5, empty images."""
    rng = np.random.default_rng(seed)
    score_kind = seed % 6
    image_ids, gt_boxes, detections = [], [], {}
    for i in range(6):
        image_ids.append(f"{i % 2}--Event/image_{i}")
        num_faces = 0 if i == 5 else rng.integers(1, 7)
        corners = rng.integers(0, 10, size=(num_faces, 2))
        sizes = rng.integers(-1, 8, size=(num_faces, 2))  # -1: the list has negative sizes
        if num_faces > 2:
            corners[1], sizes[1] = corners[0], sizes[0]
        gt_boxes.append(np.concatenate([corners, corners + sizes], axis=1).astype(float))
        count = [0, 1, 9, 9, 20, 4][rng.permutation(6)[0]] if i < 5 else 4
        if count == 0 and rng.random() < 0.5:
            continue  # no file
        base = gt_boxes[-1][rng.integers(0, num_faces, size=count)] if num_faces else np.zeros((count, 4))
        boxes = base + rng.integers(-2, 3, size=(count, 4)) * (rng.random((count, 1)) < 0.6)
        boxes[:, 2:] -= boxes[:, :2]
        boxes += rng.random((count, 4)).round(1) * (rng.random((count, 1)) < 0.3)
        scores = {
            0: rng.integers(0, 4, size=count) / 4,
            1: rng.random(count).round(3),
            2: rng.normal(size=count) * 5,
            3: -rng.random(count) - 1,
            4: rng.integers(0, 1001, size=count) / 1000,
            5: rng.random(count) * 1e-3 + 7,
        }[score_kind]
        rows = np.concatenate([boxes, scores[:, None]], axis=1)
        if count > 4:
            rows[1] = rows[0]
        detections[image_ids[-1]] = rows
    kept = [rng.random(len(boxes)) < [0.7, 0.7, 1.0, 0.2][seed % 4] for boxes in gt_boxes]
    return image_ids, gt_boxes, kept, detections


def with_subset(image_ids, gt_boxes, kept):
    ground_truth = WiderGroundTruth.from_boxes(image_ids, gt_boxes)
    ground_truth.subsets["kept"] = np.concatenate(kept).astype(bool)
    return ground_truth


@pytest.mark.parametrize("seed", range(60))
def test_against_the_literal_protocol(seed):
    image_ids, gt_boxes, kept, detections = random_case(seed)
    result = evaluate_wider_face(with_subset(image_ids, gt_boxes, kept), detections)
    everything = [np.ones(len(boxes), bool) for boxes in gt_boxes]
    for name, mask in (("kept", kept), ("all", everything)):
        expected = literal_protocol(image_ids, gt_boxes, [m.tolist() for m in mask], detections)
        assert result.curves[name].ap == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert result.num_detections == sum(map(len, detections.values()))


def one_image(boxes, rows, kept=None):
    boxes = np.array(boxes, float).reshape(-1, 4)
    kept = np.ones(len(boxes), bool) if kept is None else np.array(kept)
    ground_truth = with_subset(["e/i"], [boxes], [kept])
    return evaluate_wider_face(ground_truth, {"e/i": np.array(rows, float)}).curves["kept"]


FACE = [0, 0, 10, 10]
HIT, MISS = [0, 0, 10, 10], [50, 50, 10, 10]


def test_second_hit_is_a_false_alarm():
    curve = one_image([FACE, [50, 50, 60, 60]], [[*HIT, 0.9], [*HIT, 0.8], [*MISS, 0.1]])
    assert curve.ap == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_detections_of_ignored_faces_are_dropped():
    rows = [[*MISS, 0.9], [*MISS, 0.8], [*HIT, 0.7], [*MISS, 0.1]]
    assert one_image([FACE, [50, 50, 60, 60]], rows, kept=[True, False]).ap == 1.0


def test_no_second_best_face():
    # Both detections are nearest to the first face, the second one overlaps the other face enough but gets
    # nothing.
    curve = one_image([[0, 0, 20, 20], [6, 0, 26, 20]], [[0, 0, 20, 20, 0.9], [2, 0, 20, 20, 0.8], [90, 90, 1, 1, 0]])
    assert curve.recall[-1] == 0.5


def test_iou_of_one_half_is_enough():
    # 11 x 11 pixels against 11 x 22: with the +1 exactly one half.
    assert one_image([FACE], [[0, 0, 10, 21, 0.9], [*MISS, 0.0]]).recall[-1] == 1.0
    assert one_image([FACE], [[0, 0, 10, 21.01, 0.9], [*MISS, 0.0]]).recall[-1] == 0.0


def test_no_detections_at_all():
    assert one_image([FACE], np.zeros((0, 5))).ap == 0.0


def test_subset_without_faces_is_nan_and_null():
    ground_truth = with_subset(["e/i"], [np.array([FACE])], [[False]])
    result = evaluate_wider_face(ground_truth, {"e/i": np.array([[*HIT, 0.9], [*MISS, 0.1]])})
    assert np.isnan(result.curves["kept"].ap)
    summary = result.summary()
    assert summary["easy"] is None and summary["all"] == 1.0
    json.dumps(summary, allow_nan=False)


def test_equal_scores_follow_the_protocol_with_a_warning():
    ground_truth = with_subset(["e/i"], [np.array([FACE])], [[True]])
    result = evaluate_wider_face(ground_truth, {"e/i": np.array([[*HIT, 0.9], [*MISS, 0.9]])})
    assert result.curves["kept"].ap == 0.0
    assert "all scores are equal" in result.notes()[1]


def test_high_lowest_score_is_warned_of():
    ground_truth = with_subset(["e/i"], [np.array([FACE])], [[True]])
    for lowest, warned in ((0.06, True), (0.05, False), (0.001, False)):
        result = evaluate_wider_face(ground_truth, {"e/i": np.array([[*HIT, 0.9], [*MISS, lowest]])})
        assert ("threshold" in "\n".join(result.notes())) == warned


def test_scores_of_any_scale_give_the_same_ap():
    image_ids, gt_boxes, kept, detections = random_case(4)  # scores are multiples of 1/1000
    ground_truth = with_subset(image_ids, gt_boxes, kept)
    ap = evaluate_wider_face(ground_truth, detections).curves["kept"].ap
    moved = {k: np.concatenate([r[:, :4], r[:, 4:] * 1024 - 4096], axis=1) for k, r in detections.items()}
    moved["1--Event/image_3"][0, 4] = 8  # the protocol's maximum is at least realmin: all-negative scores differ
    same = dict(detections)
    same["1--Event/image_3"] = same["1--Event/image_3"].copy()
    same["1--Event/image_3"][0, 4] = (8 + 4096) / 1024
    expected = evaluate_wider_face(ground_truth, same).curves["kept"].ap
    assert evaluate_wider_face(ground_truth, moved).curves["kept"].ap == pytest.approx(expected, abs=1e-12)
    assert ap > 0


def test_crowds_are_matched_in_chunks(monkeypatch):
    case = random_case(2)
    ground_truth = with_subset(*case[:3])
    whole = evaluate_wider_face(ground_truth, case[3]).curves["kept"].ap
    monkeypatch.setattr("gs_d2.evaluation.wider_face._IOU_CHUNK", 7)
    assert evaluate_wider_face(ground_truth, case[3]).curves["kept"].ap == whole
