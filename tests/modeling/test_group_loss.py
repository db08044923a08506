"""GroupLoss: what all detectors share between their predictions and their losses."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from gs_d2.config import add_gs_config
from gs_d2.modeling import GroupLoss, GroupSampler, TwoPassMatcher
from gs_d2.modeling.criterion import CLS_LOSS_TYPES, GroupCriterion
from gs_d2.modeling.matcher import Matches

ROOT = Path(__file__).resolve().parents[2]
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
    targets[..., 1] = matches.labels == 1

    def cross_entropy(logits):
        return F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")

    bce = cross_entropy(logits)
    with EventStorage():
        loss_cls, _ = group_loss.dense(anchors, matches, logits, deltas, cross_entropy, targets)

    expected = 0.0
    _, group_idxs = group_loss.group(anchors)
    assert group_idxs.unique().tolist() == list(range(num_groups))
    for b in range(2):
        for group in range(num_groups):
            numerator = weights = positives = count = 0.0
            for i in torch.nonzero((matches.labels[b] >= 0) & (group_idxs == group))[:, 0].tolist():
                count += 1
                positives += float(matches.labels[b, i] == 1)
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
    anchors, _, logits, deltas = predictions()
    gts = [Boxes(anchors[::40]), Boxes(anchors[1::40])]
    matches = group_loss.match(anchors, gts)
    positive = matches.labels == 1
    with EventStorage():
        _, loss_loc = group_loss.dense(anchors, matches, logits, deltas, lambda _: torch.where(positive, 5.0, 0.1))
    expected, _, drawn = 0.0, *group_loss.group(anchors)
    for b in range(2):
        for group in range(num_groups):
            rows = torch.nonzero(positive[b] & (drawn == group))[:6, 0]
            wanted = TRANSFORM.get_deltas(anchors[rows], gts[b].tensor[matches.gt_idxs[b, rows] - 8 * b])
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
    with pytest.raises(ValueError, match="group_scales must have at least one scale"):
        GroupLoss(
            matcher=TwoPassMatcher([0.4, 0.6]),
            sampler=GroupSampler(1, 64),
            criterion=GroupCriterion(TRANSFORM),
            group_scales=[],
        )


@pytest.mark.parametrize(
    ("config", "tiny", "smallest"),
    [("wider/fpn_finest_sampling", 6, 16), ("wider/fpn_finest_s32", 6, 32), ("coco/fpn_finest_sampling", 12, 32)],
)
def test_tiny_regions_ignore_the_smallest_anchors_of_the_config(config, tiny, smallest):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(f"configs/{config}.yaml")
    shapes = {name: ShapeSpec(channels=8, stride=4) for name in cfg.MODEL.RPN.IN_FEATURES}
    rpn = build_proposal_generator(cfg, shapes)
    anchors = Boxes.cat(rpn.anchor_generator([torch.zeros(1, 1, 40, 40)])).tensor
    region = Boxes(torch.tensor([[79.0, 79, 79 + tiny, 79 + tiny]]))
    labels, _, _ = rpn.group_loss.match(anchors, [Boxes(torch.zeros(0, 4))], [region])
    ignored = Boxes(anchors[labels[0] == -1]).area().sqrt().round()
    assert len(ignored) >= 4 and set(ignored.tolist()) == {smallest}


def many_positives():
    """Anchors, matches of two images with 316 positives in all, logits and deltas."""
    anchors, _, logits, deltas = predictions(num_classes=2)
    labels = torch.zeros(2, len(anchors), dtype=torch.int8)
    labels[0, 10:210] = labels[1, 100:216] = 1
    gt_boxes = anchors + torch.rand(len(anchors), 4, generator=torch.Generator().manual_seed(1))
    gt_idxs = torch.arange(len(anchors)).expand(2, -1)
    return anchors, Matches(labels, gt_idxs, gt_boxes), logits, deltas


def box_loss_by_loops(group_loss, anchors, labels, gt_boxes, deltas):
    """Smooth-L1 with beta 0: a mean over the positives of each image and group."""
    distances = (deltas - TRANSFORM.get_deltas(anchors, gt_boxes)).abs().sum(dim=2)
    _, group_idxs = group_loss.group(anchors)
    parts = [distances[b, (labels[b] == 1) & (group_idxs == group)] for b in range(2) for group in range(2)]
    return sum(float(x.mean()) for x in parts if len(x)) / 2


def box_loss(group_loss, anchors, matches, logits, deltas):
    targets = matches.labels.clamp(min=0).long()
    with EventStorage():
        return group_loss.dense(
            anchors, matches, logits, deltas, lambda x: F.cross_entropy(x.transpose(1, 2), targets, reduction="none")
        )[1]


def documented_sampler():
    """AllPositives of docs/extending.md."""
    page = (ROOT / "docs" / "extending.md").read_text()
    (source,) = re.findall(r"^class AllPositives\(GroupSampler\):\n(?:^(?: .*)?\n)+", page, re.MULTILINE)
    namespace = {"torch": torch, "GroupSampler": GroupSampler}
    exec(source, namespace)
    return namespace["AllPositives"]


class Bare:
    """A sampler of one's own with no more than it must have."""

    num_groups = 2

    def __call__(self, match_labels, group_idxs, losses):
        assert losses.any(), "who does not say otherwise gets the losses"
        return match_labels


@pytest.mark.parametrize(
    "make", [lambda: documented_sampler()(2, 32), Bare, lambda: GroupSampler(2, 32, method="none")]
)
def test_all_positives_of_a_sampler_without_a_limit_reach_the_box_loss(make):
    anchors, matches, logits, deltas = many_positives()
    group_loss = build()
    group_loss.sampler = make()
    deltas.requires_grad_()
    loss = box_loss(group_loss, anchors, matches, logits, deltas)
    loss.backward()
    assert ((deltas.grad != 0).any(dim=2) == (matches.labels == 1)).all() and (matches.labels == 1).sum() == 316
    expected = box_loss_by_loops(group_loss, anchors, matches.labels, matches.gt_boxes, deltas.detach())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("limit", [200, 158, 157])
def test_a_stated_limit_holds_or_is_an_error(limit):
    """316 positives of two images: two times 158."""
    anchors, matches, logits, deltas = many_positives()
    group_loss = build()
    group_loss.sampler = Bare()
    group_loss.sampler.max_positives = limit
    if limit == 157:
        with pytest.raises(
            ValueError, match="Bare sampled 316 positives in 2 images, more than its max_positives of 157"
        ):
            box_loss(group_loss, anchors, matches, logits, deltas)
        return
    expected = box_loss_by_loops(group_loss, anchors, matches.labels, matches.gt_boxes, deltas)
    assert float(box_loss(group_loss, anchors, matches, logits, deltas)) == pytest.approx(expected, rel=1e-5)


def test_without_a_limit_nothing_depends_on_how_many_are_positive():
    """No nonzero: the number of rows, and so every shape, is known before the labels are."""
    group_loss = build(method="none")
    for share in (0.0, 0.5, 1.0):
        labels = (torch.rand(2, 288, generator=torch.Generator().manual_seed(0)) < share).to(torch.int8)
        rows, valid = group_loss._positive_rows(labels)
        assert rows.tolist() == list(range(576)) and torch.equal(valid, labels.flatten() == 1)
