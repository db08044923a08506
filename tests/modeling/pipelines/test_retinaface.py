"""RetinaFace's own parts; test_all_pipelines.py has what it shares with others."""

from itertools import pairwise

import pytest
import torch
from detectron2.modeling import FPN
from small_pipelines import PIPELINES
from test_all_pipelines import small_model

from gs_d2.modeling.pipelines.retinaface import ContextModule, RetinaFaceHead, TopConv

PIPELINE = next(pipeline for pipeline in PIPELINES if pipeline.name == "retinaface")


def footprint(output, feature):
    """Which cells of a feature map the cell in the middle of an output depends on: (height, width) of their box."""
    centre = feature.shape[-1] // 2
    (gradient,) = torch.autograd.grad(output[0, :, centre, centre].sum(), feature, retain_graph=True)
    rows, columns = torch.nonzero((gradient[0] != 0).any(dim=0)).T
    assert rows.min() + rows.max() == columns.min() + columns.max() == 2 * centre
    return tuple(int(x.max() - x.min()) + 1 for x in (rows, columns))


def test_context_of_3_5_and_7_cells():
    module = ContextModule(8)
    with torch.no_grad():
        for parameter in module.parameters():  # no ReLU may hide a tap
            parameter.fill_(0.1)
    feature = torch.rand(1, 8, 15, 15, requires_grad=True)
    output = module(feature)
    assert output.shape == feature.shape
    assert footprint(output[:, :4], feature) == (3, 3)
    assert footprint(output[:, 4:6], feature) == (5, 5)
    assert footprint(output[:, 6:], feature) == (7, 7)


def test_context_needs_channels_that_divide():
    with pytest.raises(ValueError, match="channels of a context module must be a multiple of 4, got 10"):
        ContextModule(10)


def test_contexts_are_each_maps_own_and_predictors_are_shared():
    torch.manual_seed(0)
    head = RetinaFaceHead(in_channels=8, num_anchors=3, num_maps=2)
    maps = [torch.rand(1, 8, 6, 6)] * 2

    def changed_by(parameter):
        before = head(maps)
        with torch.no_grad():
            parameter.add_(0.5)
        after = head(maps)
        return [[not torch.equal(x, y) for x, y in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]

    assert changed_by(head.context[1].conv3.weight) == [[False, True], [False, True]]  # logits, deltas by map
    assert changed_by(head.objectness_logits.bias) == [[True, True], [False, False]]
    assert changed_by(head.anchor_deltas.bias) == [[False, False], [True, True]]


def test_p6_is_a_convolution_of_c5():
    backbone = small_model(PIPELINE).backbone
    assert isinstance(backbone, FPN) and isinstance(backbone.top_block, TopConv)
    image = torch.rand(1, 3, 96, 160)
    with torch.no_grad():
        outputs, c5 = backbone(image), backbone.bottom_up(image)["res5"]
        assert list(outputs) == ["p2", "p3", "p4", "p5", "p6"]
        assert torch.equal(outputs["p6"], backbone.top_block.conv(c5)) and outputs["p6"].shape[-2:] == (2, 3)


def test_a_group_is_the_anchors_of_one_map():
    """Three scales of a third of an octave: eq. 4 with reference scales of 16, 32, ... would split every map."""
    rpn = small_model(PIPELINE).proposal_generator
    sizes = PIPELINE.cfg(sampling=True).MODEL.ANCHOR_GENERATOR.SIZES
    assert len({round(scale, 2) for row in sizes for scale in row}) == 15
    maps = [torch.zeros(1, 1, 4, 4)] * 5
    for i, anchors in enumerate(rpn.anchor_generator(maps)):
        assert rpn.group_loss.group(anchors.tensor)[1].unique().tolist() == [i]
    scales = rpn.anchor_generator.scales
    steps = [large / small for small, large in pairwise(scales)]
    assert steps == pytest.approx([2 ** (1 / 3)] * 14, rel=1e-3)
