"""The RPN: its loss is eq. 2, batches, ignore boxes, statistics by scale, and proposals."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import nms

import gs_d2.modeling.nms
from gs_d2 import ops
from gs_d2.modeling import GroupSampler, GroupSamplingRPN, ScaleStrideAnchorGenerator, SoftmaxRPNHead, TwoPassMatcher
from gs_d2.modeling.criterion import GroupCriterion
from gs_d2.modeling.group_loss import GroupLoss
from gs_d2.sampling import group_by_scale

SCALES = [16, 32, 64, 128]


TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))


def build(criterion={}, sampler=None, ohem_nms_thresh=1.0, **changes):  # noqa: B006
    arguments = dict(
        in_features=["p2"],
        head=SoftmaxRPNHead(in_channels=8, num_anchors=4),
        anchor_generator=ScaleStrideAnchorGenerator(sizes=[SCALES], aspect_ratios=[[1.0]], feature_strides=[4]),
        group_loss=GroupLoss(
            matcher=TwoPassMatcher([0.4, 0.6]),
            sampler=sampler or GroupSampler(4, 64),
            criterion=GroupCriterion(TRANSFORM, **criterion),
            group_scales=SCALES,
            ohem_nms_thresh=ohem_nms_thresh,
        ),
        box2box_transform=TRANSFORM,
        pre_nms_topk=(500, 800),
        post_nms_topk=(50, 100),
        nms_thresh=0.5,
    )
    torch.manual_seed(0)
    return GroupSamplingRPN(**{**arguments, **changes})


def inputs(num_images=2, size=128, gts=((20.0, 20, 43, 43), (60.0, 60, 100, 100))):
    images = ImageList(torch.zeros(num_images, 3, size, size), [(size, size)] * num_images)
    generator = torch.Generator().manual_seed(1)
    features = {"p2": torch.rand(num_images, 8, size // 4, size // 4, generator=generator)}
    instances = []
    for _ in range(num_images):
        instance = Instances((size, size))
        instance.gt_boxes = Boxes(torch.tensor(gts, dtype=torch.float32).reshape(-1, 4))
        instances.append(instance)
    return images, features, instances


class CountingStorage(EventStorage):
    def latest_values(self):
        return {name: value for name, (value, _) in self.latest().items()}


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("method", ["random", "wrs", "ohem"])
@pytest.mark.parametrize("iou_aware", [(), (0.55, 0.85)])
def test_loss_is_eq_2(num_groups, method, iou_aware):
    """Against the equation written out: a sum over groups of means over the samples drawn. IoU-aware, a positive is so
    much of a face as its predicted box fits."""
    rpn = build(
        {"box_reg_loss_type": "least_square_iou", "iou_aware": iou_aware},
        sampler=GroupSampler(num_groups, 64, method=method),
    )
    images, features, instances = inputs()
    seen = []
    draw = rpn.group_loss.sampler.__call__
    rpn.group_loss.sampler = lambda *a: seen.append((a, draw(*a))) or seen[-1][1]
    rpn.group_loss.sampler.num_groups, rpn.group_loss.sampler.max_positives = num_groups, num_groups * 16
    rpn.group_loss.sampler.method = method
    with CountingStorage():
        _, losses = rpn(images, features, instances, with_proposals=False)
    (match_labels, group_idxs, anchor_losses), sampled = seen[0]
    if method != "random":
        assert not anchor_losses.requires_grad

    anchors = rpn.anchor_generator([features["p2"]])[0].tensor
    logits, deltas = rpn.rpn_head([features["p2"]])
    logits, deltas = rpn.anchor_generator.flatten(logits, 2), rpn.anchor_generator.flatten(deltas, 4)
    loss_cls, loss_loc, fits = 0.0, 0.0, []
    for b, gt in enumerate(instances):
        match = rpn.group_loss.matcher.match(gt.gt_boxes.tensor, anchors)
        assert torch.equal(match.match_labels, match_labels[b])
        for group in range(num_groups):
            drawn = torch.nonzero((sampled[b] >= 0) & (group_idxs == group))[:, 0]
            positive = torch.nonzero((sampled[b] == 1) & (group_idxs == group))[:, 0]
            face = (sampled[b] == 1).float()
            if len(positive):
                target = gt.gt_boxes.tensor[match.matched_idxs[positive]]
                boxes = rpn.box2box_transform.apply_deltas(deltas[b][positive], anchors[positive])
                inter = (torch.min(boxes[:, 2:], target[:, 2:]) - torch.max(boxes[:, :2], target[:, :2])).clamp(min=0)
                inter = inter.prod(dim=1)
                union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1) - inter
                loss_loc += ((1 - inter / union) ** 2).mean() / len(instances)
                if iou_aware:
                    face[positive] = ((inter / union - 0.55) / 0.3).clamp(0, 1).detach()
                    fits.extend(face[positive].tolist())
            log_p = logits[b].log_softmax(dim=1)
            costs = -face * log_p[:, 1] - (1 - face) * log_p[:, 0]
            loss_cls += costs[drawn].mean() / len(instances)
            if method != "random":
                torch.testing.assert_close(anchor_losses[b, drawn], costs[drawn].detach(), rtol=1e-4, atol=1e-6)
    assert not iou_aware or (min(fits) == 0 and 0.1 < max(fits) < 1), "some fit, some do not"
    torch.testing.assert_close(losses["loss_rpn_cls"], loss_cls, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_rpn_loc"], loss_loc, rtol=1e-4, atol=1e-6)
    # Quality is a target: it has no gradient of its own.
    parameters = list(rpn.parameters())
    ours = torch.autograd.grad(sum(losses.values()), parameters)
    for found, expected in zip(ours, torch.autograd.grad(loss_cls + loss_loc, parameters), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["smooth_l1", "iou", "least_square_iou"])
@pytest.mark.parametrize("gts", [(), ((20.0, 20, 43, 43),)])
def test_every_parameter_gets_a_gradient(loss_type, gts):
    """Also without any face: DDP must see every parameter (SPEC section 2, row 5)."""
    rpn = build({"box_reg_loss_type": loss_type})
    images, features, instances = inputs(gts=gts)
    with EventStorage():
        _, losses = rpn(images, features, instances, with_proposals=False)
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    if not gts:
        assert losses["loss_rpn_loc"] == 0
    for name, parameter in rpn.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_batch_is_the_mean_of_its_images():
    """With every anchor drawn, nothing is random: two different images together equal their mean."""
    rpn = build(sampler=GroupSampler(4, 10**6, positive_fraction=1.0))
    images, features, instances = inputs()
    instances[1] = Instances((128, 128), gt_boxes=Boxes(torch.tensor([[5.0, 5, 21, 21]])))
    single = []
    with EventStorage():
        _, together = rpn(images, features, instances, with_proposals=False)
        for b in range(2):
            one = ImageList(images.tensor[b : b + 1], images.image_sizes[b : b + 1])
            _, losses = rpn(one, {"p2": features["p2"][b : b + 1]}, instances[b : b + 1], with_proposals=False)
            single.append(losses)
    for name, value in together.items():
        torch.testing.assert_close(value, (single[0][name] + single[1][name]) / 2)


def test_ignore_boxes_are_never_negative():
    rpn = build(sampler=GroupSampler(4, 10**6, positive_fraction=1.0))
    _, features, instances = inputs(num_images=1)
    anchors = rpn.anchor_generator([features["p2"]])[0].tensor
    gt_boxes = [x.gt_boxes for x in instances]
    region = Boxes(torch.tensor([[0.0, 0, 128, 50]]))
    without, _, _ = rpn.group_loss.match(anchors, gt_boxes, [Boxes(torch.zeros(0, 4))])
    with_region, _, _ = rpn.group_loss.match(anchors, gt_boxes, [region])
    inside = (anchors[:, 3] <= 50) & (anchors[:, 1] >= 0) & (anchors[:, 0] >= 0) & (anchors[:, 2] <= 128)
    assert (without[0][inside] == 0).any()
    assert (with_region[0][inside] != 0).all()
    assert torch.equal(without == 1, with_region == 1)


def test_group_statistics_are_logged_by_scale():
    rpn = build(sampler=GroupSampler(1, 64))
    images, features, instances = inputs()
    with CountingStorage() as storage:
        rpn(images, features, instances, with_proposals=False)
        values = storage.latest_values()
    assert sum(values[f"groups/{label}_sampled@{s}"] for s in SCALES for label in ("pos", "neg")) == 64
    num_anchors = len(rpn.anchor_generator([features["p2"]])[0])
    assert sum(values[f"groups/neg_matched@{s}"] for s in SCALES) <= num_anchors
    assert {f"groups/loss_cls@{s}" for s in SCALES} <= set(values)


def test_proposals():
    rpn = build(score_thresh=0.3).eval()
    nn.init.normal_(rpn.rpn_head.objectness_logits.weight, std=1.0)
    images, features, _ = inputs()
    images.image_sizes = [(128, 128), (100, 90)]
    proposals, losses = rpn(images, features)
    assert losses == {}
    for proposal, (height, width) in zip(proposals, images.image_sizes, strict=True):
        boxes, scores = proposal.proposal_boxes.tensor, proposal.objectness_logits
        assert 0 < len(boxes) <= 100
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert (scores[:-1] >= scores[1:]).all() and (scores.sigmoid() >= 0.3).all()
        assert set(proposal.get_fields()) == {"proposal_boxes", "objectness_logits"}, "as Detectron2's"
        ious = ops.box_iou(boxes, boxes)
        assert (ious.fill_diagonal_(0) <= 0.5).all()


def test_proposals_with_the_scales_of_their_anchors():
    rpn = build().eval()
    images, features, _ = inputs()
    plain, _ = rpn(images, features)
    for proposal, expected in zip(rpn.propose(images, features), plain, strict=True):
        assert torch.equal(proposal.proposal_boxes.tensor, expected.proposal_boxes.tensor)
        assert torch.equal(proposal.objectness_logits, expected.objectness_logits)
        assert len(set(proposal.anchor_scales.tolist())) > 1
        assert set(proposal.anchor_scales.tolist()) <= set(map(float, SCALES))


def crowded_candidates(num_large=60, seed=0):
    """Large boxes of high scores, overlapping one another, and small ones of low scores."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_large, 2, generator=generator) * 300
    large = torch.cat([corner, corner + 60 + 60 * torch.rand(num_large, 2, generator=generator)], dim=1)
    corner = torch.rand(40, 2, generator=generator) * 400
    small = torch.cat([corner, corner + 12 + 20 * torch.rand(40, 2, generator=generator)], dim=1)
    boxes = torch.cat([large, small])
    scores = torch.cat([5 + torch.rand(num_large, generator=generator), torch.rand(40, generator=generator)])
    scores, order = scores.sort(descending=True)
    return Instances((500, 500), proposal_boxes=Boxes(boxes[order]), objectness_logits=scores, anchor_scales=scores)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("limit", [8, 1000])
