"""The console, and metrics.json: a line for each period, in strict JSON, whatever was measured."""

import json

import torch
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage, JSONWriter

from gs_d2.engine.trainer import Trainer
from gs_d2.engine.writers import Console, MetricsFile
from gs_d2.modeling.criterion import log_group_statistics


def test_nan_and_infinity_are_null(tmp_path):
    writer = MetricsFile(str(tmp_path / "metrics.json"))
    with EventStorage(1) as storage:
        for iteration, value in ((2, float("nan")), (3, 0.5)):
            storage.iter = iteration
            storage.put_scalars(ap=value, loss=float("inf") if iteration == 3 else 0.25, smoothing_hint=False)
            writer.write()
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"ap": None, "iteration": 2, "loss": 0.25},
        {"ap": 0.5, "iteration": 3, "loss": None},
    ]


def test_the_trainer_writes_so(tmp_path):
    trainer = object.__new__(Trainer)
    trainer.cfg, trainer.max_iter = get_cfg(), 1
    trainer.cfg.OUTPUT_DIR = str(tmp_path)
    (writer,) = (writer for writer in trainer.build_writers() if isinstance(writer, JSONWriter))
    with EventStorage() as storage:
        storage.put_scalar("ap", float("nan"))
        writer.write()
    writer.close()
    assert (tmp_path / "metrics.json").read_text() == '{"ap": null, "iteration": 0}\n'


def test_one_line_for_each_period(tmp_path):
    """In which the groups are of the same iteration as the losses."""
    writer = MetricsFile(str(tmp_path / "metrics.json"))
    with EventStorage() as storage:
        for storage.iter in range(40):
            storage.put_scalar("loss", storage.iter, smoothing_hint=False)
            log_group_statistics(
                "groups", [16.0], torch.zeros(4).long(), *torch.zeros(2, 1, 4, dtype=torch.int8), torch.ones(1, 4)
            )
            if (storage.iter + 1) % 20 == 0:  # as Detectron2
                writer.write()
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [19, 39]
    assert all({"loss", "groups/loss_cls@16"} <= line.keys() for line in lines)


def test_the_console_has_the_groups_losses_of_now_and_the_others_smoothed(monkeypatch):
    said = []
    console = Console(100)
    monkeypatch.setattr(console.logger, "info", said.append)
    with EventStorage() as storage:
        for storage.iter in range(20):
            storage.put_scalar("total_loss", storage.iter)
            storage.put_scalar("groups/loss_cls@16", storage.iter, smoothing_hint=False)
        console.write()
        assert len(storage.history("groups/loss_cls@16").values()) == 20
    assert "total_loss: 9.5" in said[0] and "groups/loss_cls@16: 19 " in said[0]
