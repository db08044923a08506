"""The exponential moving average of a model's weights over the steps of its optimizer."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class WeightAverage:
    """Averages what training changes: parameters that are trained, and the statistics of batch normalisation.

    The first update takes the weights as they are. The t-th after it keeps min(decay, (1 + t) / (10 + t)) of the
    average, so that a young average forgets the first, random weights. Frozen parameters and all other buffers have no
    average and cost nothing. The parameters are the same in all processes, and so are their averages.

    Args:
        model: not wrapped by DistributedDataParallel.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model, self._decay = model, decay
        self._updates = 0
        self._index_of_name: dict[str, int] = {}  # a tensor that has several names is averaged once
        self._weights: list[Tensor] = []
        self._averages: list[Tensor] = []

    @torch.no_grad()
    def update(self):
        """To be called after every step of the optimizer."""
        if self._updates == 0:
            self._begin()
        else:
            decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        self._updates += 1

    @contextlib.contextmanager
    def swapped_in(self):
        """Within it the model has the averaged weights; nothing is copied, and training must wait until it ends."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with the averages in it; the model's own before the first update."""
        averages = {name: self._averages[index] for name, index in self._index_of_name.items()}
        return {name: averages.get(name, value) for name, value in self._model.state_dict().items()}

    def state_dict(self) -> dict:
        """The weights that training continues with. The averages are not in it but in :meth:`averaged_state_dict`."""
        weights = {name: self._weights[index].detach() for name, index in self._index_of_name.items()}
        return {"updates": self._updates, "training_weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict):
        """Takes the averages from the model, which must have loaded them, and gives it the weights of training."""
        self._updates = state_dict["updates"]
        if self._updates == 0:
            return
        self._begin()
        for name, weight in state_dict["training_weights"].items():
            if name in self._index_of_name:
                self._weights[self._index_of_name[name]].copy_(weight)

    def _begin(self):
        index_of_tensor: dict[int, int] = {}
        self._index_of_name, self._weights = {}, []
        for name, tensor in _trained_tensors(self._model):
            if id(tensor) not in index_of_tensor:
                index_of_tensor[id(tensor)] = len(self._weights)
                self._weights.append(tensor)
            self._index_of_name[name] = index_of_tensor[id(tensor)]
        self._averages = [weight.detach().clone() for weight in self._weights]

    def _swap(self):
        for i, weight in enumerate(self._weights):
            weight.data, self._averages[i] = self._averages[i], weight.data


def _trained_tensors(model: nn.Module):
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            yield name, parameter
    for prefix, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    yield f"{prefix}.{name}" if prefix else name, buffer
