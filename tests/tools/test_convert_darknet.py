"""convert_darknet.py: our nets compute what the file's layers say, and a wrong file writes nothing.

The files are written here layer by layer from a list of Darknet's layers, not from our modules.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from convert_darknet import main
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model

from gs_d2.config import add_gs_config
from gs_d2.conversion.darknet import convert_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEM = 4  # an eighth of the published nets' width
HEADER = struct.pack("<3iq", 0, 2, 0, 32013312)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class DarknetFile:
    """Runs a net on an image as Darknet's .cfg describes it, with random weights, and writes them down on the way."""

    def __init__(self, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.numbers = []

    def conv(self, x, channels, kernel_size, stride=1, plain=False):
        shape = (channels, x.shape[1], kernel_size, kernel_size)
        weight = torch.randn(shape, generator=self.random) * (x.shape[1] * kernel_size**2) ** -0.5
        bias, mean = (0.1 * torch.randn(2, channels, generator=self.random)).unbind()
        scale, variance = (0.7 + 0.6 * torch.rand(2, channels, generator=self.random)).unbind()
        self.numbers += [bias, weight] if plain else [bias, scale, mean, variance, weight]
        x = F.conv2d(x, weight, stride=stride, padding=kernel_size // 2)
        if plain:
            return x + bias[:, None, None]
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        x = x * scale[:, None, None] + bias[:, None, None]
        return torch.where(x > 0, x, 0.1 * x)

    def darknet53(self, x):
        x, maps = self.conv(x, STEM, 3), {}
        for k, blocks in enumerate((1, 2, 8, 8, 4), 1):
            x = self.conv(x, STEM * 2**k, 3, stride=2)
            for _ in range(blocks):
                x = x + self.conv(self.conv(x, STEM * 2 ** (k - 1), 1), STEM * 2**k, 3)
            maps[f"res{k}"] = x
        return maps

    def yolov3(self, x, num_outputs=18):
        maps, outputs, x = self.darknet53(x), {}, None
        for k in (5, 4, 3):
            half = STEM * 2 ** (k - 1)
            if x is None:
                x = maps["res5"]
            else:
                x = self.conv(x, half, 1).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = torch.cat([x, maps[f"res{k}"]], dim=1)
            for channels, kernel_size in ((half, 1), (2 * half, 3), (half, 1), (2 * half, 3), (half, 1)):
                x = self.conv(x, channels, kernel_size)
            outputs[f"p{k}"] = self.conv(x, 2 * half, 3)
            self.conv(outputs[f"p{k}"], num_outputs, 1, plain=True)
        return outputs

    def bytes(self, header=HEADER) -> bytes:
        return header + torch.cat([x.flatten() for x in self.numbers]).numpy().astype("<f4").tobytes()


IMAGE = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(5))


def write_darknet53(path, **changes):
    file = DarknetFile()
    maps = file.darknet53(IMAGE)
    path.write_bytes(file.bytes(**changes))
    return maps


def write_yolov3(path, num_outputs=18):
    file = DarknetFile()
    maps = file.yolov3(IMAGE, num_outputs)
    path.write_bytes(file.bytes())
    return maps


def load_cfg(*opts):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "pipelines/yolov3.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", STEM, *opts])
    return cfg


def assert_same(found, expected):
    for name, value in found.items():
        assert value.shape == expected[name].shape
        assert (value - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


@pytest.fixture
def convert(run_command):
    return lambda source, target: run_command(main, source, "--output", target, "--stem-channels", STEM)


@pytest.mark.parametrize(
    "header",
    [HEADER, struct.pack("<3iq", 0, 2, 5, 2**40), struct.pack("<3ii", 0, 1, 0, 77)],
    ids=["0.2", "0.2.5", "0.1: a short count"],
)
def test_a_detector_computes_darknets_features(convert, tmp_path, header):
    """From the pixels on, so that range and order of the channels are right in configs/pipelines/yolov3.yaml too."""
    source, target = tmp_path / "x.conv.74", tmp_path / "new folder" / "x.pth"
    write_darknet53(source, header=header)
    status, out, _ = convert(source, target)
    assert status == 0 and "Darknet-53, 260 tensors; left out: nothing" in out

    cfg = load_cfg("MODEL.WEIGHTS", str(target))
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.NORM) == ("RGB", "FrozenBN")
    detector = build_model(cfg).eval()
    DetectionCheckpointer(detector).load(cfg.MODEL.WEIGHTS)
    rgb = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = DarknetFile().darknet53(rgb[None] / 255)
        assert_same(detector.backbone.bottom_up(detector.preprocess_image([{"image": rgb}]).tensor), expected)


@pytest.mark.parametrize("num_outputs", [18, 255])
def test_yolov3_brings_its_neck(convert, tmp_path, num_outputs):
    source, target = tmp_path / "yolov3.weights", tmp_path / "x.pth"
    expected = write_yolov3(source, num_outputs)
    status, printed, _ = convert(source, target)
    assert (
        status == 0
        and f"YOLOv3, 360 tensors; left out: the predictions ({num_outputs} channels at each stride)" in printed
    )
    for norm in ("naiveSyncBN", "FrozenBN"):
        backbone = build_backbone(load_cfg("MODEL.FPN.NORM", norm)).eval()
        model = torch.nn.ModuleDict({"backbone": backbone})
        DetectionCheckpointer(model).load(str(target))
        with torch.no_grad():
            assert_same(backbone(IMAGE), expected)


