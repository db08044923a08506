"""WeightAverage: against the textbook's recursion, and with everything that a step of training can be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Processes, assert_same_bits
from test_step import BAD, Model, image, run, trainer_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gs_d2.engine.weight_average import WeightAverage


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(0.0, 0.999))
def test_it_is_the_textbooks_recursion(values, decay):
    model = nn.Linear(1, 1, bias=False).double()
    average = WeightAverage(model, decay)
    expected = values[0]
    for t, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        average.update()
        if t:
            kept = min(decay, (1 + t) / (10 + t))
            expected = kept * expected + (1 - kept) * value
    assert average.averaged_state_dict()["weight"].item() == pytest.approx(expected, abs=1e-9)
    assert model.weight.item() == values[-1]


class Network(nn.Module):
    """A frozen layer, one with statistics, and a weight of two names."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("constant", torch.ones(1))
        self.last = nn.Linear(2, 2, bias=False)
        self.again = self.last


AVERAGED = {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "last.weight", "again.weight"}


def changed(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)


def test_what_is_averaged():
    """Trained parameters and the statistics of batch normalisation; all else is the model's own."""
    model = Network()
    average = WeightAverage(model, 0.9)
    assert_same_bits(average.averaged_state_dict(), model.state_dict())
    average.update()
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    changed(model)
    average.update()
    found = average.averaged_state_dict()
    for name, value in model.state_dict().items():
        share = 1 - 2 / 11 if name in AVERAGED else 1
        torch.testing.assert_close(found[name], (begun[name] + share).to(value.dtype), msg=name)
    assert set(average.state_dict()["training_weights"]) == AVERAGED
    assert len(average._averages) == len(AVERAGED) - 1, "the weight of two names is averaged once"


def test_swapping_in_copies_nothing_and_ends_with_an_error_too():
    model = Network()
    average = WeightAverage(model, 0.9)
    average.update()
    changed(model)
    average.update()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    averages, address = average.averaged_state_dict(), model.last.weight.data_ptr()
    with pytest.raises(KeyError), average.swapped_in():
        assert_same_bits(model.state_dict(), averages)
        assert model.last.weight.data_ptr() == averages["last.weight"].data_ptr()
        raise KeyError
    assert_same_bits(model.state_dict(), trained)
    assert model.last.weight.data_ptr() == address


def test_a_checkpoint_restores_both():
    model, other = Network(), Network()
    average, resumed = WeightAverage(model, 0.9), WeightAverage(other, 0.9)
    for _ in range(3):
        average.update()
        changed(model)
    other.load_state_dict(average.averaged_state_dict())
    resumed.load_state_dict(average.state_dict())
    for _ in range(2):
        assert_same_bits(other.state_dict(), model.state_dict())
        assert_same_bits(resumed.averaged_state_dict(), average.averaged_state_dict())
        changed(model), changed(other)
        average.update(), resumed.update()


def test_a_checkpoint_before_the_first_step():
    model, other = Network(), Network()
    state, weights = WeightAverage(model, 0.9).state_dict(), model.state_dict()
    other.load_state_dict(weights)
    average = WeightAverage(other, 0.9)
    average.load_state_dict(state)
    assert_same_bits(other.state_dict(), weights)
    changed(other)
    average.update()
    assert_same_bits(average.averaged_state_dict(), other.state_dict())


# In steps of training


def averages_of(trainer):
    return trainer.weight_average.averaged_state_dict()["weight"]


def test_a_skipped_step_is_no_update(tmp_path):
    good = [[image(1.0)], [image(2.0)], [image(0.5)]]
    expected, found = (
        trainer_of(batches, tmp_path, nonfinite_loss="skip", ema_decay=0.9)
        for batches in (good, [good[0], [BAD], good[1], [BAD], good[2]])
    )
    run(expected, 3), run(found, 5)
    assert torch.equal(averages_of(found), averages_of(expected))
    assert found.weight_average.state_dict()["updates"] == 3


def test_accumulated_batches_are_one_update(tmp_path):
    trainer = trainer_of([[image(float(i))] for i in range(6)], tmp_path, accumulation_steps=3, ema_decay=0.9)
    (first, second), _ = run(trainer, 2)
    torch.testing.assert_close(averages_of(trainer), first * 2 / 11 + second * 9 / 11)


@pytest.mark.parametrize("scales", [[2.0, 1.0], [2.0, 2.0], [2.0, 4.0]])
def test_a_step_that_the_scaler_leaves_out_is_no_update(tmp_path, scales):
    class Scaler:
        def scale(self, loss):
            return loss

        def step(self, optimizer):
            pass

        def update(self):
            self.get_scale = lambda: scales[1]

        def get_scale(self):
            return scales[0]

    trainer = trainer_of([[image(1.0)]], tmp_path, ema_decay=0.9)
    trainer.grad_scaler = Scaler()
    run(trainer, 1)
    assert trainer.weight_average.state_dict()["updates"] == (scales[1] >= scales[0])


def average_in_two_processes(output):
    rank = torch.distributed.get_rank()
    trainer = trainer_of(
        [[image(1.0 + rank)], [BAD if rank else image(1.0)], [image(2.0 - rank)]],
        output,
        DistributedDataParallel(Model()),
        nonfinite_loss="skip",
        ema_decay=0.9,
    )
    weights, _ = run(trainer, 3)
    return averages_of(trainer).tolist(), [w.tolist() for w in weights]


def test_all_processes_have_the_same_average(tmp_path):
    (average, weights), others = Processes(average_in_two_processes, str(tmp_path), world_size=2).wait()
    assert (average, weights) == others
    first, _, last = (torch.tensor(w) for w in weights)
    torch.testing.assert_close(torch.tensor(average), first * 2 / 11 + last * 9 / 11)
    assert all(map(math.isfinite, average))
