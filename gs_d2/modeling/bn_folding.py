"""BatchNorm of fixed statistics folded into the convolution before it: the same function, one layer less."""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_NORMS = nn.modules.batchnorm._BatchNorm


class Trace:
    """What one run of a network shows of it: its outputs, and through autograd what each of them is made of.

    Parameters that need no gradient leave no trace, so a network is traced before anything of it is frozen.
    """

    def __init__(self, net: nn.Module, image: Tensor):
        """Runs `net`, which returns a list of tensors, in eval mode; it must hold parameters that need gradients."""
        calls = defaultdict(list)
        layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, _NORMS))]
        hooks = [
            # The nodes of autograd are kept, so that two with the same identity are the same.
            layer.register_forward_hook(lambda layer, x, y: calls[layer].append((x[0].grad_fn, y.grad_fn)))
            for layer in layers
        ]
        training = net.training
        try:
            with torch.enable_grad():
                self.outputs = list(net.eval()(image))
        finally:
            net.train(training)
            for hook in hooks:
                hook.remove()
        self._calls = calls

    def parameters_of(self, outputs: Iterable[Tensor]) -> set[nn.Parameter]:
        """The parameters that these outputs depend on."""
        return {node.variable for node in self._consumers(outputs) if hasattr(node, "variable")}

    def convs_before_norms(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """(convolution, BatchNorm) where each runs once and nothing but the BatchNorm reads the convolution's result.

        What comes out of the BatchNorm is not looked at, nor what either of the two is beyond its base class.
        """
        consumers = self._consumers(self.outputs)
        once = {layer: nodes[0] for layer, nodes in self._calls.items() if len(nodes) == 1}
        made_by = {made: layer for layer, (_, made) in once.items() if isinstance(layer, nn.Conv2d)}
        return [
            (made_by[read], layer)
            for layer, (read, _) in once.items()
            if isinstance(layer, _NORMS) and read in made_by and consumers[read] == 1
        ]

    @staticmethod
    def _consumers(outputs) -> Counter:
        """For each node of autograd's graph how often its result is read; an output itself is read once."""
        counts, pending = Counter(), [output.grad_fn for output in outputs if output.grad_fn is not None]
        while pending:
            node = pending.pop()
            counts[node] += 1
            if counts[node] == 1:
                pending += [child for child, _ in node.next_functions if child is not None]
        return counts


def fold(net: nn.Module, pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]]):
    """Moves the statistics and the affine map of each BatchNorm into weight and bias of its convolution, in place.

    In eval mode `net` computes what it did, up to rounding. In the place of the BatchNorm stay its submodules, run in
    turn, such as the activation that timm's BatchNormAct2d carries, under their names; if there are none, an identity.

    Args:
        pairs: as :meth:`Trace.convs_before_norms` gives them, of which each convolution applies its weight as it is,
            and each BatchNorm applies its submodules, all of them in order, to what it has normalised.
    """
    after = {}
    for conv, norm in pairs:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        children = OrderedDict(norm.named_children())
        after[norm] = nn.Sequential(children) if children else nn.Identity()
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a module's second name
            if child in after:
                setattr(parent, name, after[child])
