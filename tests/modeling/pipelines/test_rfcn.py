"""PositionSensitiveROIHeads against pooling written out; what every pipeline does is in test_all_pipelines.py."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_proposal_generator, build_roi_heads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from small_pipelines import PIPELINES

from gs_d2.modeling.pipelines import PositionSensitiveROIHeads

(RFCN,) = [pipeline for pipeline in PIPELINES if pipeline.name == "rfcn"]
STRIDE = 4


def build(*opts, in_channels=6, resolution=3):
    cfg = RFCN.cfg(sampling=True, small=True)
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", resolution, *opts])
    torch.manual_seed(0)
    heads = PositionSensitiveROIHeads(cfg, {"p2": ShapeSpec(channels=in_channels, stride=STRIDE)})
    for layer in (heads.cls_maps, heads.delta_maps):
        torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.normal_(layer.bias)
    return heads


BOXES = torch.tensor(
    [
        [
            [3.0, 5, 100, 120],
            [158.5, 60, 160, 90],
            [0, 0, 159, 127],
            [70.5, 10, 75, 14],
        ],  # the second rounds to beyond the map
        [[100.0, 60, 190, 200], [-20, -29, 60, 50], [20, 20, 52, 90], [16, 16, 48, 80]],  # some beyond the map
    ]
)
COUNTS = [4, 2]  # boxes of each image that are scored


def features(channels=6):
    return torch.randn(2, channels, 32, 40, generator=torch.Generator().manual_seed(3))


def rounded(value):
    return math.floor(value / STRIDE + 0.5)


def literal_vote(maps, box, k):
    """maps [C k k, H, W] -> [C]: the mean over bins of the mean of the bin's own map within it."""
    channels, height, width = len(maps) // k**2, *maps.shape[1:]
    x1, y1, x2, y2 = (rounded(float(value)) for value in box)
    x1, y1 = min(x1, width - 1), min(y1, height - 1)
    bin_width, bin_height = max(x2 - x1, 1) / k, max(y2 - y1, 1) / k
    votes = []
    for channel in range(channels):
        total = 0.0
        for i in range(k):
            for j in range(k):
                top, bottom = math.floor(y1 + i * bin_height), math.ceil(y1 + (i + 1) * bin_height)
                left, right = math.floor(x1 + j * bin_width), math.ceil(x1 + (j + 1) * bin_width)
                cells = [
                    float(maps[(channel * k + i) * k + j, y, x])
                    for y in range(max(top, 0), min(bottom, height))
                    for x in range(max(left, 0), min(right, width))
                ]
                total += sum(cells) / len(cells) if cells else 0.0  # what reaches beyond the map counts for nothing
        votes.append(total / k**2)
    return torch.tensor(votes)


@pytest.mark.parametrize(("classes", "agnostic", "num_deltas"), [(1, True, 4), (2, True, 4), (2, False, 8)])
def test_scores_and_deltas_are_votes_of_the_bins(classes, agnostic, num_deltas):
    heads = build("MODEL.ROI_HEADS.NUM_CLASSES", classes, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic)
    with torch.no_grad():
        logits, deltas = heads._predict([features()], [Boxes(x[:n]) for x, n in zip(BOXES, COUNTS, strict=True)])
        hidden = heads.conv(features())
        assert (hidden >= 0).all()
        cls_maps, delta_maps = heads.cls_maps(hidden), heads.delta_maps(hidden)
    assert logits.shape == (6, classes + 1) and deltas.shape == (6, num_deltas)
    rows = [(image, box) for image, n in enumerate(COUNTS) for box in BOXES[image, :n]]
    for (image, box), image_logits, image_deltas in zip(rows, logits, deltas, strict=True):
        assert torch.allclose(image_logits, literal_vote(cls_maps[image], box, 3), atol=1e-5)
        assert torch.allclose(image_deltas, literal_vote(delta_maps[image], box, 3), atol=1e-5)


