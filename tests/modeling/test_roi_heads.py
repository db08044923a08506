"""GroupedROIHeads, built without a config, against what it should do written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from gs_d2.modeling import GroupedROIHeads, GroupSampler, TwoPassMatcher
from gs_d2.modeling.criterion import GroupCriterion
from gs_d2.modeling.group_loss import GroupLoss
from gs_d2.ops import reference

SCALES = [16, 32, 64, 128]
TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
NO_BOXES = torch.zeros(0, 4)


class Recorder(GroupSampler):
    """Keeps what it was asked and what it answered."""

    def __call__(self, match_labels, group_idxs, losses=None, seed=None):
        self.asked = match_labels.clone(), group_idxs.clone(), losses.clone()
        self.drawn = super().__call__(match_labels, group_idxs, losses, seed)
        return self.drawn


def build(criterion={}, sampler=None, num_classes=1, agnostic=True, ohem_nms_thresh=1.0, **changes):  # noqa: B006
    torch.manual_seed(0)
    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=16), box2box_transform=TRANSFORM, num_classes=num_classes, cls_agnostic_bbox_reg=agnostic
    )
    nn.init.normal_(predictor.cls_score.weight, std=0.3)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.03)
    arguments = dict(
        in_features=["p2"],
        box_pooler=ROIPooler(output_size=3, scales=[0.25], sampling_ratio=2, pooler_type="ROIAlignV2"),
        box_head=FastRCNNConvFCHead(ShapeSpec(channels=8, height=3, width=3), conv_dims=[], fc_dims=[16]),
        box_predictor=predictor,
        num_classes=num_classes,
        box2box_transform=TRANSFORM,
        group_loss=GroupLoss(
            matcher=TwoPassMatcher([0.5, 0.6]),
            sampler=sampler or Recorder(4, 32),
            criterion=GroupCriterion(TRANSFORM, **{"smooth_l1_beta": 0.1111, **criterion}),
            group_scales=SCALES,
            ohem_nms_thresh=ohem_nms_thresh,
            name="roi_groups",
        ),
    )
    return GroupedROIHeads(**{**arguments, **changes})


def around(faces, num, seed, jitter=0.12):
    """Boxes near faces, many of them positive, and others anywhere."""
    generator = torch.Generator().manual_seed(seed)
    boxes = [torch.zeros(0, 4)]
    for face in faces:
        size = (face[2:] - face[:2]).repeat(2)
        boxes.append(face + size * jitter * torch.randn(num, 4, generator=generator))
    corner = torch.rand(4 * num, 2, generator=generator) * 160
    side = 2 ** (3.5 + 4 * torch.rand(4 * num, 1, generator=generator))
    boxes.append(torch.cat([corner, corner + side * (0.8 + 0.4 * torch.rand(4 * num, 2, generator=generator))], dim=1))
    boxes = torch.cat(boxes)
    return boxes[(boxes[:, 2:] - boxes[:, :2] > 2).all(dim=1)]


FACES = torch.tensor([[10.0, 10, 26, 27], [40, 20, 70, 55], [80, 60, 140, 130], [20, 70, 140, 200]])
OTHER_FACES = torch.tensor([[100.0, 100, 115, 117], [30, 30, 66, 62]])


def images(faces=(FACES, OTHER_FACES), num=(40, 25), size=220, boxes=None, num_classes=1):
    """ImageList, features, proposals and targets."""
    generator = torch.Generator().manual_seed(7)
    features = {"p2": torch.randn(len(faces), 8, 55, 55, generator=generator)}
    proposals, targets = [], []
    for i, gts in enumerate(faces):
        own = around(gts, num[i], seed=i) if boxes is None else boxes[i]
        proposals.append(
            Instances(
                (size, size),
                proposal_boxes=Boxes(own),
                objectness_logits=torch.randn(len(own), generator=generator),
                anchor_scales=16.0 + torch.arange(len(own)),
            )
        )
        classes = torch.arange(len(gts)) % num_classes
        targets.append(Instances((size, size), gt_boxes=Boxes(gts), gt_classes=classes))
    return ImageList(torch.zeros(len(faces), 3, size, size), [(size, size)] * len(faces)), features, proposals, targets


def run(heads, images_, features, proposals, targets, ignore_boxes=None):
    with EventStorage() as storage:
        _, losses = heads(images_, features, proposals, targets, ignore_boxes)
        return losses, {name: value for name, (value, _) in storage.latest().items()}


def outputs(heads, features, image, boxes):
    """Logits and deltas of the boxes of one image, one after another through Detectron2's own modules."""
    pooled = heads.box_pooler([features["p2"][image : image + 1]], [Boxes(boxes)])
    return heads.box_predictor(heads.box_head(pooled))


