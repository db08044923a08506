"""Folding BatchNorm: what computes the same is folded, and what would not is left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gs_d2.modeling.bn_folding import Trace, fold

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
