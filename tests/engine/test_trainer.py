"""Trainer: settings of the solver that are refused, and what of it others may replace."""

import json
import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from runs import assert_same_bits, small_config
from small_detector import build
from torch.nn.parallel import DistributedDataParallel

from gs_d2.config import check_training, load_config
from gs_d2.data import register_wider_face
from gs_d2.engine import Trainer
from gs_d2.engine.trainer import _detections_by_scale
from gs_d2.inference import PyramidDetector


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.GS.ACCUMULATION_STEPS", 0), r"SOLVER\.GS\.ACCUMULATION_STEPS must be at least 1, got 0"),
        (("SOLVER.GS.NONFINITE_LOSS", "ignore"), r"SOLVER\.GS\.NONFINITE_LOSS must be stop or skip, got 'ignore'"),
        (("SOLVER.GS.OPTIMIZER", "adam"), r"SOLVER\.GS\.OPTIMIZER must be sgd or adamw, got 'adam'"),
        (("SOLVER.GS.BACKBONE_MULTIPLIER", 0.0), r"SOLVER\.GS\.BACKBONE_MULTIPLIER must be positive, got 0\.0"),
        (
            ("TEST.GS.PERIODIC_IMAGES", -1),
            r"TEST\.GS\.PERIODIC_IMAGES must be a number of images, or 0 for all, got -1",
        ),
        (("SOLVER.GS.EMA_DECAY", 1.0), r"SOLVER\.GS\.EMA_DECAY must be at least 0 and below 1, got 1\.0"),
        (
            ("SOLVER.GS.EMA_DECAY", 0.9, "TEST.PRECISE_BN.ENABLED", True),
            r"EMA_DECAY 0\.9 evaluates averaged weights.*set TEST\.PRECISE_BN\.ENABLED False",
        ),
        (("SOLVER.AMP.ENABLED", True), r"SOLVER\.AMP\.ENABLED needs a GPU, and MODEL\.DEVICE is cpu"),
        (
            ("SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cuda", "MODEL.GS.AUTOCAST_DTYPE", "bfloat16"),
            r"SOLVER\.AMP\.ENABLED trains in float16 and MODEL\.GS\.AUTOCAST_DTYPE bfloat16 in bfloat16",
        ),
        (("MODEL.GS.AUTOCAST_DTYPE", "float16"), r"AUTOCAST_DTYPE float16 trains without scaling the loss"),
        (
            ("SOLVER.REFERENCE_WORLD_SIZE", 3, "SOLVER.IMS_PER_BATCH", 8),
            r"IMS_PER_BATCH 8 is for SOLVER\.REFERENCE_WORLD_SIZE 3 processes, which do not divide it: set",
        ),
        (("SOLVER.REFERENCE_WORLD_SIZE", -1), r"REFERENCE_WORLD_SIZE -1 processes"),
        (("SOLVER.IMS_PER_BATCH", 0), r"SOLVER\.IMS_PER_BATCH must be a multiple of the 1 processes, got 0"),
        (("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"), r"set it to TrainingSampler"),
    ],
)
def test_settings_that_cannot_train_are_refused(drawn_datasets, tmp_path, opts, message):
    cfg = small_config(drawn_datasets, tmp_path, *opts)
    with pytest.raises(ValueError, match=message):
        Trainer(cfg)


def test_amp_with_the_same_format_at_test_is_no_contradiction(drawn_datasets, tmp_path):
    opts = ("SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cuda", "MODEL.GS.AUTOCAST_DTYPE")
    for dtype in ("float16", ""):
        check_training(small_config(drawn_datasets, tmp_path, *opts, dtype))


def test_a_checkpoint_without_the_optimizer_is_resumed_with_a_warning(drawn_datasets, tmp_path, caplog):
    trainer = Trainer(small_config(drawn_datasets, tmp_path))
    with caplog.at_level("WARNING", logger="gs_d2"):
        trainer.load_state_dict({"iteration": 3})
    assert trainer.iter == 3 and "momentum starts from zero" in caplog.text


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_what_nobody_has_set_up_to_be_logged_is(drawn_datasets, tmp_path, monkeypatch, level):
    """Whoever uses Trainer without default_setup sees its losses, and who has set loggers up keeps them."""
    names = []
    monkeypatch.setattr("gs_d2.engine.trainer.setup_logger", lambda distributed_rank, name: names.append(name))
    before = {name: logging.getLogger(name).level for name in ("detectron2", "gs_d2")}
    try:
        for name in before:
            logging.getLogger(name).setLevel(level)
        Trainer(small_config(drawn_datasets, tmp_path))
    finally:
        for name, of_logger in before.items():
            logging.getLogger(name).setLevel(of_logger)
    assert names == (["detectron2", "gs_d2"] if level == logging.WARNING else [])


