"""GroupLoss: what all detectors share between their predictions and their losses."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from gs_d2.modeling import GroupLoss, GroupSampler, TwoPassMatcher
from gs_d2.modeling.criterion import CLS_LOSS_TYPES, GroupCriterion

TRANSFORM = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
SCALES = [16, 32]


def build(num_groups=2, method="none", ohem_nms_thresh=1.0, **criterion):
    return GroupLoss(
        matcher=TwoPassMatcher([0.4, 0.6]),
        sampler=GroupSampler(num_groups, 64, method=method),
        criterion=GroupCriterion(TRANSFORM, **criterion),
        group_scales=SCALES,
        ohem_nms_thresh=ohem_nms_thresh,
    )


def predictions(num_classes=3):
    """Anchors of two scales on a grid, matches of two images, logits [2, R, K] and deltas."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.stack(torch.meshgrid(torch.arange(0, 96, 8.0), torch.arange(0, 96, 8.0), indexing="xy"), -1)
    anchors = torch.cat([torch.cat([corner, corner + scale], -1).reshape(-1, 4) for scale in SCALES])
    gt_boxes = [Boxes(anchors[[3, 150]] + 1.0), Boxes(anchors[[200]])]
    logits = torch.randn(2, len(anchors), num_classes, generator=generator)
    deltas = 0.1 * torch.randn(2, len(anchors), 4, generator=generator)
    return anchors, gt_boxes, logits, deltas


@pytest.mark.parametrize("kind", CLS_LOSS_TYPES)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_several_classes_against_the_equation_written_out(kind, num_groups):
    group_loss = build(num_groups, cls_loss_type=kind)
    anchors, gt_boxes, logits, deltas = predictions()
    matches = group_loss.match(anchors, gt_boxes)
    targets = torch.zeros_like(logits, dtype=torch.bool)
    targets[..., 1] = matches[0] == 1
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    with EventStorage():
        loss_cls, _ = group_loss.dense(anchors, matches, bce, deltas, targets)

    expected = 0.0
    _, group_idxs = group_loss.group(anchors)
    assert group_idxs.unique().tolist() == list(range(num_groups))
    for b in range(2):
        for group in range(num_groups):
            numerator = weights = positives = count = 0.0
            for i in torch.nonzero((matches[0][b] >= 0) & (group_idxs == group))[:, 0].tolist():
                count += 1
                positives += float(matches[0][b, i] == 1)
                for k in range(logits.shape[2]):
                    p = float(logits[b, i, k].sigmoid())
                    p_t, alpha_t = (p, 0.25) if targets[b, i, k] else (1 - p, 0.75)
                    weight = 1.0 if kind == "softmax" else alpha_t * (1 - p_t) ** 2
                    numerator += weight * float(bce[b, i, k])
                    weights += weight
            expected += (
                numerator / {"softmax": count, "focal": max(positives, 1), "focal_normalized": weights}[kind] / 2
            )
    assert float(loss_cls) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_more_positives_than_a_quarter_have_a_box_loss(num_groups):
    """OHEM of both labels may draw positives alone, and each counts in the box term."""
    group_loss = build(num_groups, "ohem_all")
    group_loss.sampler.num_per_group = 6
    anchors, _, _, deltas = predictions()
    gts = [Boxes(anchors[::40]), Boxes(anchors[1::40])]
    matches = group_loss.match(anchors, gts)
    positive = matches[0] == 1
    with EventStorage():
        _, loss_loc = group_loss.dense(anchors, matches, torch.where(positive, 5.0, 0.1), deltas)
    expected, _, drawn = 0.0, *group_loss.group(anchors)
    for b in range(2):
        for group in range(num_groups):
            rows = torch.nonzero(positive[b] & (drawn == group))[:6, 0]
            wanted = TRANSFORM.get_deltas(anchors[rows], gts[b].tensor[matches[1][b, rows] - 8 * b])
            error = (deltas[b, rows] - wanted).abs()
            assert len(rows) > 6 // 4
            expected += float(error.sum(dim=1).mean()) / 2
    assert float(loss_loc) == pytest.approx(expected, rel=1e-4)


def test_without_groups_there_is_one_but_statistics_keep_the_scales():
    anchors = predictions()[0]
    scale_idxs, group_idxs = build(num_groups=1).group(anchors)
    assert scale_idxs.bincount().tolist() == [144, 144] and group_idxs.unique().tolist() == [0]


def test_groups_of_all_images_are_numbered_through():
    group_idxs, counts = build().all_groups(torch.tensor([0, 1, 1]), 3)
    assert group_idxs.tolist() == [[0, 1, 1], [2, 3, 3], [4, 5, 5]] and counts == {"num_groups": 6, "num_images": 3}


def test_errors():
    with pytest.raises(ValueError, match=r"OHEM_NMS_THRESH must be in \(0, 1\], got 1.5"):
        build(ohem_nms_thresh=1.5)
    with pytest.raises(ValueError, match=r"sampler must have 1 group or as many as group_scales \(2\), got 4"):
        build(num_groups=4)
