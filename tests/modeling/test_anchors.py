"""Anchors: Detectron2's for one stride a map, FPN's for a stride a scale, and their order."""

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from gs_d2.modeling import ScaleStrideAnchorGenerator


def build(**changes):
    arguments = dict(sizes=[[16, 32, 64, 128]], aspect_ratios=[[1.0]], feature_strides=[4])
    return ScaleStrideAnchorGenerator(**{**arguments, **changes})


def test_one_stride_per_map_is_detectron2s_generator(device):
    """FPN (one scale a map) and COCO's 3 ratios: same anchors in the same order as Detectron2's."""
    features = [torch.zeros(1, 8, 24 >> i, 40 >> i, device=device) for i in range(3)]
    for sizes in ([[16], [32], [64]], [[32, 64, 128]] * 3):
        arguments = dict(sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]])
        ours = ScaleStrideAnchorGenerator(feature_strides=[4, 8, 16], **arguments)
        theirs = DefaultAnchorGenerator(strides=[4, 8, 16], **arguments).to(device)
        assert ours.num_anchors == theirs.num_anchors
        for a, b in zip(ours(features), theirs(features), strict=True):
            assert torch.equal(a.tensor, b.tensor)


def test_strides_per_scale_give_fpns_anchors():
    """FPN-finest-stride has exactly FPN's anchors, from one map (paper, Table 1)."""
    finest = build(anchor_strides=[[4, 8, 16, 32]])
    fpn = build(sizes=[[16], [32], [64], [128]], feature_strides=[4, 8, 16, 32])
    maps = [torch.zeros(1, 8, 64 >> i, 96 >> i) for i in range(4)]
    (a,), b = finest([maps[0]]), fpn(maps)
    assert torch.equal(a.tensor, torch.cat([x.tensor for x in b]))
    assert finest.num_anchors == [4] and fpn.num_anchors == [1, 1, 1, 1]


@pytest.mark.parametrize("anchor_strides", [None, [[4, 4, 8, 8]], [[4, 8, 16, 32]], [[8, 8, 8, 8]]])
def test_flatten_follows_the_anchors(anchor_strides):
    """Each prediction is that of the map's cell under the anchor's centre, for the anchor's own scale."""
    generator = build(anchor_strides=anchor_strides)
    height, width, channels = 16, 24, 3
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    # Channel c of anchor a says which row, column and anchor it came from.
    prediction = torch.stack([value for a in range(4) for value in (row, column, torch.full_like(row, a))])[
        None
    ].float()
    flat = generator.flatten(
        [
            prediction,
        ],
        channels,
    )[0]
    (anchors,) = generator([prediction])
    assert flat.shape == (len(anchors), channels)
    centres = anchors.get_centers()
    scales = anchors.area().sqrt()
    assert torch.equal(scales, torch.tensor([16.0, 32, 64, 128])[flat[:, 2].long()])
    for axis, index in ((0, 1), (1, 0)):
        offset = centres[:, axis] - (flat[:, index] + 0.5) * 4
        assert (offset.abs() <= 2).all()  # within half a cell of the map


def test_scales_ascend():
    assert build(sizes=[[64, 128], [16, 32]], feature_strides=[4, 8]).scales == [16, 32, 64, 128]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 1.0}, r"offset must be in \[0, 1\), got 1.0"),
        ({"anchor_strides": [[4, 8]]}, "anchor_strides must rise, one for each of sizes"),
        ({"anchor_strides": [[32, 16, 8, 4]]}, "anchor_strides must rise"),
        ({"anchor_strides": [[4, 8, 16, 30]]}, "anchor_strides must be multiples of the map's stride 4"),
        ({"sizes": [[16], [32]], "feature_strides": [4, 8, 16]}, "sizes must have one list, or one for each of 3"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
