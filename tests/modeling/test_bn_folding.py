"""Folding BatchNorm: what computes the same is folded, and what would not is left alone."""

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gs_d2.config import load_config
from gs_d2.modeling.bn_folding import Trace, fold, fuse

IMAGE = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def with_statistics(net, seed=0):
    """A BatchNorm of which every value matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2)
                if module.affine:
                    nn.init.uniform_(module.weight, -1, 1)
                    nn.init.normal_(module.bias)
    return net.eval()


class Net(nn.Module):
    """A convolution, a BatchNorm, and what `run` makes of them."""

    def __init__(self, run):
        super().__init__()
        self.conv, self.conv2, self.norm, self.norm2 = (
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(3, 3, 1),
            *map(nn.BatchNorm2d, (3, 3)),
        )
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def also_added(net, x):
    y = net.conv(x)
    return [net.norm(y) + y]


def also_returned(net, x):
    y = net.conv(x)
    return [y, net.norm(y)]


def normed_twice(net, x):
    y = net.conv(x)
    return [net.norm(y), net.norm2(y)]


def changed_in_place(net, x):
    return [net.norm(net.conv(x).relu_())]


def also_read_by_a_branch_that_leads_nowhere(net, x):
    y = net.conv(x)
    net.conv2(y)
    return [net.norm(y)]


@pytest.mark.parametrize(
    ("run", "pairs"),
    [
        (lambda net, x: [net.norm(net.conv(x))], [("conv", "norm")]),
        (lambda net, x: [net.norm2(net.conv2(net.norm(net.conv(x)).relu_()))], [("conv", "norm"), ("conv2", "norm2")]),
        (lambda net, x: [net.norm(net.conv(x)) + net.norm2(net.conv2(x))], [("conv", "norm"), ("conv2", "norm2")]),
        (also_read_by_a_branch_that_leads_nowhere, [("conv", "norm")]),
        (also_added, []),
        (also_returned, []),
        (normed_twice, []),
        (changed_in_place, []),
        (lambda net, x: [net.conv(net.norm(x))], []),
        (lambda net, x: [net.norm(net.conv(x).relu())], []),
        (lambda net, x: [net.norm(net.conv(x)) + net.conv(2 * x)], []),
        (lambda net, x: [net.norm(net.conv(x)) + net.norm(net.conv2(x))], []),
    ],
)
def test_only_a_batchnorm_that_alone_reads_a_convolution_is_a_pair(run, pairs):
    net = with_statistics(Net(run))
    found = Trace(net, IMAGE).convs_before_norms()
    assert found == [(getattr(net, conv), getattr(net, norm)) for conv, norm in pairs]
    with torch.no_grad():
        before = net(IMAGE)
        fold(net, found)
        after = net(IMAGE)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x, y)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == 2 - len(pairs)


@settings(max_examples=30, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
    kernel_size=st.sampled_from([1, 3, (1, 5)]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_convolution_computes_the_same(channels, groups, kernel_size, stride, padding, bias, affine, seed):
    torch.manual_seed(seed)
    i, o = (groups * x for x in channels)
    conv = nn.Conv2d(i, o, kernel_size, stride=stride, padding=padding, groups=groups, bias=bias)
    pair = nn.Sequential(conv, with_statistics(nn.BatchNorm2d(o, eps=0.01, affine=affine), seed))
    image = torch.randn(2, i, 8, 7)
    with torch.no_grad():
        expected = pair.eval()(image)
        fold(pair, [tuple(pair)])
        torch.testing.assert_close(pair(image), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(pair[1], nn.Identity)


def test_what_a_batchnorm_carries_stays_under_its_name_in_every_place():
    class NormThenPReLU(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(3)
            self.act = nn.PReLU(3, init=0.3)

        def forward(self, x):
            return self.act(super().forward(x))

    net = nn.Sequential(nn.Conv2d(3, 3, 1), with_statistics(NormThenPReLU())).eval()
    net.also = net[1]  # a second name of the same module
    with torch.no_grad():
        expected = nn.Sequential.forward(nn.Sequential(net[0], net[1]), IMAGE)
        fold(net, [(net[0], net[1])])
        torch.testing.assert_close(net[1](net[0](IMAGE)), expected)
    assert net.also is net[1] and set(net.state_dict()) == {"0.weight", "0.bias", "1.act.weight", "also.act.weight"}


def test_a_trace_tells_what_an_output_depends_on_and_changes_nothing():
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)), nn.BatchNorm2d(3), nn.Dropout(0.9))
    net.forward = lambda x: [net[0](x), net[3](net[1](net[0](x)))]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        trace = Trace(net, IMAGE)
    first, second = trace.outputs
    assert trace.parameters_of([first]) == set(net[0].parameters())
    assert trace.parameters_of([second]) == {*net[0].parameters(), *net[1].parameters(), *net[3].parameters()}
    assert trace.parameters_of([]) == set()
    assert all(module.training and not module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_net_that_fails_is_as_before():
    net = Net(lambda net, x: net.norm(net.conv(x[:, :2])))
    with pytest.raises(RuntimeError):
        Trace(net, IMAGE)
    assert all(module.training and not module._forward_hooks for module in net.modules())


# What is fused of a detector


def with_any_statistics(model, seed=0):
    """Every value of every norm matters, and activations stay of the order of 1."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.3, 0.8)
            module.bias.data.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "naiveSyncBN"])
