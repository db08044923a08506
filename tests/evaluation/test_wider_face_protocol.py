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


# ---- Precision and recall at score thresholds, and results by height: no part of the official protocol. ----


def literal_counts(image_ids, gt_boxes, detections, threshold, is_kept, is_alarm):
    """Hits, detections that count and faces, one detection after the other: of at least `threshold`, on faces that
    `is_kept(box)`; those on no face count where `is_alarm(row)`."""
    hits = counted = 0
    for image_id, boxes in zip(image_ids, gt_boxes, strict=True):
        rows = sorted(detections.get(image_id, np.zeros((0, 5))).tolist(), key=lambda row: -row[4])
        found = set()
        for x, y, w, h, score in rows:
            if score < threshold or not len(boxes):
                continue
            overlaps = []
            for x1, y1, x2, y2 in boxes:
                iw, ih = min(x2, x + w) - max(x1, x) + 1, min(y2, y + h) - max(y1, y) + 1
                union = (w + 1) * (h + 1) + (x2 - x1 + 1) * (y2 - y1 + 1) - iw * ih
                overlaps.append(iw * ih / union if iw > 0 and ih > 0 else 0.0)
            best = overlaps.index(max(overlaps))
            if overlaps[best] < 0.5:
                counted += is_alarm((x, y, w, h))
            elif is_kept(boxes[best]):
                counted += 1
                hits += best not in found
                found.add(best)
    return hits, counted, sum(is_kept(box) for boxes in gt_boxes for box in boxes)


def approx(point):
    return pytest.approx(tuple(point), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(12))
