"""SoftmaxRPNHead: its 3x3 convolutions. DilatedRPNHead: which branch answers for which anchors, how far each looks."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import StandardRPNHead, build_rpn_head

from gs_d2.config import add_gs_config
from gs_d2.modeling import DilatedRPNHead, ScaleStrideAnchorGenerator, SoftmaxRPNHead

SCALES = [16, 32, 64, 128]


@pytest.mark.parametrize(
    ("conv_dims", "channels"), [([-1], [4]), ([6], [6]), ([-1, -1], [4, 4]), ([8, -1, 5], [8, 8, 5])]
)
def test_convolutions_are_those_of_detectron2s_head(conv_dims, channels):
    """Same widths, names and arithmetic: StandardRPNHead with these weights has the same hidden maps."""
    torch.manual_seed(0)
    ours = SoftmaxRPNHead(in_channels=4, num_anchors=3, conv_dims=conv_dims)
    theirs = StandardRPNHead(in_channels=4, num_anchors=6, box_dim=2, conv_dims=conv_dims)
    assert [x.out_channels for x in ours.conv.modules() if isinstance(x, torch.nn.Conv2d)] == channels
    for x in ours.parameters():
        torch.nn.init.normal_(x)
    theirs.load_state_dict(ours.state_dict())
    maps = [torch.rand(2, 4, 10, 12), torch.rand(2, 4, 5, 6)]
    torch.testing.assert_close(ours(maps), tuple(theirs(maps)))


def test_convolutions_come_from_the_config_and_start_strong():
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_list(["MODEL.RPN.HEAD_NAME", "SoftmaxRPNHead", "MODEL.RPN.CONV_DIMS", [64, 32]])
    net = build_rpn_head(cfg, [ShapeSpec(channels=16, stride=4)])
    assert [tuple(x.weight.shape) for x in (net.conv.conv0, net.conv.conv1)] == [(64, 16, 3, 3), (32, 64, 3, 3)]
    assert min(net.conv.conv0.weight.std(), net.conv.conv1.weight.std()) > 0.05


@pytest.mark.parametrize("conv_dims", [[], [0], [64, -2]])
def test_numbers_of_channels_that_cannot_be(conv_dims):
    with pytest.raises(
        ValueError, match=r"\(MODEL\.RPN\.CONV_DIMS\) must be one or more numbers of channels, or -1; got"
    ):
        SoftmaxRPNHead(in_channels=4, num_anchors=3, conv_dims=conv_dims)


def head(num_scales=4, anchors_per_scale=1, channels=4):
    torch.manual_seed(0)
    return DilatedRPNHead(in_channels=channels, num_scales=num_scales, anchors_per_scale=anchors_per_scale)


@pytest.mark.parametrize("ratios", [[1.0], [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("strides", [None, [[4, 8, 16, 32]]])
def test_a_branch_answers_for_the_anchors_of_its_scale(ratios, strides):
    """Predictions in the anchors' order: what branch i says belongs to anchors of scale i, and to all of them."""
    net = head(anchors_per_scale=len(ratios))
    generator = ScaleStrideAnchorGenerator(
        sizes=[SCALES], aspect_ratios=[ratios], feature_strides=[4], anchor_strides=strides
    )
    assert generator.num_anchors == [4 * len(ratios)]
    feature = torch.rand(2, 4, 16, 24)
    for i, scale in enumerate(SCALES):
        with torch.no_grad():
            for layers in (net.objectness_logits, net.anchor_deltas):
                for j, layer in enumerate(layers):
                    layer.weight.zero_()
                    layer.bias.copy_(torch.arange(1.0, len(layer.bias) + 1) * (j == i))
            logits, deltas = net([feature])
        anchors = generator([feature])[0]
        of_scale = (anchors.area().sqrt() - scale).abs() < 1e-3
        assert of_scale.any() and not of_scale.all()
        for predictions, channels in ((logits, 2), (deltas, 4)):
            flat = generator.flatten(predictions, channels)
            assert (flat[:, ~of_scale] == 0).all()
            # The bias counts (ratio, channel) up from 1: aspect ratios, too, keep their order.
            ratio = ((anchors.tensor[of_scale, 3] - anchors.tensor[of_scale, 1]) ** 2 / scale**2).round(decimals=2)
            index = (ratio[:, None] == torch.tensor(ratios)).int().argmax(dim=1)
            assert torch.equal(flat[0, of_scale], index[:, None] * channels + torch.arange(1.0, channels + 1))
            assert torch.equal(flat[0], flat[1])


def test_a_branch_sees_as_far_as_its_dilation():
    """Footprint of one output cell: the shared 3x3 around each tap of a 3x3 dilated by 1, 2, 4, 8."""
    net = head()
    with torch.no_grad():  # no ReLU may hide a tap
        for layer in (net.conv, *net.branches, *net.objectness_logits, *net.anchor_deltas):
            layer.weight.fill_(1.0)
    size, centre = 41, 20
    for i in range(4):
        feature = torch.rand(1, 4, size, size, requires_grad=True)
        logits, deltas = net([feature])
        offsets = {tap + d for tap in (-(2**i), 0, 2**i) for d in (-1, 0, 1)}
        expected = torch.zeros(size, size, dtype=torch.bool)
        for y in offsets:
            for x in offsets:
                expected[centre + y, centre + x] = True
        for output, channels in ((logits[0], 2), (deltas[0], 4)):
            (gradient,) = torch.autograd.grad(
                output[0, channels * i : channels * (i + 1), centre, centre].sum(), feature, retain_graph=True
            )
            assert torch.equal((gradient[0] != 0).any(dim=0), expected)
            assert output.shape[-2:] == (size, size)


def test_every_map_has_the_same_branches():
    net = head(anchors_per_scale=3)
    maps = [torch.rand(2, 4, 20, 24), torch.rand(2, 4, 10, 12)]
    logits, deltas = net(maps)
    assert [tuple(x.shape) for x in logits] == [(2, 24, 20, 24), (2, 24, 10, 12)]
    assert [tuple(x.shape) for x in deltas] == [(2, 48, 20, 24), (2, 48, 10, 12)]
    torch.testing.assert_close(net(maps[1:])[0][0], logits[1])


def test_from_config_splits_anchors_into_scales():
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file("configs/wider/fpn_finest_dc_sampling.yaml")
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0]]
    net = build_rpn_head(cfg, [ShapeSpec(channels=8, stride=4)])
    assert isinstance(net, DilatedRPNHead)
    assert [branch.dilation for branch in net.branches] == [(1, 1), (2, 2), (4, 4), (8, 8)]
    assert [layer.out_channels for layer in net.objectness_logits] == [4] * 4
    assert [layer.out_channels for layer in net.anchor_deltas] == [8] * 4
