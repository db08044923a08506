"""BatchNorm of fixed statistics folded into the convolution before it: the same function, one layer less."""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from itertools import pairwise

import torch
from detectron2.layers import BatchNorm2d, Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_NORMS = nn.modules.batchnorm._BatchNorm
# Of Detectron2's get_norm, those that in eval mode are a factor and a summand for each channel, and nothing else.
_FIXED_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNorm2d, NaiveSyncBatchNorm, FrozenBatchNorm2d)


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
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
            transpose=isinstance(conv, nn.ConvTranspose2d),
        )
        children = OrderedDict(norm.named_children())
        after[norm] = nn.Sequential(children) if children else nn.Identity()
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a module's second name
            if child in after:
                setattr(parent, name, after[child])


def fuse(model: nn.Module) -> nn.Module:
    """Prepares a model that will only be tested: folds BatchNorm into convolutions, in place, wherever it can.

    That is the norm of Detectron2's Conv2d (ResNet, FPN, :class:`TopDown`), and a BatchNorm that follows a convolution
    in an ``nn.Sequential``. GroupNorm stays, and so does a layer that several modules share. The model computes what it
    did in eval mode, up to rounding.

    Call it after the weights are loaded: the names of the folded layers are no longer those of checkpoints, and the
    model cannot be trained on. That is why no detector does it by itself.

    Returns:
        `model`, in eval mode.
    """
    model.eval()
    modules = list(model.modules())
    places = Counter(child for module in modules for child in module._modules.values() if child is not None)
    pairs = [(module, module.norm) for module in modules if type(module) is Conv2d and module.norm is not None]
    for module in modules:
        if type(module) is nn.Sequential:
            pairs += [(conv, norm) for conv, norm in pairwise(module) if _is_plain(conv)]
    fold(model, [(x, y) for x, y in pairs if places[x] == places[y] == 1 and _is_fixed(y)])
    return model


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is a convolution and nothing else."""
    if type(layer) is Conv2d:
        return layer.norm is None and layer.activation is None
    return type(layer) is nn.Conv2d or (type(layer) is nn.ConvTranspose2d and layer.groups == 1)


def _is_fixed(norm: nn.Module) -> bool:
    return type(norm) in _FIXED_NORMS and norm.running_mean is not None
