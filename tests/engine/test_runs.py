"""Whole training runs: they repeat, they survive kill -9, and processes on the CPU train as one with a larger batch."""

import json
import os
import random
import signal
import threading

import pytest
import torch
from runs import Processes, assert_same_bits, final, train

from gs_d2 import ops


def metrics(output) -> dict:
    """(iteration, name) -> value, of all that does not measure time."""
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    timed = {"iteration", "time", "data_time", "rank_data_time", "eta_seconds"}
    return {(r["iteration"], name): value for r in records for name, value in r.items() if name not in timed}


# A seed


def test_a_seed_makes_runs_the_same_bits(drawn_datasets, tmp_path):
    """Twenty iterations with two loader workers; none or another seed shows that it can be told."""
    runs = {
        "first": ("DATALOADER.NUM_WORKERS", 2, "SEED", 5),
        "again": ("DATALOADER.NUM_WORKERS", 2, "SEED", 5),
        "no workers": ("DATALOADER.NUM_WORKERS", 0, "SEED", 5),
        "another seed": ("DATALOADER.NUM_WORKERS", 0, "SEED", 6),
    }
    for name, opts in runs.items():
        Processes(train, drawn_datasets, tmp_path / name, "SOLVER.MAX_ITER", 20, "SOLVER.STEPS", (15,), *opts).wait()
    first = final(tmp_path / "first")
    for name in ("again", "no workers"):
        assert_same_bits(final(tmp_path / name)["model"], first["model"])
        assert metrics(tmp_path / name) == metrics(tmp_path / "first")
    assert len(metrics(tmp_path / "first")) > 20
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(final(tmp_path / "another seed")["model"], first["model"])


def test_without_a_seed_runs_differ(drawn_datasets, tmp_path):
    opts = ("SEED", -1, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,))
    runs = [Processes(train, drawn_datasets, tmp_path / name, *opts) for name in "ab"]
    for run in runs:
        run.wait()
    assert metrics(tmp_path / "a") != metrics(tmp_path / "b")


# Killed and resumed

ITERATIONS = ("SOLVER.MAX_ITER", 9, "SOLVER.STEPS", (4, 7), "SOLVER.CHECKPOINT_PERIOD", 2)
AVERAGED = ("SOLVER.GS.EMA_DECAY", 0.5)


def kill_in(trainer, iteration, seconds):
    """kill -9, this long after the iteration begins, wherever the process then is."""
    from detectron2.engine import HookBase

    class Kill(HookBase):
        def before_step(self):
            if self.trainer.iter == iteration:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

        def after_step(self):
            if self.trainer.iter == 7:  # not past the end, however fast the machine is
                threading.Event().wait()

    trainer.register_hooks([Kill()])


def train_and_be_killed(datasets, output, *opts, iteration, seconds):
    train(datasets, output, *opts, prepare=lambda trainer: kill_in(trainer, iteration, seconds))


@pytest.fixture(scope="module")
def uninterrupted(drawn_datasets, tmp_path_factory):
    """With an average of the weights, which must not change those that are trained."""
    output = tmp_path_factory.mktemp("uninterrupted")
    Processes(train, drawn_datasets, output, *ITERATIONS, *AVERAGED).wait()
    return final(output)


def trained_weights(checkpoint) -> dict:
    average = checkpoint["trainer"]["_trainer"].get("weight_average", {"training_weights": {}})
    return {**checkpoint["model"], **average["training_weights"]}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("seed", "average"), [(0, ()), (1, AVERAGED)])
def test_killed_and_resumed_is_as_if_it_had_not_been(
    drawn_datasets, uninterrupted, tmp_path, seed, average, num_workers
):
    rng = random.Random(10 * seed + num_workers)
    opts = (*ITERATIONS, *average, "DATALOADER.NUM_WORKERS", num_workers)
    iteration, seconds = rng.randrange(3, 7), rng.uniform(0, 0.08)
    killed = Processes(train_and_be_killed, drawn_datasets, tmp_path, *opts, iteration=iteration, seconds=seconds)
    assert killed.exitcodes() == [-signal.SIGKILL]
    assert not (tmp_path / "model_final.pth").exists()
    (start,) = Processes(resume, drawn_datasets, tmp_path, *opts).wait()
    assert start >= 2, "it began anew"
    resumed = final(tmp_path)
    assert resumed["iteration"] == uninterrupted["iteration"] == 8
    assert_same_bits(trained_weights(resumed), trained_weights(uninterrupted))
    if average:
        assert_same_bits(resumed["model"], uninterrupted["model"])
        assert resumed["trainer"]["_trainer"]["weight_average"]["updates"] == 9
        with pytest.raises(AssertionError, match="differ"):
            assert_same_bits(resumed["model"], trained_weights(resumed))
    ours, whole = (checkpoint["trainer"]["_trainer"]["optimizer"] for checkpoint in (resumed, uninterrupted))
    assert ours["param_groups"] == whole["param_groups"]
    for index, state in whole["state"].items():
        assert torch.equal(ours["state"][index]["momentum_buffer"], state["momentum_buffer"])


def resume(datasets, output, *opts):
    return train(datasets, output, *opts, resume=True, prepare=lambda trainer: trainer.start_iter)


# Two processes

