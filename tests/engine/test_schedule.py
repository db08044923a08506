"""The flat rate with a decay at its end: by its definition, and resumed with another length."""

import shutil

import pytest
import torch
from detectron2.solver import LRMultiplier
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_bits, small_config

from gs_d2.engine import Trainer
from gs_d2.engine.schedule import FlatThenDecay


def scheduler_of(max_iter, decay_iters, warmup_iters=0, warmup_factor=0.001, warmup_method="linear", rate=0.1):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    multiplier = FlatThenDecay(
        max_iter=max_iter,
        decay_iters=decay_iters,
        warmup_iters=warmup_iters,
        warmup_factor=warmup_factor,
        warmup_method=warmup_method,
    )
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=max_iter)


def rates(scheduler, iterations):
    found = []
    for _ in range(iterations):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_a_rate_by_hand():
    found = rates(scheduler_of(10, 4, warmup_iters=2, warmup_factor=0.5, rate=0.8), 10)
    assert found == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8, 0.6, 0.4, 0.2])
    assert rates(scheduler_of(4, 1, 2, 0.25, "constant", 1.0), 4) == [0.25, 0.25, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"SOLVER\.WARMUP_METHOD must be linear or constant, got 'cosine'"):
        scheduler_of(4, 1, 2, 0.25, "cosine")


@settings(deadline=None)
@given(st.data())
def test_before_its_decay_a_shorter_run_has_the_bits_of_a_longer(data):
    decay_iters, warmup_iters = data.draw(st.integers(1, 50)), data.draw(st.integers(0, 50))
    short = data.draw(st.integers(decay_iters + warmup_iters, 300))
    long = data.draw(st.integers(short, 100_000))
    runs = []
    for max_iter in (short, long):
        scheduler = scheduler_of(max_iter, decay_iters, warmup_iters)
        runs.append([scheduler._multiplier(i / max_iter) for i in range(short)])
    flat_until = short - decay_iters + 1  # the decay's first iteration is flat still
    assert runs[0][:flat_until] == runs[1][:flat_until]
    assert all(factor == 1 for factor in runs[0][warmup_iters:flat_until])


def test_the_state_does_not_hold_the_length():
    short, long = scheduler_of(10, 4), scheduler_of(1000, 4)
    rates(short, 8)
    assert set(short.state_dict()) == {"base_lrs", "last_epoch"}
    long.load_state_dict(short.state_dict())
    assert long.get_lr() == [0.1] and short.get_lr() == pytest.approx([0.05])


FLAT = ("SOLVER.LR_SCHEDULER_NAME", "WarmupFlatDecayLR", "SOLVER.GS.DECAY_ITERS", 2, "SOLVER.WARMUP_ITERS", 1)


def trainer_of(datasets, output, max_iter):
    opts = (*FLAT, "SOLVER.MAX_ITER", max_iter, "SOLVER.CHECKPOINT_PERIOD", 1)
    torch.manual_seed(0)
    return Trainer(small_config(datasets, output, *opts))


def resumed(datasets, checkpoint, output, max_iter):
    """A trainer that has read this checkpoint."""
    shutil.copy(checkpoint, output)
    (output / "last_checkpoint").write_text(checkpoint.name)
    trainer = trainer_of(datasets, output, max_iter)
    trainer.resume_or_load(resume=True)
    return trainer


@pytest.fixture(scope="module")
def runs(drawn_datasets, tmp_path_factory):
    """Length -> the output of an uninterrupted run, with a checkpoint of each iteration."""
    outputs = {length: tmp_path_factory.mktemp(f"length_{length}") for length in (5, 6)}
    for length, output in outputs.items():
        trainer_of(drawn_datasets, output, length).train()
    return outputs


@pytest.fixture
def warnings(monkeypatch):
    """What resuming has said; Detectron2's loggers, once set up, are not pytest's to capture."""
    texts = []
    monkeypatch.setattr("gs_d2.engine.resuming._logger.warning", texts.append)
    return texts