def test_aligned_pooling_moves_with_the_box():
    """Where the maps rise by 1 a cell, a box further by a quarter of one scores 0.25 more; cells cannot tell."""
    box = torch.tensor([[2.0, 5, 98, 120]])
    moved = box + torch.tensor([1.0, 0, 1, 0])
    ramp = torch.arange(40.0).expand(1, 1, 32, 40)
    rise = {}
    for kind in ("PSROIPool", "PSROIAlign"):
        heads = build("MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind, in_channels=1)
        for layer in (heads.conv, heads.cls_maps):
            torch.nn.init.constant_(layer.weight, 1 / layer.in_channels)
            torch.nn.init.zeros_(layer.bias)
        with torch.no_grad():
            first, second = (heads._predict([ramp], [Boxes(b)])[0][0, 0] for b in (box, moved))
        rise[kind] = float(second - first)
    assert rise == {"PSROIPool": pytest.approx(0, abs=1e-4), "PSROIAlign": pytest.approx(0.25, abs=1e-4)}


def test_it_is_grouped_heads_but_for_the_prediction():
    own = {name for name in vars(PositionSensitiveROIHeads) if callable(getattr(PositionSensitiveROIHeads, name))}
    assert own - {"__init__", "from_config"} == {"_predict"}


@pytest.mark.parametrize("sampling", [False, True])
def test_group_sampling_is_of_the_first_stage_alone(sampling):
    cfg = RFCN.cfg(sampling)
    with torch.device("meta"):
        shapes = build_backbone(cfg).output_shape()
    heads, rpn = build_roi_heads(cfg, shapes), build_proposal_generator(cfg, shapes)
    assert rpn.in_features == heads.in_features == ["p2"] and shapes["p2"].stride == 4
    assert rpn.anchor_generator.strides == [4]
    assert (heads.cls_maps.out_channels, heads.delta_maps.out_channels) == (2 * 49, 4 * 49)
    first, second = (x.group_loss.sampler for x in (rpn, heads))
    assert (first.num_groups, first.num_per_group) == (4 if sampling else 1, 2048)
    assert (second.num_groups, second.num_per_group, second.method) == (1, 512, "random")
    assert first.positive_fraction == second.positive_fraction == 0.25


@pytest.mark.parametrize(("method", "count"), [("ohem", 7), ("ohem_all", 8)])
def test_ohem_may_be_turned_on(method, count):
    """It scores all proposals first: the samples are the negatives of highest loss, or, as in R-FCN's own, any."""
    heads = build("MODEL.GS.ROI.SAMPLER", method, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8).train()
    seen = []
    sample = heads.group_loss.sample
    heads.group_loss.sample = lambda *args: seen.append((args[0], args[2], sample(*args))) or seen[-1][2]
    corner = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * 100
    proposals = [Instances((128, 160), proposal_boxes=Boxes(torch.cat([corner, corner + 24], dim=1)))]
    targets = [Instances((128, 160), gt_boxes=Boxes(BOXES[0, :1]), gt_classes=torch.tensor([0]))]
    with EventStorage():
        _, losses = heads(None, {"p2": features()[:1]}, proposals, targets)
    sum(losses.values()).backward()
    assert heads.cls_maps.weight.grad.any()
    ((labels, cls_losses, sampled),) = seen
    competing = labels >= 0 if method == "ohem_all" else labels == 0
    taken, left = cls_losses[competing & (sampled >= 0)], cls_losses[competing & (sampled == -1)]
    assert heads.delta_maps.weight.grad.any() == (sampled == 1).any()
    assert len(taken) == count and len(left) > 10 and taken.min() >= left.max()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2", "must be one of PSROIPool, PSROIAlign, got 'ROIAlignV2'"),
        ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3"], r"pools from one feature map, got \['p2', 'p3'\]"),
    ],
)
def test_wrong_values_are_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        build(key, value)
