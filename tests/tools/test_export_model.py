"""tools/export_model.py: its file runs without torch and finds the model's faces; a wrong call writes nothing."""

import builtins
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from export_model import main
from PIL import Image
from small_detector import Blocks
from torch import nn

from gs_d2.config import load_config
from gs_d2.inference.exported import compare, load_exported, matched

QUICK = str(Path(__file__).resolve().parents[2] / "configs" / "quick" / "demo.yaml")
DETECTIONS = 40

# What a user of the file needs, and nothing else: -I leaves PYTHONPATH and the current folder out.
RUN_WITHOUT_TORCH = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = np.load(sys.argv[2])
found = {}
for name in images:
    found[name + ".boxes"], found[name + ".scores"] = session.run(["boxes", "scores"], {"image": images[name]})
np.savez(sys.argv[3], **found)
assert not {"torch", "torchvision", "gs_d2", "detectron2"} & set(sys.modules), sys.modules
"""


@pytest.fixture(scope="module", autouse=True)
def small_backbone():
    """MODEL.BACKBONE.NAME BlocksOfTest: one convolution."""
    name = "BlocksOfTest"
    BACKBONE_REGISTRY._do_register(name, lambda cfg, input_shape: Blocks())
    yield
    del BACKBONE_REGISTRY._obj_map[name]


@pytest.fixture(scope="module")
def opts(tmp_path_factory):
    """Of a detector that finds faces in noise, and none in black."""
    opts = ["MODEL.BACKBONE.NAME", "BlocksOfTest", "TEST.GS.SCORE_THRESH", "0.6"]
    opts += ["MODEL.RPN.POST_NMS_TOPK_TEST", str(DETECTIONS), "TEST.DETECTIONS_PER_IMAGE", str(DETECTIONS)]
    model = build_model(load_config(QUICK, opts))
    torch.manual_seed(0)
    nn.init.zeros_(model.backbone.conv.bias)
    head = model.proposal_generator.rpn_head
    for layer, std in ((head.objectness_logits, 0.5), (head.anchor_deltas, 0.02)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    weights = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict()}, weights)
    return [*opts, "MODEL.WEIGHTS", str(weights), "MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]"]


@pytest.fixture(scope="module")
def detector(opts):
    from gs_d2.inference import FaceDetector

    cfg = load_config(QUICK, opts)
    return FaceDetector(cfg, confidence_threshold=cfg.TEST.GS.SCORE_THRESH).model


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(3)
    sizes = {"square": (64, 64), "wide": (70, 131), "tiny": (5, 7)}
    images = {name: rng.integers(0, 256, (1, 3, *size), dtype=np.uint8) for name, size in sizes.items()}
    return images | {"black": np.zeros((1, 3, 50, 60), np.uint8)}


def call(output, opts, *flags, config=QUICK):
    return main(["--config-file", config, "--output", str(output), *flags, *opts])


def expected(detector, image):
    faces = detector([{"image": torch.from_numpy(image[0])}])[0]["instances"]
    return torch.cat([faces.pred_boxes.tensor, faces.scores[:, None]], dim=1)


def test_the_onnx_file_runs_without_torch(opts, detector, images, tmp_path, capsys):
    path = tmp_path / "folder" / "model.onnx"
    assert call(path.parent, opts) == 0
    printed = capsys.readouterr().out
    assert "Input: image uint8 [1, 3, height, width]" in printed and "0 found by one alone" in printed
    assert "Outputs: boxes float32 [faces, 4]; scores float32 [faces]" in printed
    assert list(path.parent.iterdir()) == [path]  # one file, weights included
    np.savez(tmp_path / "images.npz", **images)
    command = [sys.executable, "-I", "-c", RUN_WITHOUT_TORCH, path, tmp_path / "images.npz", tmp_path / "found.npz"]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = np.load(tmp_path / "found.npz")
    counts = {}
    for name, image in images.items():
        wanted = expected(detector, image)
        boxes, scores = torch.from_numpy(found[f"{name}.boxes"]), torch.from_numpy(found[f"{name}.scores"])
        assert boxes.shape == (len(wanted), 4) and scores.shape == (len(wanted),)
        assert len(matched(torch.cat([boxes, scores[:, None]], dim=1), wanted)) == len(wanted)
        counts[name] = len(wanted)
    assert counts["black"] == 0 and counts["wide"] == DETECTIONS


def test_torchscript_before_nms_of_float_pixels(opts, detector, images, tmp_path, capsys):
    path = tmp_path / "model.ts"
    assert call(path, opts, *("--format", "torchscript", "--nms", "outside", "--input-dtype", "float32")) == 0
    assert "image float32" in capsys.readouterr().out
    facts = {"nms": "", "channels": "", "nms_iou_threshold": ""}
    script = torch.jit.load(str(path), _extra_files=facts)
    assert facts["nms"] == b"outside" and facts["channels"] == b"RGB" and float(facts["nms_iou_threshold"]) > 0
    for image in images.values():
        boxes, scores = script(torch.from_numpy(image).float())
        (candidates,) = detector.predict_candidates([{"image": torch.from_numpy(image[0])}])
        torch.testing.assert_close(boxes, candidates.pred_boxes.tensor, rtol=0, atol=1e-2)
        torch.testing.assert_close(scores, candidates.scores, rtol=0, atol=1e-4)
        assert len(boxes) > DETECTIONS or image.max() == 0 or image.shape[3] == 7


def test_the_sample_image_is_compared_in_the_config_s_order_of_channels(opts, tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "sample.png")
    seen = []
    monkeypatch.setattr("export_model.compare", lambda run, graph, x: seen.extend(x) or compare(run, graph, x))
    flags = ["--format", "torchscript", "--sample-image", str(tmp_path / "sample.png")]
    assert call(tmp_path / "model.ts", [*opts, "INPUT.FORMAT", "BGR"], *flags) == 0
    assert np.array_equal(seen[0][0].transpose(1, 2, 0), pixels[:, :, ::-1])
    assert "4 images (90 x 40, " in capsys.readouterr().out


def test_a_file_that_finds_other_faces_fails(opts, tmp_path, monkeypatch, capsys):
    def off_by_a_pixel(path):
        def run(image):
            boxes, scores = load_exported(path)(image)
            boxes[:1] += 1
            return boxes, scores

        return run

    monkeypatch.setattr("export_model.load_exported", off_by_a_pixel)
    assert call(tmp_path / "model.ts", opts, "--format", "torchscript") == 1
    error = capsys.readouterr().err
    assert "6 faces differ" in error and "only the file: box" in error and "only the model: box" in error


def refuse(capsys, output, opts, message, *flags, config=QUICK, format="torchscript"):
    before = {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        call(output, opts, "--format", format, *flags, config=config)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()} == before


def test_wrong_calls_write_nothing(opts, tmp_path, capsys):
    output = tmp_path / "model.ts"
    output.write_bytes(b"of yesterday")
    pyramid = [*opts, "TEST.GS.PYRAMID", "True"]
    refuse(capsys, output, pyramid, "set TEST.GS.PYRAMID False")
    refuse(capsys, output, [*opts, "MODEL.WEIGHTS", str(tmp_path / "none.pth")], "none.pth")
    refuse(capsys, output, [*opts, "MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32]]"], "objectness_logits")
    refuse(capsys, output, opts, "no_such.png", "--sample-image", str(tmp_path / "no_such.png"))
    refuse(capsys, output, opts, "must end in .onnx", format="onnx")
    refuse(capsys, output / "model.ts", opts, "model.ts")  # below a file
    refuse(capsys, output, opts, "no_such.yaml", config=str(tmp_path / "no_such.yaml"))


def test_two_stages_are_refused(tmp_path, capsys):
    config = QUICK.replace("demo.yaml", "two_stage.yaml")
    torch.save({"model": build_model(load_config(config)).state_dict()}, tmp_path / "two.pth")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "two.pth")]
    refuse(capsys, tmp_path / "model.ts", weights, "GroupedFastRCNN cannot be exported", config=config)


def test_an_export_that_breaks_off_keeps_the_old_file(opts, tmp_path, monkeypatch, capsys):
    def half_a_file(script, file, _extra_files):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.jit, "save", half_a_file)
    (tmp_path / "model.ts").write_bytes(b"of yesterday")
    refuse(capsys, tmp_path / "model.ts", opts, "no space left")
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_packages_are_named(opts, tmp_path, monkeypatch, capsys):
    real_import = builtins.__import__

    def without_onnxruntime(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    message = "pip install -c constraints.txt onnx onnxruntime onnxscript"
    refuse(capsys, tmp_path / "model.onnx", opts, message, format="onnx")
