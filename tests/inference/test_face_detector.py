"""FaceDetector: every kind of image gives the faces that the model finds, and what is wrong is said by name."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from PIL import Image

from gs_d2.config import add_gs_config, load_config
from gs_d2.formats.images import as_rgb
from gs_d2.inference import FaceDetector, PyramidDetector
from gs_d2.modeling import fuse

CONFIG = "configs/quick/demo.yaml"
SIZE = (104, 80)  # width, height


def made_up(size=SIZE):
    """Smooth colours: no two channels, halves or orientations alike."""
    y, x = np.mgrid[: size[1], : size[0]] / np.array([size[1], size[0]]).reshape(2, 1, 1)
    pixels = np.stack([x, y**2, np.sin(9 * x * y) ** 2], axis=2)
    return Image.fromarray((pixels * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def model():
    """Random, with an objectness that tells pixels apart."""
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG)).eval()
    torch.nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def fused(model):
    """The model as it is tested, whose results have other roundings."""
    return fuse(copy.deepcopy(model))


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict(), "iteration": 3}, path)
    return path


@pytest.fixture(scope="module")
def detector(weights):
    return FaceDetector(CONFIG, weights)


def assert_same(found, expected):
    assert len(found[0]) == len(expected[0]) > 0
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# What it finds


def test_the_faces_are_the_models(detector, fused):
    image = made_up()
    boxes, scores = detector.detect(image)
    assert boxes.dtype == scores.dtype == np.float32 and boxes.shape == (len(scores), 4)
    (plain,) = fused([{"image": torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())}])
    faces = plain["instances"][plain["instances"].scores >= 0.5]
    assert_same((boxes, scores), (faces.pred_boxes.tensor.detach().numpy(), faces.scores.detach().numpy()))
    assert (np.diff(scores) <= 0).all() and scores.min() >= 0.5
    assert (boxes >= 0).all() and (boxes[:, 2:] <= SIZE).all()


def test_the_threshold(detector, weights):
    boxes, scores = detector.detect(made_up())
    threshold = float(np.median(scores)) + 1e-4
    found = FaceDetector(CONFIG, weights, confidence_threshold=threshold).detect(made_up())
    # NMS goes by falling score, so that a threshold cuts its result off.
    assert_same(found, (boxes[scores >= threshold], scores[scores >= threshold]))
    assert len(found[0]) < len(boxes)
    none, _ = FaceDetector(CONFIG, weights, confidence_threshold=1.0).detect(made_up())
    assert none.shape == (0, 4)


def test_a_pyramid_where_the_config_says_so(weights, fused):
    opts = ("TEST.GS.PYRAMID", True, "TEST.GS.SCALES", [0.5, 1.0])
    image = made_up()
    found = FaceDetector(CONFIG, weights, opts=opts, confidence_threshold=0.3).detect(image)
    pyramid = PyramidDetector(load_config(CONFIG, opts), fused)
    (plain,) = pyramid([{"image": torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())}])
    faces = plain["instances"][plain["instances"].scores >= 0.3]
    assert_same(found, (faces.pred_boxes.tensor.numpy(), faces.scores.numpy()))


def test_a_config_that_resizes_gives_boxes_of_the_given_image(weights, detector):
    """At twice the size, by the config or by us, the boxes are the same up to rounding."""
    found = FaceDetector(CONFIG, weights, opts=("INPUT.MIN_SIZE_TEST", 2 * SIZE[1])).detect(made_up())
    larger = made_up().resize((2 * SIZE[0], 2 * SIZE[1]), Image.BILINEAR)
    boxes, scores = detector.detect(larger)
    assert len(scores) > 0
    np.testing.assert_allclose(found[1], scores, atol=1e-5)
    np.testing.assert_allclose(found[0], boxes / 2, atol=1e-3)


def test_configs_that_want_bgr_get_it(weights, detector):
    bgr = FaceDetector(CONFIG, weights, opts=("INPUT.FORMAT", "BGR"))
    image = made_up()
    swapped = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
    assert_same(bgr.detect(swapped), detector.detect(image))
    assert not np.array_equal(bgr.detect(image)[1], detector.detect(image)[1])


# Kinds of images


@pytest.mark.parametrize("kind", ["path", "str", "PIL", "array", "strided array"])
def test_kinds_of_arguments(detector, tmp_path, kind):
    image = made_up()
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image)
    given = {
        "path": tmp_path / "a.png",
        "str": str(tmp_path / "a.png"),
        "PIL": image,
        "array": pixels,
        "strided array": np.asfortranarray(pixels),
    }[kind]
    assert_same(detector.detect(given), detector.detect(image))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I"])
def test_modes(detector, tmp_path, mode):
    """Each is what it looks like as RGB; of 16 bits the high byte counts."""
    image = made_up()
    if mode.startswith("I"):
        grey = np.asarray(image.convert("L"))
        array = grey.astype(np.uint16 if mode == "I;16" else np.int32) * 257
        given, expected = Image.fromarray(array), Image.fromarray(grey).convert("RGB")
    else:
        given = image.convert(mode)
        expected = given.convert("RGB")
    assert given.mode == mode
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "I") else "a.png")
    given.save(path)
    assert np.asarray(as_rgb(given)).tolist() == np.asarray(expected).tolist()
    assert np.asarray(as_rgb(path)).tolist() == np.asarray(expected).tolist()
    boxes, scores = detector.detect(path)
    assert_same((boxes, scores), detector.detect(expected))


def test_16_bits_that_are_dark_stay_dark():
    dark = np.full((4, 4), 200, np.uint16)
    assert np.asarray(as_rgb(Image.fromarray(dark))).max() == 0
    assert np.asarray(as_rgb(Image.fromarray(dark.astype(np.int32)))).min() == 200  # 8-bit values in 32 bits


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_that_of_detectron2(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    made_up().save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(as_rgb(path)), read_image(str(path), "RGB"))
    if orientation > 1:
        assert not np.array_equal(np.asarray(as_rgb(path)), np.asarray(made_up()))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (3, 2)])
def test_tiny_images(detector, size):
    boxes, scores = detector.detect(made_up(size))
    assert len(boxes) == len(scores) and (boxes[:, 2:] <= size).all()


# What is refused


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((8, 8, 3)), r"float64 \(8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"uint8 \(0, 8, 3\)"),
        ([[1, 2, 3]], "list"),
        (Image.new("RGB", (0, 4)), "0 x 4"),
        (Image.new("F", (4, 4)), "floats"),
    ],
)
def test_arguments_that_are_no_image(detector, array, got):
    with pytest.raises(ValueError, match=got):
        detector.detect(array)


def test_files_that_are_no_image(detector, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such image: .*none\.jpg"):
        detector.detect(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    made_up().save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    (tmp_path / "empty.jpg").touch()
    for name in ("text.jpg", "half.png", "empty.jpg", "."):
        with pytest.raises(ValueError, match="cannot be read as an image") as error:
            detector.detect(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_configs_that_are_none(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such config: none\.yaml"):
        FaceDetector("none.yaml", weights)
    for text, message in (
        ("MODEL:\n  NO_SUCH_KEY: 1\n", "NO_SUCH_KEY"),
        ("MODEL: [", "line 1, column 9"),
        ('MODEL: !!python/object/apply:os.system ["exit 3"]\n', "python/object"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            FaceDetector(path, weights)
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=r"add_gs_config"):
        FaceDetector(get_cfg(), weights)
    with pytest.raises(ValueError, match=r"opts .*NO_SUCH_KEY"):
        FaceDetector(CONFIG, weights, opts=("TEST.NO_SUCH_KEY", 1))


def test_a_config_is_not_changed(weights):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(CONFIG)
    cfg.freeze()
    before = cfg.dump()
    FaceDetector(cfg, weights, confidence_threshold=0.7, opts=("TEST.DETECTIONS_PER_IMAGE", 7))
    assert cfg.dump() == before


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_thresholds_that_are_no_probability(weights, threshold):
    with pytest.raises(ValueError, match="confidence_threshold must be in"):
        FaceDetector(CONFIG, weights, confidence_threshold=threshold)


def test_devices(weights):
    assert FaceDetector("configs/quick/demo.yaml", weights, device="cpu").cfg.MODEL.DEVICE == "cpu"
    by_default = FaceDetector(CONFIG, weights, opts=("MODEL.DEVICE", "cuda")).cfg.MODEL.DEVICE
    assert by_default == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device cuda:99 cannot be used"):
        FaceDetector(CONFIG, weights, device="cuda:99")


def test_weights_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no weights: .*MODEL\.WEIGHTS is empty"):
        FaceDetector(CONFIG)
    with pytest.raises(FileNotFoundError, match=r"no such weights: .*none\.pth"):
        FaceDetector(CONFIG, tmp_path / "none.pth")
    for i, content in enumerate((b"", b"no weights", pickle.dumps(3, protocol=2))):
        path = tmp_path / f"{i}.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{i}\.pth cannot be read as weights"):
            FaceDetector(CONFIG, path)
    for content in (torch.zeros(3), {"model": {"a": 1}}, {"model": 3}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="holds no model"):
            FaceDetector(CONFIG, path)


def test_weights_of_another_detector(model, tmp_path):
    """No layer stays random, and nothing that was trained is dropped."""
    path = tmp_path / "model.pth"
    key = "proposal_generator.rpn_head.anchor_deltas.bias"
    state = model.state_dict()
    torch.save({k: v for k, v in state.items() if k != key}, path)
    with pytest.raises(ValueError, match=f"does not fit the config's model. Keys 1 missing: {key}$"):
        FaceDetector(CONFIG, path)
    torch.save({**state, "roi_heads.x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"Keys 1 unexpected: roi_heads\.x$"):
        FaceDetector(CONFIG, path)
    torch.save({**state, key: torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=rf"Keys 1 of another shape: {key} \(3,\) \(the model's is \(\d+,\)\)$"):
        FaceDetector(CONFIG, path)
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"Keys \d+ missing: .*, \.\.\.$"):
        FaceDetector(CONFIG, path)


def test_what_old_and_distributed_checkpoints_hold_besides(model, tmp_path, detector):
    path = tmp_path / "model.pth"
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({**state, "module.pixel_mean": torch.zeros(3, 1, 1)}, path)  # without "model" around it, too
    assert_same(FaceDetector(CONFIG, path).detect(made_up()), detector.detect(made_up()))


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_run_no_code_unless_allowed(model, tmp_path, detector, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    trap = tmp_path / "trap"
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    content = {"model": state, "__author__": "test", "trap": Code(trap)}
    torch.save({**content, "model": model.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    for name, message in (("model.pth", "cannot be read as weights"), ("model.pkl", "pass allow_pickle=True")):
        with pytest.raises(ValueError, match=message):
            FaceDetector(CONFIG, tmp_path / name)
        assert not trap.exists()
        found = FaceDetector(CONFIG, tmp_path / name, allow_pickle=True).detect(made_up())
        assert trap.is_dir()
        trap.rmdir()
        assert_same(found, detector.detect(made_up()))
