"""The watch over a detector's scores: a dead head is named once, and a healthy one never."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from runs import Processes, small_config

from gs_d2.engine import Trainer
from gs_d2.engine.watchdog import DetectionWatch, TrainingWatch

# In training


@pytest.fixture
def warnings(monkeypatch):
    """What the watch has said; Detectron2's loggers, once set up, are not pytest's to capture."""
    texts = []
    monkeypatch.setattr("gs_d2.engine.watchdog._logger.warning", texts.append)
    return texts


def train(datasets, output, monkeypatch, iterations, prepare=None, *opts):
    """Statistics are written in every iteration."""
    monkeypatch.setattr("gs_d2.modeling.criterion._LOG_PERIOD", 1)
    opts = ("SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", (), *opts)
    trainer = Trainer(small_config(datasets, output, *opts))
    if prepare:
        prepare(trainer.model)
    trainer.train()


def kill_head(model):
    """Every ReLU of the shared convolution is off, so that only the biases of the last layers still learn."""
    with torch.no_grad():
        model.proposal_generator.rpn_head.conv.bias.fill_(-1e4)


@pytest.mark.parametrize("aspect_ratios", [[[1.0]], [[0.5, 1.0, 2.0]]])
def test_a_dead_head_is_named_once(drawn_datasets, tmp_path, monkeypatch, warnings, aspect_ratios):
    """With several anchors of a scale each has a bias, and so a score, of its own."""
    opts = ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", aspect_ratios)
    train(drawn_datasets, tmp_path, monkeypatch, 9, kill_head, *opts)
    text = " ".join(warnings)
    for scale in (16, 32):  # others may have had no faces to look at
        assert text.count(f"groups@{scale} since iteration ") == 1
    assert "(mean score of faces 0." in text and len(warnings) <= 4
    warning = warnings[0]
    assert "MODEL.FPN.NORM GN" in warning and "SOLVER.BASE_LR" in warning and "CLIP_GRADIENTS.ENABLED True" in warning


def test_a_healthy_head_is_not(drawn_datasets, tmp_path, monkeypatch, warnings):
    """From its first, random weights on."""
    train(drawn_datasets, tmp_path, monkeypatch, 9)
    assert warnings == []


DEAD, SURE, HEALTHY = (0.001, 0.25, 0.25), (0.001, 0.9, 0.0), (0.9, 0.2, 0.2)


def watched(moments, period=20):
    """Iteration and text of each warning; a moment is (distinct, pos, neg) of scale 16, or None without faces."""
    watch, warnings = TrainingWatch(), []
    with EventStorage(0) as storage, pytest.MonkeyPatch.context() as patch:
        patch.setattr("gs_d2.engine.watchdog._logger.warning", lambda text: warnings.append((storage.iter, text)))
        watch.trainer = SimpleNamespace(storage=storage)
        for i in range(len(moments) * period):
            storage.iter = watch.trainer.iter = i
            if i % period == 0:
                moment = moments[i // period]
                values = (0.001, None, 0.25) if moment is None else moment
                for name, value in zip(("distinct_scores", "pos_score", "neg_score"), values, strict=True):
                    if value is not None:
                        storage.put_scalar(f"groups/{name}@16", value)
            watch.after_step()
    return warnings


@pytest.mark.parametrize(
    ("moments", "expected"),
    [
        ([DEAD] * 4, []),
        ([DEAD] * 30, [(80, 0)]),
        ([HEALTHY] * 3 + [DEAD] * 9, [(140, 60)]),
        ([DEAD, None] * 5, [(160, 0)]),
        ([None] * 30, []),
        ([DEAD] * 4 + [HEALTHY] + [DEAD] * 4, []),
        ([DEAD] * 5 + [HEALTHY] + [DEAD] * 5, [(80, 0), (200, 120)]),
        ([SURE] * 30, []),
        ([HEALTHY] * 30, []),
    ],
)
def test_five_times_in_a_row(moments, expected):
    warnings = watched(moments)
    assert [iteration for iteration, _ in warnings] == [at for at, _ in expected]
    for (_, text), (_, since) in zip(warnings, expected, strict=True):
        assert f"groups@16 since iteration {since} (mean score of faces 0.25, of background 0.25)" in text


# In evaluations


def outputs(scores, scales=None):
    instances = Instances((9, 9), pred_boxes=Boxes(torch.zeros(len(scores), 4)), scores=torch.tensor(scores))
    if scales is not None:
        instances.anchor_scales = torch.tensor(scales)
    return [{"instances": instances}]


def evaluated(warnings, images, scales=(16, 32), iteration=None):
    watch = DetectionWatch("some_val", list(scales))
    watch.process([{}], outputs([0.5], [64.0]))
    watch.reset()
    for image in images:
        watch.process([{}], image)
    if iteration is None:
        assert watch.evaluate() == {}
    else:
        with EventStorage(iteration):
            assert watch.evaluate() == {}
    return warnings


VARIED = [i / 20 for i in range(10)]


def test_healthy_detections_are_not_named(warnings):
    assert evaluated(warnings, [outputs(VARIED + VARIED, [16.0] * 10 + [31.99] * 10), outputs([], [])]) == []
    assert evaluated(warnings, [outputs(VARIED)]) == [], "without scales"
    assert evaluated(warnings, [outputs([0.5] * 9, [16.0] * 9), outputs([0.4], [32.0])]) == [], "too few to tell"
    assert evaluated(warnings, []) == [], "no image"


def test_a_silent_scale_is_named(warnings):
    (warning,) = evaluated(warnings, [outputs(VARIED, [16.0] * 10)] * 2, iteration=7)
    assert warning.startswith("some_val after iteration 7: scale 32 finds nothing, of 20 detections on 2 images. ")
    assert "MODEL.FPN.NORM GN" in warning


def test_equal_scores_are_named(warnings):
    images = [outputs([0.25] * 6 + VARIED, [16.0] * 6 + [32.0] * 10)] * 2
    (warning,) = evaluated(warnings, images)
    assert warning.startswith("some_val: all 12 detections of scale 16 have the same score, 0.25. ")
    warnings.clear()
    (warning,) = evaluated(warnings, [outputs([0.3] * 12)])
    assert warning.startswith("some_val: all 12 detections have the same score, 0.3. ")


def test_nothing_at_all_is_named(warnings):
    (warning,) = evaluated(warnings, [outputs([], [])] * 3)
    assert warning.startswith("some_val: the detector finds nothing on 3 images. ")


def in_two_processes():
    """Each scale is found, or has another score, by one of the processes only."""
    warnings = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gs_d2.engine.watchdog._logger.warning", warnings.append)
        rank = torch.distributed.get_rank()
        watch = DetectionWatch("some_val", [16, 32, 64])
        watch.process([{}], outputs([0.1 + rank / 2] * 10, [32.0 if rank else 16.0] * 10))
        watch.process([{}], outputs([0.4] * 10, [16.0] * 10))
        watch.evaluate()
    return warnings


def test_processes_look_together():
    (warning,), others = Processes(in_two_processes, world_size=2).wait()
    assert others == []
    text = "some_val: scale 64 finds nothing, of 40 detections on 4 images; all 10 detections of scale 32 have the same"
    assert warning.startswith(text)


def test_an_evaluation_looks(drawn_datasets, tmp_path, warnings):
    """Trainer.test, with the scales of the model's anchors."""
    cfg = small_config(drawn_datasets, tmp_path)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    model = Trainer.build_model(cfg)
    kill_head(model)
    assert list(Trainer.test(cfg, model)) == ["wider_face"]
    (warning,) = warnings
    assert all(f"detections of scale {scale} have the same score, 0.5" in warning for scale in (16, 32, 64, 128))
