"""The model zoo: configs and weights are found by name. That they travel with the package: test_packaging.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gs_d2 import model_zoo
from gs_d2.config import load_config
from gs_d2.inference import FaceDetector

ROOT = Path(__file__).resolve().parent.parent


def test_every_config_is_listed_and_read():
    names = model_zoo.list_configs()
    assert names == sorted(path.relative_to(ROOT / "configs").as_posix() for path in ROOT.glob("configs/**/*.yaml"))
    assert model_zoo.list_configs("coco/retinanet_*") == [name for name in names if name.startswith("coco/retinanet_")]
    name = "wider/fpn_finest_sampling.yaml"
    assert model_zoo.get_config(name) == load_config(ROOT / "configs" / name)


def test_unknown_names_are_refused_with_those_that_are_close():
    with pytest.raises(ValueError, match=r"no config 'wider_gs'; close: wider_gs\.yaml"):
        model_zoo.get_config("wider_gs")
    with pytest.raises(ValueError, match=r"no trained weights for wider_gs\.yaml; it has them for .*mobilenetv2"):
        model_zoo.get_config("wider_gs.yaml", trained=True)


def test_a_config_may_be_changed_without_changing_the_next():
    model_zoo.get_config("wider_gs.yaml").MODEL.WEIGHTS = "mine.pth"
    assert model_zoo.get_config("wider_gs.yaml").MODEL.WEIGHTS != "mine.pth"


def test_models_have_their_weights():
    assert model_zoo.DEFAULT in model_zoo.list_models()
    for name in model_zoo.list_models():
        weights = Path(model_zoo.get_checkpoint(name))
        assert weights.stat().st_size <= 8 << 20
        assert model_zoo.get_config(name, trained=True).MODEL.WEIGHTS == str(weights)


def test_trained_models_are_built_for_a_device_and_have_their_weights():
    models = [model_zoo.get(model_zoo.DEFAULT, trained=trained, device="cpu") for trained in (True, True, False)]
    assert not any(model.training for model in models)
    first, second, untrained = (torch.cat([x.flatten() for x in model.parameters()]) for model in models)
    assert torch.equal(first, second) and not torch.equal(first, untrained)


def test_the_default_detector_needs_no_arguments(tmp_path):
    detector = FaceDetector(confidence_threshold=0.05)
    Image.fromarray(np.full((70, 90, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    one_by_one = [detector.detect(tmp_path / "grey.png"), detector.detect(noise)]
    batch = detector.detect_batch([tmp_path / "grey.png", noise])
    assert len(batch) == 2 and detector.detect_batch([]) == []
    for boxes, scores in [*one_by_one, *batch]:
        assert boxes.shape == (len(scores), 4) and boxes.dtype == scores.dtype == np.float32
