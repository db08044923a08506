"""Resuming with another number of processes, batch, rate or seed: converted, applied and said, or refused."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Processes, assert_same_bits, final, seen, small_config, torchrun, train

from gs_d2.engine import Trainer
from gs_d2.engine.resuming import RunSettings, iterations_done


@pytest.fixture
def warnings(monkeypatch):
    """What resuming has said; Detectron2's loggers, once set up, are not pytest's to capture."""
    texts = []
    monkeypatch.setattr("gs_d2.engine.resuming._logger.warning", texts.append)
    return texts


def run_of(world_size, reference, ims_per_batch, steps=1, max_iter=100):
    """Of a config for `reference` processes (0: any), scaled as Detectron2 does."""
    scale = world_size / reference if reference else 1
    return RunSettings(
        world_size=world_size,
        reference_world_size=reference,
        ims_per_batch=round(ims_per_batch * scale),
        accumulation_steps=steps,
        max_iter=round(max_iter / scale),
        base_lr=0.01 * scale,
        weight_decay=1e-4,
        seed=0,
    )


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 8), st.integers(1, 4), st.integers(1, 500), st.data())
def test_images_seen_stay_what_they_were(before, after, reference, steps, max_iter, data):
    """To less than one step, and never beyond the end."""
    before, after = (run_of(n, reference, 2 * reference, steps, max_iter) for n in (before, after))
    done = data.draw(st.integers(0, before.max_iter))
    found = iterations_done(before, after, done)
    difference = done * before.images_per_step - found * after.images_per_step
    assert 0 <= difference < max(before.images_per_step, after.images_per_step) and found <= after.max_iter
    if found < after.max_iter:
        assert difference < after.images_per_step
    if before == after:
        assert found == done


def test_the_same_batch_needs_no_conversion(warnings):
    """Two processes with one image each, or one that accumulates two, or takes both at once."""
    runs = [run_of(2, 0, 2), run_of(1, 0, 1, steps=2), run_of(1, 0, 2), run_of(4, 4, 2)]
    assert {iterations_done(before, after, 7) for before in runs for after in runs} == {7}
    assert warnings == []


def test_a_conversion_says_both(warnings):
    assert iterations_done(run_of(1, 1, 3, steps=2), run_of(2, 1, 3, steps=2), 7) == 3
    (said,) = warnings
    assert (
        "6 images a step (1 processes, SOLVER.IMS_PER_BATCH 3 of all together, SOLVER.GS.ACCUMULATION_STEPS 2" in said
    )
    assert "12 images a step (2 processes, SOLVER.IMS_PER_BATCH 6 of all together" in said
    assert "Its 7 iterations of 100 are 3 of 50 here; the rate is 2 times what it was. 6 images are seen again" in said


KEEP = r"SOLVER\.IMS_PER_BATCH 4 SOLVER\.GS\.ACCUMULATION_STEPS 2\."
LEAVE = r"Leave SOLVER\.REFERENCE_WORLD_SIZE 2, SOLVER\.IMS_PER_BATCH 4 and SOLVER\.GS\.ACCUMULATION_STEPS 1 as they"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        # The batch is lowered by hand, say since it no longer fits.
        (run_of(2, 0, 8), run_of(1, 0, 4), r"8 images a step \(2 proc.*4 images a step \(1 proc.*" + KEEP),
        (run_of(4, 0, 4), run_of(3, 0, 3), "train with a number of processes that divides 4"),
        # The batch is kept by accumulating, but Detectron2 scales the rate to the processes all the same.
        (run_of(2, 2, 4), run_of(1, 2, 4, steps=2), LEAVE),
        (run_of(8, 0, 8), run_of(4, 8, 16), r"SOLVER\.REFERENCE_WORLD_SIZE 0 SOLVER\.IMS_PER_BATCH 8 "),
    ],
)
def test_a_schedule_that_would_be_wrong_is_refused(before, after, message):
    with pytest.raises(ValueError, match=message):
        iterations_done(before, after, 5)


def test_a_checkpoint_beyond_the_end_is_refused():
    with pytest.raises(ValueError, match=r"20 iterations of 2 images, .* 20 of this run's, and .*MAX_ITER is 10"):
        iterations_done(run_of(1, 0, 2), run_of(1, 0, 2, max_iter=10), 20)


def lines(output, key) -> dict:
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {record["iteration"]: record[key] for record in records if key in record}


@pytest.mark.slow
def test_two_processes_one_and_two_again_under_torchrun(drawn_datasets, tmp_path):
    """With accumulated batches: what is seen in the 6 iterations of two processes one sees in 12, at half the rate."""
    scaled = ("SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.GS.ACCUMULATION_STEPS", 2)
    scaled += ("SOLVER.MAX_ITER", 12, "SOLVER.STEPS", (8,), "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.WARMUP_ITERS", 0)
    scaled += ("SOLVER.BASE_LR", 0.005)

    def go_on(name, processes, checkpoint=None):
        (tmp_path / name).mkdir()
        if checkpoint:
            shutil.copy(checkpoint, tmp_path / name)
            (tmp_path / name / "last_checkpoint").write_text(checkpoint.name)
        status, printed = torchrun(drawn_datasets, tmp_path / name, *scaled, processes=processes)
        assert status == 0, printed[-5000:]
        return tmp_path / name, printed

    two, _ = go_on("two", 2)
    assert list(seen(two)) == list(range(6)) and final(two)["iteration"] == 5
    one, printed = go_on("one", 1, two / "model_0000001.pth")
    assert "Starting training from iteration 4" in printed
    assert "Its 2 iterations of 6 are 4 of 12 here; the rate is 0.5 times what it was" in printed
    again, printed = go_on("again", 2, one / "model_0000007.pth")
    assert "Starting training from iteration 4" in printed

    expected = seen(two)
    assert list(seen(one)) == list(range(4, 12)) and list(seen(again)) == [4, 5]
    for i in (2, 3, 4, 5):
        assert sorted(seen(one)[2 * i] + seen(one)[2 * i + 1]) == expected[i]
    assert {i: seen(again)[i] for i in (4, 5)} == {i: expected[i] for i in (4, 5)}
    assert [final(output)["iteration"] for output in (one, again)] == [11, 5]
    # The rate falls after 8 iterations of one process; those of the last iterations are written.
    assert lines(one, "lr")[11] == pytest.approx(0.0005) and lines(again, "lr")[5] == pytest.approx(0.001)
    groups = torch.load(one / "model_0000007.pth", weights_only=True)["trainer"]["_trainer"]["optimizer"][
        "param_groups"
    ]
    assert groups[0]["initial_lr"] == 0.005


SHORT = ("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", ())


def trainer_of(datasets, output, *opts, resume=False):
    torch.manual_seed(0)
    trainer = Trainer(small_config(datasets, output, *SHORT, *opts))
    trainer.resume_or_load(resume=resume)
    return trainer


@pytest.fixture(scope="module")
def halfway(drawn_datasets, tmp_path_factory):
    """The checkpoint after one iteration of two."""
    output = tmp_path_factory.mktemp("halfway")
    trainer_of(drawn_datasets, output).train()
    return output / "model_0000000.pth"


def resumed(datasets, checkpoint, output, *opts):
    shutil.copy(checkpoint, output)
    (output / "last_checkpoint").write_text(checkpoint.name)
    return trainer_of(datasets, output, *opts, resume=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_lower_rate_and_weight_decay_count(drawn_datasets, tmp_path, warnings, optimizer):
    """In the very next iteration; the state of the optimizer is the checkpoint's."""
    opts = ("SOLVER.GS.OPTIMIZER", optimizer)
    trainer_of(drawn_datasets, tmp_path, *opts, "SOLVER.BASE_LR", 0.01, "SOLVER.WEIGHT_DECAY", 0.001).train()
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")
    changed = ("SOLVER.BASE_LR", 0.002, "SOLVER.WEIGHT_DECAY", 0.0005)
    trainer = trainer_of(drawn_datasets, tmp_path, *opts, *changed, resume=True)
    groups = trainer.optimizer.param_groups
    assert {group["lr"] for group in groups} == {group["initial_lr"] for group in groups} == {0.002}
    assert 0.0005 in {group["weight_decay"] for group in groups} and max(g["weight_decay"] for g in groups) == 0.0005
    assert "SOLVER.BASE_LR 0.002 (before 0.01); SOLVER.WEIGHT_DECAY 0.0005 (before 0.001)" in " ".join(warnings)
    assert len(trainer.optimizer.state) == sum(len(group["params"]) for group in groups)
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.002}