def test_proposals_of_each_reference_scale(training, limit):
    """NMS over all, then the first K of each group of eq. 4; the limit of all after that."""
    counts = {True: 3, False: 5}
    rpn = build(
        group_post_nms_topk=(counts[True], counts[False]), proposal_scales=SCALES, post_nms_topk=(limit, limit)
    ).train(training)
    candidates = crowded_candidates()
    found = rpn._select(candidates)
    kept = nms(candidates.proposal_boxes.tensor, candidates.objectness_logits, 0.5)
    taken, expected = [0] * len(SCALES), []
    for i in kept.tolist():
        scale = candidates.proposal_boxes[i].area().sqrt().item()
        group = min(range(len(SCALES)), key=lambda s: abs(math.log2(scale / SCALES[s])))
        if taken[group] < counts[training]:
            taken[group] += 1
            expected.append(i)
    assert 8 < len(expected) < len(kept) < len(candidates)
    expected = expected[:limit]
    assert torch.equal(found.proposal_boxes.tensor, candidates.proposal_boxes.tensor[expected])
    assert torch.equal(found.objectness_logits, candidates.objectness_logits[expected])


def test_proposals_are_complete_before_nms_has_seen_all(monkeypatch):
    """Once every reference scale has its proposals, NMS looks at no more boxes."""
    looked_at = []
    inner = gs_d2.modeling.nms.nms
    monkeypatch.setattr("gs_d2.modeling.nms._CHUNK", {"cpu": 32})
    monkeypatch.setattr("gs_d2.modeling.nms.nms", lambda boxes, *a: looked_at.append(len(boxes)) or inner(boxes, *a))
    generator = torch.Generator().manual_seed(0)
    corner, scale = torch.rand(2000, 2, generator=generator) * 900, 16 * 12 ** torch.rand(2000, 1, generator=generator)
    scores = torch.rand(2000, generator=generator).sort(descending=True).values
    candidates = Instances((1000, 1000), proposal_boxes=Boxes(torch.cat([corner, corner + scale], dim=1)))
    candidates.objectness_logits, candidates.anchor_scales = scores, scale[:, 0]
    rpn = build(group_post_nms_topk=(6, 6), proposal_scales=SCALES)
    found = rpn._select(candidates)
    kept = candidates[nms(candidates.proposal_boxes.tensor, scores, 0.5)]
    groups = group_by_scale(kept.proposal_boxes.area().sqrt(), SCALES)
    wanted = torch.cat([torch.nonzero(groups == group)[:6, 0] for group in range(4)]).sort().values
    assert torch.equal(found.proposal_boxes.tensor, kept.proposal_boxes.tensor[wanted])
    assert len(found) == 24 and sum(looked_at) < 200