def test_precision_and_recall_against_a_literal_count(seed):
    image_ids, gt_boxes, _, detections = random_case(seed)
    scores = np.sort(np.concatenate([rows[:, 4] for rows in detections.values()]))
    thresholds = [float(scores[len(scores) // 3]), float(scores[-2]), float(scores[-1]) + 1]  # the first two: reached
    heights = (2, 5)
    ground_truth = WiderGroundTruth.from_boxes(image_ids, gt_boxes)
    result = evaluate_wider_face(ground_truth, detections, score_thresholds=thresholds, heights=heights)
    bins = {"height.0-2": (0, 2), "height.2-5": (2, 5), "height.5-up": (5, np.inf), "all": (-np.inf, np.inf)}
    assert {name for name in result.curves if name.startswith("height.")} == bins.keys() - {"all"}
    for name, (low, high) in bins.items():
        for threshold in thresholds:
            hits, counted, faces = literal_counts(
                *(image_ids, gt_boxes, detections, threshold),
                lambda box, low=low, high=high: low <= box[3] - box[1] < high,
                lambda row, low=low, high=high: low <= row[3] < high,
            )
            expected = hits / counted if counted else np.nan, hits / faces if faces else np.nan
            assert approx(expected) == tuple(result.at_scores[threshold][name])
            assert result.num_faces[name] == faces


@pytest.mark.parametrize("seed", range(6))
def test_the_lowest_score_gives_the_end_of_the_curve(seed):
    """Also by height: what is counted there is what AP is computed from."""
    image_ids, gt_boxes, _, detections = random_case(seed)
    lowest = min(rows[:, 4].min() for rows in detections.values() if len(rows))
    ground_truth = WiderGroundTruth.from_boxes(image_ids, gt_boxes)
    result = evaluate_wider_face(ground_truth, detections, score_thresholds=[lowest], heights=(3, 6))
    for name, point in result.at_scores[lowest].items():
        curve = result.curves[name]
        assert approx(point) == (curve.precision[-1], curve.recall[-1])


def test_a_face_of_another_height_is_ignored_and_so_is_its_false_alarm():
    boxes = np.array([[0, 0, 8, 8], [50, 50, 90, 90]], float)
    rows = np.array([[0, 0, 8, 8, 0.9], [200, 0, 8, 9.5, 0.8], [50, 50, 40, 40, 0.7], [0, 200, 40, 40, 0.6]])
    ground_truth = WiderGroundTruth.from_boxes(["e/i"], [boxes])
    result = evaluate_wider_face(ground_truth, {"e/i": rows}, score_thresholds=[0.5, 0.75], heights=(9, 16, 64))
    assert {name: n for name, n in result.num_faces.items() if name.startswith("height")} == {
        "height.0-9": 1,
        "height.9-16": 0,
        "height.16-64": 1,
        "height.64-up": 0,
    }
    assert result.curves["height.0-9"].ap == 1 and result.at_scores[0.5]["height.0-9"] == (1, 1)
    assert result.at_scores[0.5]["height.16-64"] == (0.5, 1)  # the false alarm of 40 px
    assert approx(result.at_scores[0.75]["height.16-64"]) == (np.nan, 0)
    assert approx(result.at_scores[0.5]["height.9-16"]) == (0, np.nan)  # the false alarm of 9.5 px
    assert result.at_scores[0.75]["all"] == (0.5, 0.5)


def test_a_height_at_a_limit_is_of_the_larger_bin():
    ground_truth = WiderGroundTruth.from_boxes(["e/i"], [np.array([[0, 0, 5, 16], [0, 50, 5, 65.99]])])
    result = evaluate_wider_face(ground_truth, {})
    assert result.num_faces["height.16-32"] == result.num_faces["height.10-16"] == 1


def test_table_and_json_have_what_a_model_card_needs():
    attributes = [{"pose": np.array([0, 1])}]
    ground_truth = WiderGroundTruth.from_boxes(["e/i"], [np.array([FACE, [50, 50, 60, 60]], float)], attributes)
    rows = np.array([[*HIT, 0.9], [200, 200, 12, 12, 0.6], [*MISS, 0.4]])
    result = evaluate_wider_face(ground_truth, {"e/i": rows})
    table = {line[: line.find("  ")].strip(): line.split() for line in result.table().splitlines()}
    assert table["subset"][-6:] == ["P@0.3", "R@0.3", "P@0.5", "R@0.5", "P@0.7", "R@0.7"]
    assert table["All"][-6:] == ["66.67", "100.00", "50.00", "50.00", "100.00", "50.00"]
    assert table["height: 10-16"][-6:] == table["All"][-6:]
    assert table["height: 16-32"][-6:] == ["-"] * 6
    assert table["pose: atypical"][-3:] == ["100.00", "0.00", "0.00"]  # recall: a false alarm has no pose
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert summary["at_scores"]["0.5"]["all"] == {"precision": 0.5, "recall": 0.5}
    assert summary["at_scores"]["0.3"]["pose.atypical"] == {"recall": 1.0}
    assert summary["at_scores"]["0.7"]["height.16-32"] == {"precision": None, "recall": None}
    assert summary["heights"]["10-16"] == result.curves["height.10-16"].ap == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert summary["heights"]["256-up"] is None and next(iter(summary["heights"])) == "0-10"


def test_no_thresholds_and_no_heights_leave_the_table_as_the_protocol_has_it():
    ground_truth = WiderGroundTruth.from_boxes(["e/i"], [np.array([FACE], float)])
    result = evaluate_wider_face(ground_truth, {}, score_thresholds=(), heights=())
    assert result.table().splitlines()[0].split() == ["subset", "AP", "faces"] and "height" not in result.table()
    assert result.summary()["at_scores"] == result.summary()["heights"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heights": (16, 16)}, r"heights must be above 0 and rise, got \[16, 16\]"),
        ({"heights": (0, 16)}, "heights must be above 0"),
        ({"score_thresholds": [float("nan")]}, "score_thresholds must be numbers"),
    ],
)
def test_wrong_thresholds_and_heights_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_wider_face(WiderGroundTruth.from_boxes(["e/i"], [np.array([FACE], float)]), {}, **options)