@pytest.mark.parametrize(("before", "now"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_another_optimizer_is_refused_with_both(drawn_datasets, tmp_path, before, now):
    trainer_of(drawn_datasets, tmp_path, "SOLVER.GS.OPTIMIZER", before).train()
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")
    with pytest.raises(
        ValueError, match=f"of SOLVER.GS.OPTIMIZER {before}, and this run has {now}: set it to {before}"
    ):
        trainer_of(drawn_datasets, tmp_path, "SOLVER.GS.OPTIMIZER", now, resume=True)


def test_another_rate_of_the_backbone_counts_and_is_said(drawn_datasets, tmp_path, warnings):
    opts = ("SOLVER.GS.OPTIMIZER", "adamw", "SOLVER.BASE_LR", 0.01, "SOLVER.GS.BACKBONE_MULTIPLIER")
    trainer_of(drawn_datasets, tmp_path, *opts, 0.5).train()
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")
    trainer = trainer_of(drawn_datasets, tmp_path, *opts, 0.25, resume=True)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.01, 0.0025}
    assert "SOLVER.GS.BACKBONE_MULTIPLIER 0.25 (before 0.5)" in " ".join(warnings)


def test_other_parameters_than_the_checkpoint_s_are_refused(drawn_datasets, tmp_path):
    trainer_of(drawn_datasets, tmp_path, "MODEL.BACKBONE.FREEZE_AT", 2).train()
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")
    with pytest.raises(ValueError, match=r"--resume: the checkpoint's run trained \d+ parameters in .*FREEZE_AT"):
        trainer_of(drawn_datasets, tmp_path, "MODEL.BACKBONE.FREEZE_AT", 3, resume=True)


def test_checkpoints_say_how_many_images_were_seen(halfway):
    run = torch.load(halfway, weights_only=True)["trainer"]["run"]
    assert run["images_seen"] == run["ims_per_batch"] * run["accumulation_steps"] > 0


def test_nothing_changed_is_nothing_said(drawn_datasets, halfway, tmp_path, warnings):
    resumed(drawn_datasets, halfway, tmp_path)
    assert warnings == []


def test_a_scheduler_of_ones_own_keeps_its_rates_and_that_is_said(drawn_datasets, tmp_path, warnings):
    class Own(Trainer):
        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def own(resume, rate):
        trainer = Own(small_config(drawn_datasets, tmp_path, *SHORT, "SOLVER.BASE_LR", rate))
        trainer.resume_or_load(resume=resume)
        return trainer

    own(False, 0.01).train()
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")
    trainer = own(True, 0.002)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert "SOLVER.BASE_LR 0.002 (before 0.01; StepLR keeps to that)" in " ".join(warnings)


def test_a_drawn_seed_is_gone_on_with(drawn_datasets, tmp_path):
    """The interrupted run is the one without interruption, though SEED is not set."""
    opts = ("SEED", -1, *SHORT)
    Processes(train, drawn_datasets, tmp_path, *opts).wait()
    whole = final(tmp_path)
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")
    Processes(train, drawn_datasets, tmp_path, *opts, resume=True).wait()
    assert_same_bits(final(tmp_path)["model"], whole["model"])
    assert final(tmp_path)["trainer"]["run"]["seed"] == whole["trainer"]["run"]["seed"] >= 0


def test_another_seed_is_said(drawn_datasets, halfway, tmp_path, warnings):
    trainer = resumed(drawn_datasets, halfway, tmp_path, "SEED", 77)
    assert trainer.cfg.SEED == 77 and "SEED 77 (before " in " ".join(warnings)


def test_an_older_checkpoint_is_resumed_and_that_is_said(drawn_datasets, halfway, tmp_path, warnings):
    checkpoint = torch.load(halfway, weights_only=True)
    del checkpoint["trainer"]["run"]
    torch.save(checkpoint, tmp_path / "old.pth")
    (tmp_path / "last_checkpoint").write_text("old.pth")
    trainer = trainer_of(drawn_datasets, tmp_path, resume=True)
    assert trainer.start_iter == 1 and "does not say with how many processes" in " ".join(warnings)


def test_a_run_that_ended_before_its_final_model_gets_one(drawn_datasets, halfway, tmp_path):
    trainer = resumed(drawn_datasets, halfway, tmp_path, "SOLVER.MAX_ITER", 1)
    trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    before = torch.load(halfway, weights_only=True)
    assert final(tmp_path)["iteration"] == 0
    assert_same_bits(final(tmp_path)["model"], before["model"])


def test_another_batch_is_refused_by_resuming(drawn_datasets, halfway, tmp_path):
    with pytest.raises(
        ValueError, match=r"To keep the batch: .* SOLVER\.IMS_PER_BATCH 1 SOLVER\.GS\.ACCUMULATION_STEPS 2"
    ):
        resumed(drawn_datasets, halfway, tmp_path, "SOLVER.IMS_PER_BATCH", 1)