def test_a_fused_detector_finds_what_it_did(norm):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", norm, "MODEL.GS.CHANNELS_LAST", True]
    model = with_any_statistics(build_model(load_config("configs/quick/demo.yaml", opts)))
    nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight, std=0.5)
    image = [{"image": torch.randint(0, 256, (3, 96, 120), dtype=torch.uint8)}]
    with torch.no_grad():
        features, (expected,) = model.backbone(model.preprocess_image(image).tensor), model(image)
        assert fuse(model) is model
        fused, (found,) = model.backbone(model.preprocess_image(image).tensor), model(image)
    for name, feature in features.items():
        torch.testing.assert_close(fused[name], feature, rtol=1e-4, atol=1e-4)
        assert fused[name].is_contiguous(memory_format=torch.channels_last)
    found, expected = found["instances"], expected["instances"]
    assert len(found) == len(expected) > 10
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(x, (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)) for x in model.modules())


def test_norms_of_heads_and_of_transposed_convolutions_are_fused():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(4, 5, 4, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        Conv2d(5, 6, 3, norm=FrozenBatchNorm2d(6), activation=torch.tanh),
    )
    with_any_statistics(net)
    with torch.no_grad():
        expected = net(IMAGE)
        torch.testing.assert_close(fuse(net)(IMAGE), expected, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(x, (FrozenBatchNorm2d, nn.BatchNorm2d)) for x in net.modules())


class NegatedBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return -super().forward(x)


def left_alone():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    yield "a convolution with two norms", nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(3)) for _ in range(2))
    yield "a norm of two convolutions", nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), norm) for _ in range(2))
    yield "GroupNorm", nn.ModuleList([Conv2d(3, 3, 1, norm=nn.GroupNorm(1, 3))])
    yield "no statistics", nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(3, track_running_stats=False))])
    yield "another layer", nn.ModuleList([nn.Sequential(conv, NegatedBatchNorm(3))])
    yield "an activation between", nn.ModuleList([nn.Sequential(Conv2d(3, 3, 1, activation=torch.tanh), norm)])
    yield "groups", nn.ModuleList([nn.Sequential(nn.ConvTranspose2d(4, 4, 1, groups=2), nn.BatchNorm2d(4))])


@pytest.mark.parametrize(("what", "nets"), list(left_alone()), ids=[what for what, _ in left_alone()])
def test_what_is_not_a_norm_of_one_convolution_is_left_alone(what, nets):
    before = {name: value.clone() for name, value in nets.state_dict().items()}
    fuse(nets)
    assert nets.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in nets.state_dict().items())