def test_small_proposals_survive_large_ones_of_higher_scores():
    candidates = crowded_candidates(num_large=200)

    def num_small(**arguments):
        found = build(post_nms_topk=(16, 16), **arguments)._select(candidates)
        assert len(found) <= 16
        return int((found.proposal_boxes.area().sqrt() < 32).sum())

    assert num_small() == 0
    assert num_small(group_post_nms_topk=(4, 4), proposal_scales=SCALES) >= 4


def test_counts_by_reference_scale_need_the_scales():
    with pytest.raises(ValueError, match="GROUP_POST_NMS_TOPK needs the reference scales"):
        build(group_post_nms_topk=(0, 5))


def test_ohem_prunes_overlapping_anchors():
    """Only the one of highest loss of overlapping predictions of a group and label is drawn."""
    images, features, instances = inputs(num_images=1)
    drawn = {}
    for thresh in (1.0, 0.4):
        rpn = build(sampler=GroupSampler(4, 10**4, 1.0, method="ohem"), ohem_nms_thresh=thresh)
        seen = []
        draw, rpn.group_loss.sampler = rpn.group_loss.sampler, lambda *a: seen.append(draw(*a)) or seen[-1]  # noqa: B023
        for name in ("method", "num_groups", "num_per_group", "max_positives", "labels_compete"):
            setattr(rpn.group_loss.sampler, name, getattr(draw, name))
        with EventStorage():
            rpn(images, features, instances, with_proposals=False)
        drawn[thresh] = seen[0][0]
    anchors, _, deltas = rpn.predict(features)
    boxes = TRANSFORM.apply_deltas(deltas[0].detach(), anchors)
    scale_idxs, _ = rpn.group_loss.group(anchors)
    assert ((drawn[0.4] == -1) | (drawn[0.4] == drawn[1.0])).all()
    for group in range(4):
        for label in (0, 1):
            rows = torch.nonzero((drawn[0.4] == label) & (scale_idxs == group))[:, 0]
            before = ((drawn[1.0] == label) & (scale_idxs == group)).sum()
            assert (before > 0) == (len(rows) > 0) and len(rows) <= before
            assert (ops.box_iou(boxes[rows], boxes[rows]).fill_diagonal_(0) <= 0.4).all()
    assert (drawn[0.4] >= 0).sum() < 0.5 * (drawn[1.0] >= 0).sum()


