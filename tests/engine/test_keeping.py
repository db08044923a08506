"""Which checkpoints stay, and the best; with averaged weights, processes, accumulation and resuming together."""

import json
import math
import os

import pytest
import torch
from detectron2.engine import TrainerBase
from runs import Processes, assert_same_bits, final, small_config, train

from gs_d2.checkpoint import Checkpointer
from gs_d2.engine.keeping import KeepBest, KeepLast


class Small(TrainerBase):
    """Writes a checkpoint in every second iteration, and in some gives values as evaluations do."""

    def __init__(self, folder, *hooks, values=()):
        super().__init__()
        self.folder, self.values, self.model = folder, dict(values), torch.nn.Linear(1, 1)
        self.checkpointer = Checkpointer(self.model, str(folder))
        self.register_hooks(hooks)

    def run_step(self):
        torch.nn.init.constant_(self.model.weight, self.iter)
        if (self.iter + 1) % 2 == 0:
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
            stamp = 1e9 + self.iter  # the disk's clock may be too coarse
            os.utime(self.folder / f"model_{self.iter:07d}.pth", (stamp, stamp))
        self.storage.put_scalars(**self.values.get(self.iter, {}), smoothing_hint=False)


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def test_the_last_stay(tmp_path):
    (tmp_path / "model_final.pth").touch()
    (tmp_path / "mine.pth").touch()
    Small(tmp_path, KeepLast(str(tmp_path), 2, 2)).train(0, 9)
    assert names(tmp_path) == ["mine.pth", "model_0000005.pth", "model_0000007.pth", "model_final.pth"]
    Small(tmp_path, KeepLast(str(tmp_path), 2, 2)).train(8, 12)  # resumed
    assert names(tmp_path) == ["mine.pth", "model_0000009.pth", "model_0000011.pth", "model_final.pth"]
    # Resumed with more processes the iterations are fewer: what counts is when they were written.
    os.utime(tmp_path / "model_0000009.pth", (1, 1)), os.utime(tmp_path / "model_0000011.pth", (2, 2))
    Small(tmp_path, KeepLast(str(tmp_path), 2, 2)).train(5, 6)
    assert "model_0000009.pth" not in names(tmp_path) and "model_0000005.pth" in names(tmp_path)


def test_another_runs_stay(tmp_path):
    """But for those that this run has written over."""
    Small(tmp_path).train(0, 8)
    for path in tmp_path.glob("*.pth"):
        os.utime(path, (1, 1))
    Small(tmp_path, KeepLast(str(tmp_path), 2, 1)).train(0, 6)
    assert names(tmp_path) == ["model_0000005.pth", "model_0000007.pth"]


def best(folder):
    saved = torch.load(folder / "model_best.pth", weights_only=True)
    return saved["iteration"], saved["value"], saved["metric"], saved["model"]["weight"].item()


VALUES = {1: {"ap": 0.5}, 3: {"ap": 0.7}, 4: {"other": 9.0}, 5: {"ap": math.nan}, 7: {"ap": 0.6}}


def test_the_best_is_kept_and_nothing_resumes_from_it(tmp_path):
    Small(tmp_path, KeepBest(str(tmp_path), "ap"), values=VALUES).train(0, 9)
    assert best(tmp_path) == (3, 0.7, "ap", 3.0)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"
    assert set(torch.load(tmp_path / "model_best.pth", weights_only=True)) == {"model", "iteration", "metric", "value"}


@pytest.mark.parametrize(("value", "expected"), [(0.65, 3), (0.75, 9)])
def test_a_resumed_run_knows_the_best(tmp_path, value, expected):
    Small(tmp_path, KeepBest(str(tmp_path), "ap"), values=VALUES).train(0, 9)
    Small(tmp_path, KeepBest(str(tmp_path), "ap"), values={9: {"ap": value}}).train(9, 10)
    assert best(tmp_path)[0] == expected
    Small(tmp_path, KeepBest(str(tmp_path), "ap"), values={0: {"ap": 0.1}}).train(0, 1)  # a new one
    assert best(tmp_path)[:2] == (0, 0.1)


def test_the_whole_test_is_not_compared_with_parts_of_it(tmp_path):
    values = {1: {"periodic/ap": 0.5}, 8: {"ap": 0.9}}
    Small(tmp_path, KeepBest(str(tmp_path), "ap"), values=values).train(0, 9)
    assert best(tmp_path) == (1, 0.5, "periodic/ap", 1.0)


def test_a_metric_that_never_comes_is_said(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="gs_d2"):
        Small(tmp_path, KeepBest(str(tmp_path), "nose/ap"), values=VALUES).train(0, 9)
    assert "No evaluation gave SOLVER.GS.KEEP_BEST nose/ap" in caplog.text
    assert not (tmp_path / "model_best.pth").exists()


# All together

OPTS = ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.GS.ACCUMULATION_STEPS", 2, "SOLVER.GS.EMA_DECAY", 0.5, "TEST.EVAL_PERIOD", 2)
OPTS += ("SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.GS.PERIODIC_IMAGES", 2)
OPTS += ("SOLVER.GS.KEEP_LAST", 2, "SOLVER.GS.KEEP_BEST", "wider_face/all", "DATASETS.TEST", ("engine_train",))
OPTS += ("TEST.GS.SCORE_THRESH", 0.3)


def periodic(output) -> dict:
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {x["iteration"]: x["periodic/wider_face/all"] for x in records if "periodic/wider_face/all" in x}


def test_average_and_cheap_evaluations_in_processes_that_accumulate_and_are_resumed(drawn_datasets, tmp_path):
    """The resumed run is the whole one: weights, their average, evaluations and what is kept."""
    small_config(drawn_datasets, tmp_path)  # registers the data set
    Processes(train, drawn_datasets, tmp_path, *OPTS, world_size=2).wait()
    whole, evaluated = final(tmp_path), periodic(tmp_path)
    assert list(evaluated) == [1]
    assert names(tmp_path) == ["model_0000001.pth", "model_0000002.pth", "model_best.pth", "model_final.pth"]
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (saved["iteration"], saved["metric"]) == (1, "periodic/wider_face/all")
    assert saved["value"] == pytest.approx(evaluated[1])

    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    Processes(train, drawn_datasets, tmp_path, *OPTS, world_size=2, resume=True).wait()
    assert_same_bits(final(tmp_path)["model"], whole["model"])
    state = [x["trainer"]["_trainer"]["weight_average"]["training_weights"] for x in (final(tmp_path), whole)]
    assert_same_bits(*state)