@pytest.mark.parametrize(
    ("before", "checkpoint", "after"),
    [
        (5, "model_0000001.pth", 6),
        (5, "model_0000002.pth", 6),  # the last that is not of the decay
        (6, "model_0000002.pth", 5),  # ended earlier
    ],
)
def test_another_length_is_as_if_it_had_been_set_so(
    drawn_datasets, runs, tmp_path, warnings, before, checkpoint, after
):
    resumed(drawn_datasets, runs[before] / checkpoint, tmp_path, after).train()
    found, expected = (torch.load(x / "model_final.pth", weights_only=True) for x in (tmp_path, runs[after]))
    assert_same_bits(found["model"], expected["model"])
    states = [x["trainer"]["_trainer"]["optimizer"]["param_groups"] for x in (found, expected)]
    assert states[0] == states[1] and found["iteration"] == after - 1
    assert warnings == []


def test_a_checkpoint_inside_the_decay_is_named(drawn_datasets, runs, tmp_path, warnings):
    resumed(drawn_datasets, runs[5] / "model_final.pth", tmp_path, 5)
    assert warnings == []
    trainer = resumed(drawn_datasets, runs[5] / "model_final.pth", tmp_path, 9)
    assert "The checkpoint after 5 iterations lies inside the decay of the run that wrote it" in " ".join(warnings)
    assert f"write its name into {tmp_path}/last_checkpoint" in " ".join(warnings)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.cfg.SOLVER.BASE_LR, "of the very next iteration"


def test_a_decay_that_is_cut_is_named(drawn_datasets, runs, tmp_path, warnings):
    resumed(drawn_datasets, runs[6] / "model_0000002.pth", tmp_path, 4)
    assert "MAX_ITER 4 leaves 1 iterations of the decay's 2: set SOLVER.MAX_ITER 5 for all of it" in " ".join(warnings)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            (*FLAT, "SOLVER.GS.DECAY_ITERS", 0),
            r"SOLVER\.GS\.DECAY_ITERS must be at least 1 with WarmupFlatDecayLR, got 0",
        ),
        (
            (*FLAT, "SOLVER.MAX_ITER", 2),
            r"SOLVER\.MAX_ITER 2 has no room for SOLVER\.WARMUP_ITERS 1 and .*DECAY_ITERS 2",
        ),
        (("SOLVER.GS.DECAY_ITERS", 3), r"SOLVER\.GS\.DECAY_ITERS 3 does nothing in WarmupMultiStepLR: set"),
    ],
)
def test_schedules_that_cannot_be_are_refused(drawn_datasets, tmp_path, opts, message):
    with pytest.raises(ValueError, match=message):
        Trainer(small_config(drawn_datasets, tmp_path, *opts))


def test_the_decay_scales_with_the_length(drawn_datasets, tmp_path):
    opts = ("SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 100, "SOLVER.STEPS", ())
    cfg = small_config(drawn_datasets, tmp_path, *FLAT, *opts, "SOLVER.GS.DECAY_ITERS", 11)
    cfg.freeze()
    scaled = Trainer.auto_scale_workers(cfg, 2)
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.GS.DECAY_ITERS, scaled.is_frozen()) == (400, 44, True)
    assert cfg.SOLVER.GS.DECAY_ITERS == 11 and Trainer.auto_scale_workers(cfg, 8) is cfg


def test_periods_stay_at_least_one(drawn_datasets, tmp_path):
    """Detectron2 rounds them to 0, by which its checkpointer divides."""
    opts = ("SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)
    scaled = Trainer.auto_scale_workers(small_config(drawn_datasets, tmp_path, *opts), 8)
    assert (scaled.SOLVER.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD) == (1, 1)
    opts = (*opts, "TEST.EVAL_PERIOD", 0)
    assert Trainer.auto_scale_workers(small_config(drawn_datasets, tmp_path, *opts), 8).TEST.EVAL_PERIOD == 0