def literal_group(box):
    scale = math.sqrt(float((box[2] - box[0]) * (box[3] - box[1])))
    return min(range(len(SCALES)), key=lambda s: abs(math.log2(scale / SCALES[s])))


def literal_losses(heads, kind, features, proposals, targets, num_groups, num_classes=1):
    """Eq. 2 in loops over images, groups and the samples that were drawn, from the sampler's answer alone."""
    drawn = heads.group_loss.sampler.drawn
    loss_cls = loss_reg = 0.0
    for b, (proposal, target) in enumerate(zip(proposals, targets, strict=True)):
        gts = target.gt_boxes.tensor
        boxes = torch.cat([proposal.proposal_boxes.tensor, gts])
        matched_idxs, match_labels, _ = reference.two_pass_match(gts, boxes, low=0.5, high=0.6, second_pass="best")
        assert torch.equal(heads.group_loss.sampler.asked[0][b, : len(boxes)], match_labels)
        assert (heads.group_loss.sampler.asked[0][b, len(boxes) :] == -1).all()
        logits, deltas = outputs(heads, features, b, boxes)
        groups = [literal_group(box) if num_groups > 1 else 0 for box in boxes]
        for group in range(num_groups):
            cls, reg = [], []
            for i in range(len(boxes)):
                if groups[i] != group or drawn[b, i] == -1:
                    continue
                gt = int(matched_idxs[i])
                label = int(target.gt_classes[gt]) if drawn[b, i] == 1 else num_classes
                cls.append(-logits[i].log_softmax(dim=0)[label])
                if drawn[b, i] == 0:
                    continue
                own = deltas[i] if deltas.shape[1] == 4 else deltas[i, 4 * label : 4 * label + 4]
                if kind == "smooth_l1":
                    wanted = TRANSFORM.get_deltas(boxes[i : i + 1], gts[gt : gt + 1])[0]
                    reg.append(F.smooth_l1_loss(own, wanted, beta=0.1111, reduction="sum"))
                else:
                    decoded = TRANSFORM.apply_deltas(own[None], boxes[i : i + 1])
                    reg.append((1 - reference.box_iou(decoded, gts[gt : gt + 1])[0, 0]) ** 2)
            loss_cls += sum(cls) / len(cls) / len(targets) if cls else 0.0
            loss_reg += sum(reg) / len(reg) / len(targets) if reg else 0.0
    return {"loss_cls": loss_cls, "loss_box_reg": loss_reg}


@pytest.mark.parametrize("kind", ["smooth_l1", "least_square_iou"])
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("method", ["random", "wrs"])
def test_losses_are_eq_2(kind, num_groups, method):
    heads = build({"box_reg_loss_type": kind}, Recorder(num_groups, 32, method=method))
    inputs = images()
    losses, _ = run(heads, *inputs)
    expected = literal_losses(heads, kind, *inputs[1:], num_groups)
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert value > 0
        torch.testing.assert_close(losses[name], torch.as_tensor(value), rtol=1e-4, atol=1e-5)


def test_losses_of_several_classes():
    heads = build(num_classes=2, agnostic=False)
    inputs = images(num_classes=2)
    losses, _ = run(heads, *inputs)
    expected = literal_losses(heads, "smooth_l1", *inputs[1:], num_groups=4, num_classes=2)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)


def test_loss_weights():
    inputs = images()
    plain, _ = run(build(sampler=Recorder(4, 10**4, method="none")), *inputs)
    weighted, _ = run(build(sampler=Recorder(4, 10**4, method="none"), loss_weight={"loss_box_reg": 3.0}), *inputs)
    torch.testing.assert_close(weighted["loss_box_reg"], 3 * plain["loss_box_reg"])
    torch.testing.assert_close(weighted["loss_cls"], plain["loss_cls"])