def test_proposals_drop_what_is_not_finite():
    rpn = build().eval()
    images, features, _ = inputs()
    features["p2"][0, :, :5] = float("nan")
    proposals, _ = rpn(images, features)
    for proposal in proposals:
        assert torch.isfinite(proposal.proposal_boxes.tensor).all()
        assert torch.isfinite(proposal.objectness_logits).all()


def test_unknown_loss_type():
    with pytest.raises(ValueError, match="BBOX_REG_LOSS_TYPE must be one of smooth_l1, least_square_iou, iou"):
        build({"box_reg_loss_type": "giou"})


def test_groups_of_other_scales():
    """RetinaNet-like: three scales per octave fall into the nearest group."""
    scales = torch.tensor([32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3), 64])
    assert group_by_scale(scales, [32, 64, 128, 256]).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("method", ["random", "wrs", "ohem", "none"])
def test_anchors_on_padding_are_no_negatives(method):
    """A batch of images of two sizes: none of the small one's samples is centred beyond it."""
    rpn = build(sampler=GroupSampler(4, 64, method=method))
    images, features, instances = inputs()
    images.image_sizes = [(128, 128), (48, 60)]
    seen = []
    draw = rpn.group_loss.sample
    rpn.group_loss.sample = lambda *arguments: seen.append(draw(*arguments)) or seen[-1]
    with EventStorage():
        rpn(images, features, instances, with_proposals=False)
    centres = rpn.anchor_generator([features["p2"]])[0].get_centers()
    beyond = (centres[:, 0] >= 60) | (centres[:, 1] >= 48)
    assert (seen[0][0, beyond] == 0).any() and (seen[0][1, ~beyond] == 0).any()
    assert not (seen[0][1, beyond] == 0).any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("method", ["random", "wrs", "ohem", "none"])
