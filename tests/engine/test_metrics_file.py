"""metrics.json: strict JSON, whatever was measured."""

import json

from detectron2.config import get_cfg
from detectron2.engine.defaults import default_writers
from detectron2.utils.events import EventStorage, JSONWriter

from gs_d2.engine.metrics_file import with_strict_json
from gs_d2.engine.trainer import Trainer


def test_nan_and_infinity_are_null(tmp_path):
    writers = with_strict_json(default_writers(str(tmp_path), 10))
    with EventStorage(1) as storage:
        for iteration, value in ((2, float("nan")), (3, 0.5)):
            storage.iter = iteration
            storage.put_scalars(ap=value, loss=float("inf") if iteration == 3 else 0.25, smoothing_hint=False)
            writers[1].write()
    for writer in writers:
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