@pytest.mark.parametrize("method", ["random", "wrs", "ohem"])
def test_n_per_reference_scale_at_1_to_3(method):
    heads = build(sampler=Recorder(4, 16, method=method))
    inputs = images(num=(60, 40))
    _, logged = run(heads, *inputs)
    labels, groups, _ = heads.group_loss.sampler.asked
    drawn, full, totals = heads.group_loss.sampler.drawn, 0, torch.zeros(4, 4)
    for b in range(2):
        boxes = torch.cat([inputs[2][b].proposal_boxes.tensor, inputs[3][b].gt_boxes.tensor])
        assert groups[b, : len(boxes)].tolist() == [literal_group(box) for box in boxes]
        for group in range(4):
            of_group = (groups[b] == group) & (torch.arange(len(labels[b])) < len(boxes))
            counts = [
                int(((x[b] == y) & of_group).sum()) for x, y in ((labels, 1), (labels, 0), (drawn, 1), (drawn, 0))
            ]
            assert counts[2] == min(counts[0], 4)
            assert counts[2] + counts[3] == min(16, counts[2] + counts[1])
            full += counts[2] == 4 and counts[3] == 12
            totals[group] += torch.tensor(counts) / 2
    assert full >= 4
    for group, scale in enumerate(SCALES):
        names = [f"roi_groups/{name}@{scale}" for name in ("pos_matched", "neg_matched", "pos_sampled", "neg_sampled")]
        assert [logged[name] for name in names] == totals[group].tolist()
        assert logged[f"roi_groups/loss_cls@{scale}"] > 0


@pytest.mark.parametrize("method", ["random", "wrs", "ohem", "ohem_all", "none"])
def test_what_fills_up_ragged_proposals_is_never_drawn_or_counted(method):
    """An image with few proposals costs the same beside one with many as alone."""
    faces = (FACES, OTHER_FACES[:1])
    boxes = [around(FACES, 40, 0), around(OTHER_FACES[:1], 2, 1)]
    together = images(faces, boxes=boxes)
    heads = build(sampler=Recorder(4, 10**4, positive_fraction=1.0, method=method))
    losses, logged = run(heads, *together)
    count = len(boxes[1]) + 1
    assert (heads.group_loss.sampler.asked[0][1, count:] == -1).all() and (
        heads.group_loss.sampler.drawn[1, count:] == -1
    ).all()
    assert (
        (heads.group_loss.sampler.drawn >= 0).sum()
        == (heads.group_loss.sampler.asked[0] >= 0).sum()
        <= sum(map(len, boxes)) + 5
    )
    matched = sum(logged[f"roi_groups/{label}_matched@{scale}"] for scale in SCALES for label in ("pos", "neg"))
    assert matched == (heads.group_loss.sampler.asked[0] >= 0).sum() / 2
    alone = []
    for b in range(2):
        images_, features, proposals, targets = together
        one = ImageList(images_.tensor[b : b + 1], images_.image_sizes[b : b + 1])
        alone.append(run(heads, one, {"p2": features["p2"][b : b + 1]}, proposals[b : b + 1], targets[b : b + 1])[0])
    for name, value in losses.items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)