@pytest.mark.parametrize("cls_loss_type", ["softmax", "focal", "focal_normalized"])
def test_predictions_for_anchors_that_are_not_drawn_may_be_infinite(bad, method, cls_loss_type):
    """Of an ignored anchor, which nothing draws: neither losses nor gradients change. The first anchor, whose row fills
    up the rows of positives, is one of them."""
    rpn = build({"cls_loss_type": cls_loss_type}, sampler=GroupSampler(4, 64, method=method))
    _, features, instances = inputs()
    anchors, logits, deltas = (x.detach() for x in rpn.predict(features))
    gt_boxes, region = [x.gt_boxes for x in instances], Boxes(torch.tensor([[-8.0, -8, 20, 20]]))
    labels, _, _ = rpn.group_loss.match(anchors, gt_boxes, [region, region])
    assert (labels[:, 0] == -1).all()
    found = []
    for value in (None, bad):
        given = [x.clone() for x in (logits, deltas)]
        for x in given:
            if value is not None:
                x[labels == -1] = value
            x.requires_grad_()
        torch.manual_seed(0)
        with CountingStorage() as storage:
            losses = rpn.losses(anchors, *given, gt_boxes, [region, region])
            statistics = storage.latest_values()
        sum(losses.values()).backward()
        found.append((losses, [x.grad for x in given], statistics))
    (expected, gradients, statistics), (losses, same_gradients, same_statistics) = found
    assert losses == expected and all(loss > 0 for loss in losses.values())
    assert same_statistics == statistics and any("loss_cls" in name for name in statistics)
    for gradient, same in zip(gradients, same_gradients, strict=True):
        assert torch.equal(gradient, same) and (gradient[labels == -1] == 0).all() and gradient.any()


@pytest.mark.parametrize("method", ["wrs", "ohem"])
@pytest.mark.parametrize("ohem_nms_thresh", [1.0, 0.7])
def test_a_sample_of_infinite_loss_is_the_hardest_and_one_of_nan_the_easiest(method, ohem_nms_thresh):
    """The loss then is infinite, and training stops and says so; what is NaN and not drawn does no harm."""
    rpn = build(sampler=GroupSampler(4, 64, method=method), ohem_nms_thresh=ohem_nms_thresh)
    _, features, instances = inputs(num_images=1)
    anchors, logits, deltas = (x.detach() for x in rpn.predict(features))
    gt_boxes = [x.gt_boxes for x in instances]
    labels, _, _ = rpn.group_loss.match(anchors, gt_boxes)
    negatives = torch.nonzero((labels[0] == 0) & (anchors[:, 2] - anchors[:, 0] == 16))[:, 0]
    hardest, easiest = negatives[100], negatives[200]
    seen = []
    rpn.group_loss.sample = lambda *arguments: seen.append(GroupLoss.sample(rpn.group_loss, *arguments)) or seen[-1]
    for row, logit, drawn in ((easiest, [math.nan, 0.0], -1), (hardest, [-math.inf, 0.0], 0)):
        given = logits.clone()
        given[0, row] = torch.tensor(logit)
        with EventStorage():
            losses = rpn.losses(anchors, given, deltas, gt_boxes)
        assert int(seen[-1][0, row]) == drawn
        assert math.isfinite(losses["loss_rpn_cls"]) == (drawn == -1) and math.isfinite(losses["loss_rpn_loc"])