# All anchors count and all images are of one size, so that neither draws nor padding depend on the batch.
ALL_SAMPLES = (
    *("MODEL.GS.SAMPLER", "none", "INPUT.GS.SCALES", [1.0], "INPUT.GS.MAX_CROP_SIZE", 128),
    *("SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (2,)),
)


def record_losses(trainer) -> list:
    """One dict of mean losses for each iteration, filled while training; the main process's."""
    from detectron2.engine import HookBase

    recorded = []

    class Record(HookBase):
        def after_step(self):
            latest = self.trainer.storage.latest()
            recorded.append({name: value for name, (value, _) in latest.items() if "loss" in name and "@" not in name})

    trainer.register_hooks([Record()])
    return recorded


def train_and_record(datasets, output, *opts):
    return train(datasets, output, *opts, prepare=record_losses)


def test_two_processes_train_as_one_with_the_doubled_batch(drawn_datasets, tmp_path):
    """And accumulated batches as one; the weights after three steps compare the gradients."""
    runs = {
        "one": (1, 4, 1),
        "two processes": (2, 4, 1),
        "accumulated": (1, 1, 4),
        "both": (2, 2, 2),
    }
    losses = {}
    for name, (world_size, batch_size, steps) in runs.items():
        opts = ("SOLVER.IMS_PER_BATCH", batch_size, "SOLVER.GS.ACCUMULATION_STEPS", steps, *ALL_SAMPLES)
        run = Processes(train_and_record, drawn_datasets, tmp_path / name, *opts, world_size=world_size)
        losses[name] = run.wait()[0]
    expected = final(tmp_path / "one")["model"]
    assert len(losses["one"]) == 3 and {"loss_rpn_cls", "loss_rpn_loc", "total_loss"} <= losses["one"][0].keys()
    for name in list(runs)[1:]:
        for ours, theirs in zip(losses[name], losses["one"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
        weights = final(tmp_path / name)["model"]
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def record_draws(trainer):
    """What group sampling drew in each iteration, on the same image in every process; and its seeds' generator."""
    drawn = []
    original = ops.group_subsample

    def recording(*arguments, **keywords):
        result = original(*arguments, **keywords)
        drawn.append(result.flatten().tolist())
        return result

    ops.group_subsample = recording
    loader = trainer._trainer.data_loader
    loader.__class__.__iter__ = lambda self: iter(lambda: [self.dataset[0, 0]], None)
    return drawn


def train_and_record_draws(datasets, output, *opts):
    return train(datasets, output, *opts, prepare=record_draws)


def test_processes_draw_different_samples_and_each_the_same_again(drawn_datasets, tmp_path):
    opts = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,), "MODEL.GS.SAMPLER", "random", "SOLVER.BASE_LR", 0.0)
    first, again = (
        Processes(train_and_record_draws, drawn_datasets, tmp_path / name, *opts, world_size=2).wait() for name in "ab"
    )
    assert first == again
    assert len(first[0]) == len(first[1]) == 2
    assert first[0][0] != first[1][0] and first[0][1] != first[1][1], "the ranks draw alike"
    assert first[0][0] != first[0][1], "the iterations draw alike"


def describe(trainer):
    cfg = trainer.cfg
    rates = {group["initial_lr"] for group in trainer._trainer.optimizer.param_groups}
    return cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, trainer.max_iter, rates


def train_and_describe(datasets, output, *opts):
    return train(datasets, output, *opts, prepare=describe)


def test_rate_and_length_scale_to_the_number_of_processes(drawn_datasets, tmp_path):
    opts = ("SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.BASE_LR", 0.01, "SOLVER.STEPS", ())
    both = Processes(train_and_describe, drawn_datasets, tmp_path, *opts, world_size=2).wait()
    assert both == [(2, 2, 2, {0.02})] * 2


# Number formats


def test_bfloat16_trains_on_the_cpu(drawn_datasets, tmp_path):
    opts = ("SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (2,))
    runs = {
        dtype: Processes(train_and_record, drawn_datasets, tmp_path / dtype, "MODEL.GS.AUTOCAST_DTYPE", dtype, *opts)
        for dtype in ("", "bfloat16")
    }
    (plain,), (half,) = (run.wait() for run in runs.values())
    assert [x["total_loss"] for x in half] == pytest.approx([x["total_loss"] for x in plain], rel=0.05)
    assert half != plain, "nothing ran in bfloat16"
    assert {value.dtype for value in final(tmp_path / "bfloat16")["model"].values()} == {torch.float32}


@pytest.mark.gpu
def test_amp_trains_on_the_gpu(drawn_datasets, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    opts = ("MODEL.DEVICE", "cuda", "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (2,), "SOLVER.GS.ACCUMULATION_STEPS", 2)
    runs = {
        amp: Processes(train_and_record, drawn_datasets, tmp_path / str(amp), "SOLVER.AMP.ENABLED", amp, *opts)
        for amp in (False, True)
    }
    (plain,), (half,) = (run.wait() for run in runs.values())
    assert [x["total_loss"] for x in half] == pytest.approx([x["total_loss"] for x in plain], rel=0.05)
    assert half != plain, "nothing ran in float16"
    assert final(tmp_path / "True")["trainer"]["_trainer"]["grad_scaler"]["scale"] > 0
    assert "grad_scaler" not in final(tmp_path / "False")["trainer"]["_trainer"]
