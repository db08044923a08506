"""best_boxes against one box after another: ties, limits, thresholds, and predictions of a diverged model."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from gs_d2.modeling.decoding import best_boxes

TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
SIZE = (60, 80)
INF = math.inf


def predictions(num=200, seed=0):
    """Anchors inside and across the border, and logits of which many are equal."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(num, 2, generator=generator) * 100 - 10
    side = 4 + 28 * torch.rand(num, 1, generator=generator)
    anchors = torch.cat([centre - side / 2, centre + side / 2], dim=1)
    logits = torch.randint(-4, 5, (num, 2), generator=generator) / 2
    return anchors, logits, torch.randn(num, 4, generator=generator) * 0.3


def literal(anchors, logits, deltas, topk, score_thresh, min_size):
    """Boxes, logits and rows, by Python's sort, which is stable, and the formulas of the box transform."""
    height, width = SIZE
    scores = [float(face - background) for background, face in logits]
    scores = [score if math.isfinite(score) else -INF for score in scores]
    found = []
    for row in sorted(range(len(scores)), key=lambda row: -scores[row])[:topk]:
        x1, y1, x2, y2 = (float(x) for x in anchors[row])
        dx, dy, dw, dh = (float(x) for x in deltas[row])
        x, y = x1 + (x2 - x1) * (0.5 + dx), y1 + (y2 - y1) * (0.5 + dy)
        w = (x2 - x1) * math.exp(min(dw, TRANSFORM.scale_clamp)) / 2
        h = (y2 - y1) * math.exp(min(dh, TRANSFORM.scale_clamp)) / 2
        if not all(map(math.isfinite, (x, y, w, h, scores[row]))):
            continue
        box = [min(max(a, 0), b) for a, b in zip((x - w, y - h, x + w, y + h), (width, height) * 2, strict=True)]
        large = box[2] - box[0] > min_size and box[3] - box[1] > min_size
        if large and 1 / (1 + math.exp(-scores[row])) >= score_thresh:
            found.append((box, scores[row], row))
    return found


def check(anchors, logits, deltas, topk=10**6, score_thresh=0.0, min_size=0.0):
    boxes, scores, rows = best_boxes(
        anchors,
        logits,
        deltas,
        SIZE,
        box2box_transform=TRANSFORM,
        topk=topk,
        score_thresh=score_thresh,
        min_size=min_size,
    )
    expected = literal(anchors, logits, deltas, topk, score_thresh, min_size)
    assert rows.tolist() == [row for *_, row in expected]
    assert boxes.shape == (len(expected), 4) and scores.tolist() == [score for _, score, _ in expected]
    torch.testing.assert_close(boxes, torch.tensor([box for box, *_ in expected]).reshape(-1, 4), rtol=0, atol=1e-4)
    return rows


@pytest.mark.parametrize("topk", [1, 37, 199, 200, 500])
@pytest.mark.parametrize("score_thresh", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("min_size", [0.0, 8.0])
def test_against_one_box_after_another(topk, score_thresh, min_size):
    check(*predictions(), topk, score_thresh, min_size)


def test_thresholds_drop_some_of_the_boxes():
    """What the test above compares is neither all nor nothing."""
    counts = [
        len(check(*predictions(), **limits))
        for limits in ({}, {"min_size": 8.0}, {"score_thresh": 0.3}, {"min_size": 8.0, "score_thresh": 0.3})
    ]
    assert 200 > counts[0] > counts[1] > counts[3] > 20 and counts[0] > counts[2] > counts[3]


@pytest.mark.parametrize("topk", [1, 9, 2999])
def test_of_equal_scores_the_lower_row_comes_first_also_at_the_cut(topk, device):
    num = 3000  # more than a sort of a few elements, which is stable by chance
    anchors = torch.tensor([[10.0, 10.0, 30.0, 30.0]]).repeat(num, 1).to(device)
    logits, deltas = torch.zeros(num, 2, device=device), torch.zeros(num, 4, device=device)
    logits[num // 2 :, 1] = 1.0
    _, _, rows = best_boxes(
        anchors, logits, deltas, SIZE, box2box_transform=TRANSFORM, topk=topk, score_thresh=0.0, min_size=0.0
    )
    assert rows.tolist() == [*range(num // 2, num), *range(num // 2)][:topk]


def test_a_score_at_the_threshold_stays():
    anchors, _, deltas = predictions(3)
    anchors[:] = torch.tensor([10.0, 10.0, 30.0, 30.0])
    logits = torch.tensor([[0.0, 0.0], [0.0, -1e-3], [0.0, 1e-3]])
    assert check(anchors, logits, deltas, score_thresh=0.5).tolist() == [2, 0]


@pytest.mark.parametrize("score_thresh", [1.0, 1.5])
def test_a_threshold_of_one_leaves_nothing(score_thresh):
    assert len(check(*predictions(), score_thresh=score_thresh)) == 0


def test_a_side_at_the_smallest_size_is_dropped():
    anchors = torch.tensor(
        [[0.0, 0.0, 8.0, 9.0], [0.0, 0.0, 9.0, 9.0], [75.0, 0.0, 95.0, 20.0], [90.0, 0.0, 99.0, 9.0]]
    )
    assert check(anchors, torch.zeros(4, 2), torch.zeros(4, 4), min_size=8.0).tolist() == [1]
    assert check(anchors, torch.zeros(4, 2), torch.zeros(4, 4)).tolist() == [0, 1, 2]  # the last lies outside


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("where", ["background", "face", "both", "centre", "side"])
def test_what_is_not_finite_is_dropped(value, where):
    anchors, logits, deltas = predictions()
    if where in ("centre", "side"):
        deltas[::3, 0 if where == "centre" else 2] = value
    else:
        logits[::3, {"background": [0], "face": [1], "both": [0, 1]}[where]] = value
    rows = check(anchors, logits, deltas, topk=150)
    # exp clamps a side from above, and from below to nothing
    assert len(rows) and ((value == INF and where == "side") or not (rows % 3 == 0).any())


def test_no_anchor_and_no_box():
    anchors, logits, deltas = predictions()
    assert len(check(anchors[:0], logits[:0], deltas[:0])) == 0
    assert len(check(anchors, logits * math.nan, deltas)) == 0
    assert len(check(anchors + 1000, logits, deltas)) == 0