@pytest.mark.parametrize("method", ["random", "wrs", "ohem", "none"])
@pytest.mark.parametrize("cls_loss_type", ["softmax", "focal", "focal_normalized"])
@pytest.mark.parametrize(
    ("faces", "num_proposals"),
    [
        ((FACES, OTHER_FACES), (40, 25)),
        ((FACES, NO_BOXES), (10, 3)),
        ((NO_BOXES, NO_BOXES), (5, 3)),
        ((FACES, OTHER_FACES), (0, 0)),
        ((FACES, NO_BOXES), (0, 0)),
        ((NO_BOXES, NO_BOXES), (0, 0)),
    ],
    ids=["faces", "one without", "no faces", "no proposals", "one with nothing", "nothing at all"],
)
def test_every_parameter_gets_a_gradient(method, cls_loss_type, faces, num_proposals):
    """Also without faces, proposals, or both: DDP must see every parameter."""
    heads = build(
        {"cls_loss_type": cls_loss_type, "box_reg_loss_type": "least_square_iou"}, Recorder(4, 32, method=method)
    )
    boxes = [around(gts, n, i) if n else NO_BOXES for i, (gts, n) in enumerate(zip(faces, num_proposals, strict=True))]
    losses, _ = run(heads, *images(faces, boxes=boxes))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss >= 0 for loss in losses.values())
    if not len(faces[0]):
        assert losses["loss_box_reg"] == 0
    if sum(map(len, boxes)):
        assert losses["loss_cls"] > 0
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_ignore_boxes_are_never_negative():
    heads = build(sampler=Recorder(4, 10**4, method="none"))
    inputs = images()
    run(heads, *inputs)
    without = heads.group_loss.sampler.asked[0]
    region = torch.tensor([[0.0, 0, 110, 220]])
    run(heads, *inputs, [Boxes(region), Boxes(NO_BOXES)])
    labels = heads.group_loss.sampler.asked[0]
    assert torch.equal(without[1], labels[1]) and torch.equal(without == 1, labels == 1)
    boxes = torch.cat([inputs[2][0].proposal_boxes.tensor, FACES])
    inside = (torch.min(boxes[:, 2:], region[:, 2:]) - torch.max(boxes[:, :2], region[:, :2])).clamp(min=0).prod(dim=1)
    share = inside / (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    negative = without[0, : len(boxes)] == 0
    assert (negative & (share >= 0.5)).any() and (negative & (share < 0.5)).any()
    assert torch.equal(labels[0, : len(boxes)] == 0, negative & (share < 0.5))


def test_faces_are_proposals_only_where_asked_for():
    inputs = images()
    for append, extra in ((True, 4), (False, 0)):
        heads = build(proposal_append_gt=append)
        run(heads, *inputs)
        assert heads.group_loss.sampler.asked[0].shape[1] == len(inputs[2][0]) + extra


def test_ohem_draws_the_highest_losses():
    heads = build(sampler=Recorder(4, 16, method="ohem"))
    inputs = images()
    run(heads, *inputs)
    labels, groups, losses = heads.group_loss.sampler.asked
    assert not losses.requires_grad
    drawn, chosen = heads.group_loss.sampler.drawn, 0
    for b in range(2):
        boxes = torch.cat([inputs[2][b].proposal_boxes.tensor, inputs[3][b].gt_boxes.tensor])
        with torch.no_grad():
            log_p = outputs(heads, inputs[1], b, boxes)[0].log_softmax(dim=1)
        for i in range(len(boxes)):
            if labels[b, i] >= 0:
                expected = -log_p[i, 0 if labels[b, i] == 1 else 1]
                torch.testing.assert_close(losses[b, i], expected, rtol=1e-4, atol=1e-5)
        for group in range(4):
            for label in (0, 1):
                of_both = (groups[b] == group) & (labels[b] == label)
                taken, left = losses[b][of_both & (drawn[b] == label)], losses[b][of_both & (drawn[b] == -1)]
                if len(taken) and len(left):
                    assert taken.min() >= left.max()
                    chosen += 1
    assert chosen >= 6


@pytest.mark.parametrize("method", ["ohem", "ohem_all"])
def test_ohem_prunes_overlapping_proposals(method):
    """Those that compete: of one label, or with "ohem_all" of both."""
    inputs = images()
    heads = build(sampler=Recorder(1, 10**4, 1.0, method=method))
    run(heads, *inputs)
    num_unpruned = (heads.group_loss.sampler.drawn >= 0).sum()
    heads.group_loss.ohem_nms_thresh = 0.5
    run(heads, *inputs)
    for b in range(2):
        boxes = torch.cat([inputs[2][b].proposal_boxes.tensor, inputs[3][b].gt_boxes.tensor])
        drawn = heads.group_loss.sampler.drawn[b, : len(boxes)]
        for kept in (boxes[drawn == 0], boxes[drawn == 1]) if method == "ohem" else (boxes[drawn >= 0],):
            ious = reference.box_iou(kept, kept).fill_diagonal_(0)
            assert len(kept) and (ious <= 0.5).all()
    assert (heads.group_loss.sampler.drawn >= 0).sum() < 0.7 * num_unpruned
    with pytest.raises(ValueError, match=r"OHEM_NMS_THRESH must be in \(0, 1\], got 0"):
        build(ohem_nms_thresh=0)


# Testing


def candidates(heads, inputs):
    return heads.eval().predict_candidates(*inputs[1:3])


ENSEMBLES = {
    "arithmetic": lambda first, second: (first + second) / 2,
    "geometric": lambda first, second: math.sqrt(first * second),
    "none": lambda first, second: second,
}


@pytest.mark.parametrize("ensemble", list(ENSEMBLES))
@pytest.mark.parametrize("thresh", [0.0, 0.5])
@pytest.mark.parametrize(("num_classes", "agnostic"), [(1, True), (2, True), (2, False)])
def test_candidates(ensemble, thresh, num_classes, agnostic):
    """Scores of both stages, boxes of each row's class, clipped, in the proposals' order."""
    heads = build(
        num_classes=num_classes, agnostic=agnostic, score_ensemble=ensemble, score_thresh=thresh
    )  # fmt: skip
    inputs = images()
    assert any((x.proposal_boxes.tensor > 200).any() for x in inputs[2]), "something to clip"
    for b, (found, proposal) in enumerate(zip(candidates(heads, inputs), inputs[2], strict=True)):
        boxes = proposal.proposal_boxes.tensor
        with torch.no_grad():
            logits, deltas = outputs(heads, inputs[1], b, boxes)
        expected = []
        for i in range(len(boxes)):
            first = 1 / (1 + math.exp(-float(proposal.objectness_logits[i])))
            for k in range(num_classes):
                score = ENSEMBLES[ensemble](first, float(logits[i].softmax(dim=0)[k]))
                own = deltas[i] if agnostic else deltas[i, 4 * k : 4 * k + 4]
                box = TRANSFORM.apply_deltas(own[None], boxes[i : i + 1])[0].clamp(0, 220)
                if score >= thresh and (box[2:] > box[:2]).all():
                    expected.append((score, k, float(proposal.anchor_scales[i]), *box.tolist()))
        expected = torch.tensor(expected)
        assert (num_classes * len(boxes) > len(found)) == (thresh > 0) and len(found) > 5
        torch.testing.assert_close(found.scores, expected[:, 0], rtol=1e-4, atol=1e-5)
        assert torch.equal(found.pred_classes, expected[:, 1].long())
        assert torch.equal(found.anchor_scales, expected[:, 2])
        torch.testing.assert_close(found.pred_boxes.tensor, expected[:, 3:], rtol=1e-4, atol=1e-3)
        assert set(found.get_fields()) == {"pred_boxes", "scores", "logits", "pred_classes", "anchor_scales"}


@pytest.mark.parametrize(("num_classes", "max_detections"), [(1, 1000), (2, 1000), (2, 7)])
def test_detections_are_what_nms_within_a_class_leaves(num_classes, max_detections):
    """As Detectron2's ROI heads: by falling score, no more than the limit, overlaps of a class gone."""
    heads = build(num_classes=num_classes, nms_thresh=0.4, max_detections=max_detections)
    inputs = images()
    detections, losses = heads.eval()(*inputs[:3])
    assert losses == {}
    for found, everything in zip(detections, candidates(heads, inputs), strict=True):
        boxes, scores, classes = everything.pred_boxes.tensor, everything.scores, everything.pred_classes
        kept = []
        for i in scores.argsort(descending=True, stable=True).tolist():
            same = [j for j in kept if classes[j] == classes[i]]
            if not (reference.box_iou(boxes[i : i + 1], boxes[same]) > 0.4).any():
                kept.append(i)
        assert (len(kept) > max_detections) == (max_detections == 7) and len(kept) < len(everything)
        kept = kept[:max_detections]
        assert torch.equal(found.scores, scores[kept]) and torch.equal(found.pred_classes, classes[kept])
        assert torch.equal(found.pred_boxes.tensor, boxes[kept])
        assert torch.equal(found.anchor_scales, everything.anchor_scales[kept])


def test_images_without_proposals_have_no_detections():
    heads = build().eval()
    for boxes in ([NO_BOXES, NO_BOXES], [around(FACES, 5, 0), NO_BOXES], [NO_BOXES, around(FACES, 5, 0)]):
        inputs = images(boxes=boxes)
        detections, _ = heads(*inputs[:3])
        assert [len(x) > 0 for x in detections] == [len(x) > 0 for x in boxes]
        for found in detections:
            assert found.pred_boxes.tensor.shape == (len(found), 4)
            assert found.scores.shape == found.pred_classes.shape == (len(found),)


def test_what_is_not_finite_is_dropped():
    heads = build()
    inputs = images()
    inputs[1]["p2"][0, :, :10] = float("nan")
    for found in candidates(heads, inputs):
        assert len(found) > 0
        assert torch.isfinite(found.pred_boxes.tensor).all() and torch.isfinite(found.scores).all()


def test_boxes_keep_their_precision_on_maps_of_half_precision():
    """The boxes that are pooled: in bfloat16 these three would lie 8 px apart, or not at all."""
    heads = build().eval()
    generator = torch.Generator().manual_seed(0)
    features = {"p2": torch.randn(1, 8, 4, 400, generator=generator).bfloat16()}
    boxes = torch.tensor([[1201.0, 2, 1215, 14], [1204.0, 2, 1218, 14], [1500.5, 1, 1511, 13]])
    size = (16, 1600)
    proposal = Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(3))
    images_ = ImageList(torch.zeros(1, 3, *size), [size])
    with torch.autocast("cpu", torch.bfloat16):
        found, exact = (heads(images_, {"p2": x}, [proposal])[0][0] for x in (features["p2"], features["p2"].float()))
    assert torch.equal(found.scores, exact.scores)
    assert torch.equal(found.pred_boxes.tensor, exact.pred_boxes.tensor)
    assert found.scores[0] != found.scores[1]


def test_an_unknown_ensemble_is_named():
    with pytest.raises(ValueError, match="SCORE_ENSEMBLE must be one of arithmetic, geometric, none, got 'mean'"):
        build(score_ensemble="mean")
