"""A detector that somebody else registers: it trains, is evaluated and finds faces by scripts that do not know it."""

import json

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from runs import small_config
from torch import nn

from demo import main
from gs_d2 import engine
from gs_d2.config import check_config
from gs_d2.evaluation import CocoRecallEvaluator
from gs_d2.inference import FaceDetector
from gs_d2.modeling import BreakingDefault, DetectionSettings, RPNDetector, description_of
from train_net import Trainer


@META_ARCH_REGISTRY.register()
class OneBox(nn.Module):
    """Finds the same face in every image."""

    def __init__(self, cfg):
        super().__init__()
        self.box = nn.Parameter(torch.tensor([20.0, 20.0, 50.0, 60.0]))

    def forward(self, batched_inputs):
        if self.training:
            return {"loss_box": sum((x["instances"].gt_boxes.tensor - self.box).abs().mean() for x in batched_inputs)}
        found = {"pred_boxes": Boxes(self.box.detach()[None]), "pred_classes": torch.tensor([0])}
        sizes = [(x["height"], x["width"]) for x in batched_inputs]
        return [{"instances": Instances(size, **found, scores=torch.tensor([0.75]))} for size in sizes]


@META_ARCH_REGISTRY.register()
class OwnRPNDetector(RPNDetector):
    """Says of itself what differs from the class that it derives from."""

    @classmethod
    def test_settings(cls, cfg):
        return DetectionSettings(0.25, "one a cell", 0.375, cfg.TEST.DETECTIONS_PER_IMAGE)

    @classmethod
    def breaking_defaults(cls, cfg):
        return [*super().breaking_defaults(cfg), BreakingDefault("SOLVER.MOMENTUM", 0.9, "it needs none")]


OWN = ("MODEL.META_ARCHITECTURE", "OneBox")


def test_it_trains_is_evaluated_and_finds_faces(drawn_datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = small_config(drawn_datasets, tmp_path / "run", *OWN, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ())
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    check_config(cfg)
    (tmp_path / "run").mkdir()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    before = trainer.model.box.detach().clone()
    trainer.train()
    assert (trainer.model.box != before).any()
    summary = json.loads((tmp_path / "run/inference/engine_train/results.json").read_text())
    assert summary["all"] == 0, "all scores are equal, which gives AP 0"
    by_model = ("score threshold", "boxes before NMS", "NMS IoU", "boxes per image")
    assert {name: summary["setting"][name] for name in by_model} == dict.fromkeys(by_model, "set by the model")

    (tmp_path / "config.yaml").write_text(cfg.dump())
    weights, picture = tmp_path / "run/model_final.pth", next(drawn_datasets.rglob("*.jpg"))
    (boxes,), scores = FaceDetector(tmp_path / "config.yaml", weights).detect(picture)
    assert scores.tolist() == [0.75] and torch.equal(torch.from_numpy(boxes), trainer.model.box.detach())
    command = ["--config-file", tmp_path / "config.yaml", "--input", picture, "--output", tmp_path / "faces.png"]
    opts = ["--opts", "MODEL.WEIGHTS", weights, "TEST.GS.PYRAMID", "False"]
    assert main([str(word) for word in command + opts]) == 0 and (tmp_path / "faces.png").is_file()


def test_a_threshold_that_the_detector_does_not_know_is_kept_to(drawn_datasets, tmp_path):
    cfg = small_config(drawn_datasets, tmp_path, *OWN)
    torch.save({"model": {"box": torch.tensor([20.0, 20.0, 50.0, 60.0])}}, tmp_path / "model.pth")
    picture = next(drawn_datasets.rglob("*.jpg"))
    for threshold, count in ((0.75, 1), (0.8, 0)):
        boxes, scores = FaceDetector(cfg, tmp_path / "model.pth", confidence_threshold=threshold).detect(picture)
        assert boxes.shape == (count, 4) and len(scores) == count


def test_a_class_derived_from_ours_says_what_differs(drawn_datasets, tmp_path, coco_toy):
    cfg = small_config(drawn_datasets, tmp_path, "MODEL.META_ARCHITECTURE", "OwnRPNDetector")
    setting = engine.test_setting(cfg)
    assert (setting["score threshold"], setting["boxes before NMS"]) == (0.25, "one a cell")
    assert (setting["NMS IoU"], setting["boxes per image"]) == (0.375, 2000)
    model = engine.Trainer.build_model(cfg)
    assert (model.nms_thresh, model.max_detections) == (0.375, 2000)
    assert isinstance(engine.Trainer.build_evaluator(cfg, "coco_toy_val"), CocoRecallEvaluator)
    with pytest.raises(ValueError, match=r"SOLVER\.MOMENTUM is Detectron2's default 0\.9: it needs none"):
        check_config(cfg)


def test_a_detector_without_a_word_tells_classes_and_has_no_breaking_default():
    description = description_of("OneBox")
    assert not description.class_agnostic and description.breaking_defaults(None) == []
    assert description.contradictions(None, True) == [] and description.unread_keys(None) == {}


def test_a_name_that_nobody_registered(drawn_datasets, tmp_path):
    cfg = small_config(drawn_datasets, tmp_path, "MODEL.META_ARCHITECTURE", "TwoBoxes")
    with pytest.raises(ValueError, match="META_ARCHITECTURE 'TwoBoxes' is not registered: correct it, or import"):
        check_config(cfg)