def test_the_classifier_is_left_out(tmp_path):
    """darknet53.weights is darknet53.conv.74 and a layer of 1000 outputs."""
    file = DarknetFile()
    maps = file.darknet53(IMAGE)
    file.conv(maps["res5"].mean(dim=(2, 3), keepdim=True), 1000, 1, plain=True)
    (tmp_path / "with").write_bytes(file.bytes())
    write_darknet53(tmp_path / "without")
    converted = convert_file(tmp_path / "with", STEM)
    assert converted.left_out == "the classifier (1000 classes)"
    found, expected = converted.tensors, convert_file(tmp_path / "without", STEM).tensors
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_everything_is_loaded_and_nothing_is_left(convert, tmp_path):
    """Tensors alone: what loads must not be able to run code. Each name of the file is one of the detector's."""
    source, target = tmp_path / "x.weights", tmp_path / "x.pth"
    write_yolov3(source)
    assert convert(source, target)[0] == 0
    tensors = torch.load(target, weights_only=True)["model"]
    detector = build_model(load_cfg())
    names = {name for name in detector.state_dict() if name.startswith("backbone.")}
    assert names - {name for name in names if name.endswith("num_batches_tracked")} == tensors.keys()
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    DetectionCheckpointer(detector).load(str(target))
    loaded = detector.state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_sizes_are_those_of_the_published_files(tmp_path, monkeypatch):
    """In bytes, with their headers of 20; nothing so large is written here."""
    sizes = {"darknet53.conv.74": 162_482_580, "yolov3.weights": 248_007_048}
    found = {}
    path = tmp_path / "x"
    for name, size in sizes.items():
        zeros = np.zeros((size - 20) // 4, dtype="<f4")
        monkeypatch.setattr("gs_d2.conversion.darknet.read", lambda path, zeros=zeros: zeros)
        converted = convert_file(path)
        found[name] = converted.title, converted.left_out
    assert found == {
        "darknet53.conv.74": ("Darknet-53", ""),
        "yolov3.weights": ("YOLOv3", "the predictions (255 channels at each stride)"),
    }


@pytest.mark.parametrize("kind", ["darknet53", "yolov3"])
def test_the_config_printed_is_ours(tmp_path, monkeypatch, run_command, kind):
    """By default the file is where the config looks for it."""
    monkeypatch.chdir(tmp_path)
    {"darknet53": write_darknet53, "yolov3": write_yolov3}[kind](tmp_path / "in")
    status, out, _ = run_command(main, "in", "--stem-channels", STEM)
    assert status == 0
    printed = yaml.safe_load(out)
    assert Path(printed["MODEL"]["WEIGHTS"]).is_file()
    ours = load_cfg()
    if kind == "yolov3":
        printed["MODEL"]["WEIGHTS"] = ours.MODEL.WEIGHTS
    merged = ours.clone()
    merged.merge_from_other_cfg(CfgNode(printed))
    assert merged == ours


def good(path) -> bytes:
    write_darknet53(path)
    return path.read_bytes()


def with_number(position, value):
    """`position` counts numbers behind the header: 3 * STEM is the stem's first variance."""

    def make(path):
        content = bytearray(good(path))
        struct.pack_into("<f", content, len(HEADER) + 4 * position, value)
        path.write_bytes(content)

    return make


WRONG = {
    "one number less": (lambda path: path.write_bytes(good(path)[:-4]), "which is neither net's: Darknet-53 has"),
    "one number more": (lambda path: path.write_bytes(good(path) + b"\0\0\0\0"), "which is neither net's"),
    "half a number": (lambda path: path.write_bytes(good(path)[:-2]), "are no whole number of float32"),
    "half a net": (lambda path: path.write_bytes(good(path)[: 2 * 10**5]), "is it cut short, or of another net"),
    "header alone": (lambda path: path.write_bytes(HEADER), "holds 0 numbers behind its header"),
    "half a header": (lambda path: path.write_bytes(HEADER[:15]), "ends within its header, after 15 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "ends within its header, after 0 bytes"),
    "NaN": (with_number(1000, float("nan")), "1 of its numbers are NaN or infinite"),
    "infinite": (with_number(1000, float("inf")), "1 of its numbers are NaN or infinite"),
    "no variance": (with_number(3 * STEM, -0.5), "negative variances in backbone.bottom_up.stem.norm.running_var;"),
    "text": (lambda path: path.write_text("404: Not Found, says the server"), "not Darknet's: its first numbers say"),
    "a .pth": (lambda path: torch.save({"x": torch.zeros(9)}, path), "not Darknet's: its first numbers say"),
    "no file": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "no such file"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_writes_nothing(convert, tmp_path, make, message):
    source, target = tmp_path / "in.weights", tmp_path / "folder" / "out.pth"
    make(source)
    status, out, err = convert(source, target)
    assert status == 2 and out == "" and f": error: {source}: " in err
    assert message in err and err.count("\n") == 1
    assert not target.parent.exists()


def test_another_width_is_named(tmp_path, run_command):
    write_darknet53(tmp_path / "in")
    status, _, err = run_command(main, tmp_path / "in", "--output", tmp_path / "out.pth")
    assert status == 2 and "Darknet-53 has 40,620,640" in err
    status, _, err = run_command(main, tmp_path / "in", "--stem-channels", 3)
    assert status == 2 and "--stem-channels must be even and at least 2, got 3" in err


def test_detectron2_knows_such_files_by_their_suffix(convert, tmp_path):
    write_darknet53(tmp_path / "in")
    status, _, err = convert(tmp_path / "in", tmp_path / "out.pkl")
    assert status == 2 and "out.pkl: the file to write must be named .pth" in err
    assert not (tmp_path / "out.pkl").exists()