@pytest.mark.parametrize("pyramid", [False, True])
def test_training_goes_on_after_an_evaluation(drawn_datasets, tmp_path, pyramid):
    """In training mode, that is: AccumulatingTrainer raises otherwise."""
    seen = []

    class Own(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return super().test(cfg, model, [Sees(model, seen)])

    opts = ("TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "TEST.GS.PYRAMID", pyramid)
    cfg = small_config(drawn_datasets, tmp_path, *opts, "TEST.GS.SCALES", [1.0], "INPUT.MIN_SIZE_TEST", 0)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    trainer = Own(cfg)
    trainer.train()
    assert trainer.iter == 3 and len(seen) > 2 and not any(seen)


class Sees(DatasetEvaluator):
    """Whether the model trains while it is evaluated."""

    def __init__(self, model, seen):
        self._model, self._seen = model, seen

    def process(self, inputs, outputs):
        self._seen.append(self._model.training)


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in DDP"])
@pytest.mark.parametrize(
    ("datasets", "enabled", "expected"),
    [
        (("wider_face_val",), True, True),
        (("fddb", "wider_face_test"), True, True),
        (("wider_face_val",), False, False),
        (("fddb", "afw"), True, False),
        ((), True, False),
    ],
)
def test_detections_by_scale_are_made_while_wider_face_is_tested(datasets, enabled, expected, wrapped):
    cfg = load_config("configs/quick/demo.yaml", ["DATASETS.TEST", datasets, "TEST.GS.AP_BY_SCALE", enabled])
    model = given = build()
    if wrapped:
        given = DistributedDataParallel.__new__(DistributedDataParallel)  # without the processes
        torch.nn.Module.__init__(given)
        given.module = model
    with pytest.raises(KeyboardInterrupt), _detections_by_scale(cfg, given):
        assert model.by_scale is expected
        raise KeyboardInterrupt
    assert model.by_scale is False


def test_a_model_that_has_no_detections_by_scale_is_left_as_it_is():
    cfg = load_config("configs/quick/demo.yaml", ["DATASETS.TEST", ("wider_face_val",)])
    model = torch.nn.Linear(1, 1)
    with _detections_by_scale(cfg, model):
        assert not hasattr(model, "by_scale")


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("config", ["demo", "two_stage"])
def test_metrics_of_every_scale(drawn_datasets, tmp_path, config, pyramid):
    base = drawn_datasets / "widerface"
    annotations, images = base / "wider_face_split" / "wider_face_val_bbx_gt.txt", base / "WIDER_val" / "images"
    register_wider_face("test_metrics", annotations, images, ground_truth_dir=base / "ground_truth")
    opts = ["DATASETS.TEST", ("test_metrics",), "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", 0]
    opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32, "TEST.GS.PYRAMID", pyramid]
    cfg = load_config(f"configs/quick/{config}.yaml", [*opts, "TEST.GS.SCALES", [0.5], "INPUT.MIN_SIZE_TEST", 0])
    torch.manual_seed(0)  # untrained weights: with others, no box of some scale may pass the score threshold
    try:
        metrics = Trainer.test(cfg, Trainer.build_model(cfg))["wider_face"]
    finally:
        DatasetCatalog.remove("test_metrics")
        MetadataCatalog.remove("test_metrics")
    subsets = ("easy", "medium", "hard", "all")
    assert [x for x in metrics if "@" in x] == [f"{name}@{scale}" for scale in (16, 32, 64, 128) for name in subsets]


def test_evaluations_are_of_the_averaged_weights_and_training_is_not(drawn_datasets, tmp_path):
    evaluated, trained = [], []

    class Own(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
            return {}

        def run_step(self):
            super().run_step()
            trained.append({name: value.clone() for name, value in self.model.state_dict().items()})

    opts = ("TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 2)
    cfg = small_config(drawn_datasets, tmp_path, *opts, "SOLVER.GS.EMA_DECAY", 0.1, "SOLVER.WARMUP_ITERS", 0)
    trainer = Own(cfg)
    trainer.train()
    name = "proposal_generator.rpn_head.conv.weight"
    first, second, third = (weights[name] for weights in trained)
    average = 0.1 * first + 0.9 * second  # (1 + 1) / (10 + 1) is above 0.1
    torch.testing.assert_close(evaluated[0][name], average)
    torch.testing.assert_close(evaluated[1][name], 0.1 * average + 0.9 * third)
    assert not torch.equal(evaluated[1][name], third)
    for path, weights in (("model_0000001.pth", evaluated[0]), ("model_final.pth", evaluated[1])):
        assert_same_bits(torch.load(tmp_path / path, weights_only=True)["model"], weights)
    assert_same_bits(trainer.model.state_dict(), trained[-1])


@pytest.mark.parametrize(
    ("num_images", "pyramid", "left_out"),
    [
        (2, False, "subset of 2 images of each test set, single scale. These"),
        (2, True, "subset of 2 images of each test set. These"),
        (0, False, "all images, single scale. These"),
        (0, True, None),
    ],
)
def test_periodic_evaluations_leave_out_what_they_say(
    drawn_datasets, tmp_path, caplog, monkeypatch, num_images, pyramid, left_out
):
    tested_pyramids = []
    monkeypatch.setattr(
        PyramidDetector, "eval", lambda self: tested_pyramids.append(self) or torch.nn.Module.eval(self)
    )
    opts = ("TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "TEST.GS.PYRAMID", True)
    opts += ("TEST.GS.SCALES", [0.5, 1.0], "TEST.GS.PERIODIC_IMAGES", num_images, "TEST.GS.PERIODIC_PYRAMID", pyramid)
    cfg = small_config(drawn_datasets, tmp_path, *opts, "INPUT.MIN_SIZE_TEST", 0)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    size = len(DatasetCatalog.get("engine_train"))
    assert size > 2
    with caplog.at_level("INFO", logger="gs_d2"):
        Trainer(cfg).train()

    assert left_out is None or f"Evaluation after iteration 0: {left_out}" in caplog.text
    assert len(tested_pyramids) == 1 + pyramid
    names = {name for line in (tmp_path / "metrics.json").read_text().splitlines() for name in json.loads(line)}
    assert ("periodic/wider_face/all" in names) == (left_out is not None) and "wider_face/all" in names
    whole = json.loads((tmp_path / "inference/engine_train/results.json").read_text())
    assert whole["num_images"] == size and whole["num_missing"] == 0 and "images" not in whole["setting"]
    assert "0.5, 1 x original" in whole["setting"]["test size"]
    if left_out is None:
        assert not (tmp_path / "periodic").exists() and "after iteration 0" not in caplog.text
        return
    name = "engine_train_subset_2" if num_images else "engine_train"
    part = json.loads((tmp_path / "periodic/inference" / name / "results.json").read_text())
    assert part["num_images"] == (num_images or size) and part["num_missing"] == 0
    assert part["setting"].get("images") == (f"2 of the {size} images of engine_train" if num_images else None)
    assert (part["setting"]["test size"] == "original") == (not pyramid)


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.0), (0.0, 0.5)])
def test_an_average_can_be_begun_and_dropped_by_resuming(drawn_datasets, tmp_path, caplog, before, after):
    def run(iterations, decay):
        opts = ("SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", (), "SOLVER.GS.EMA_DECAY", decay)
        trainer = Trainer(small_config(drawn_datasets, tmp_path, *opts))
        trainer.resume_or_load(resume=True)
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        return start, {name: value.clone() for name, value in trainer.model.state_dict().items()}

    _, trained = run(3, before)
    caplog.clear()
    with caplog.at_level("INFO", logger="gs_d2"):
        start, _ = run(5, after)
    assert_same_bits(start, trained)
    assert ("EMA_DECAY is 0: training continues without it" in caplog.text) == (before > 0)
    assert ("begins with the weights as they are now" in caplog.text) == (after > 0)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["_trainer"]
    assert state.get("weight_average", {}).get("updates") == (2 if after else None)


def test_any_iterable_can_be_the_train_loader(drawn_datasets, tmp_path):
    class Own(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            loader = iter(super().build_train_loader(cfg))
            return [next(loader) for _ in range(2)]

    trainer = Own(small_config(drawn_datasets, tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()))
    trainer.train()
    assert trainer.iter == 2
