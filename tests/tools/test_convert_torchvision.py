"""convert_torchvision.py: Detectron2's ResNet computes what torchvision's does, and a wrong file writes nothing."""

import functools
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from convert_torchvision import main
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model
from torchvision.transforms.functional import normalize

import gs_d2.modeling  # noqa: F401
from gs_d2.checkpoint import Checkpointer
from gs_d2.config import add_gs_config
from gs_d2.conversion.torchvision import convert, convert_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
YAML_OF = {18: "wider/fpn_finest_sampling_r18.yaml", 50: "Base-WIDER.yaml", 152: "wider/fpn_finest_sampling_r152.yaml"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@functools.lru_cache(maxsize=2)
def trained_net(depth):
    """Random weights, and a BatchNorm of which every value matters."""
    with torch.random.fork_rng():
        torch.manual_seed(depth)
        net = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.3, 1)
                torch.nn.init.normal_(module.bias)
    return net.eval()


def state_dict(depth=18, **changes):
    """A ResNet's state dict, without the names whose change is None."""
    found = dict(trained_net(depth).state_dict()) | {name.replace("__", "."): x for name, x in changes.items()}
    return {name: value for name, value in found.items() if value is not None}


def save(path, content):
    torch.save(content, path)
    return str(path)


def load_cfg(*opts, name="wider/fpn_finest_sampling_r18.yaml"):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    return cfg


def torchvision_features(net, image):
    features, x = {}, net.maxpool(net.relu(net.bn1(net.conv1(image))))
    for stage in range(1, 5):
        features[f"res{stage + 1}"] = x = getattr(net, f"layer{stage}")(x)
    return features


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("depth", [18, 50])
def test_a_detector_computes_torchvisions_features(tmp_path, run_command, depth, legacy):
    """From the pixels on, so mean, deviation and order of the channels are right in configs/Base-WIDER.yaml too."""
    source, target = tmp_path / "in.pth", tmp_path / "new folder" / "out.pth"
    torch.save(state_dict(depth), source, _use_new_zipfile_serialization=not legacy)
    status, out, _ = run_command(main, source, "--output", target)
    assert status == 0 and "left out: fc.weight, fc.bias" in out

    cfg = load_cfg("MODEL.WEIGHTS", str(target), name=YAML_OF[depth])
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.NORM) == ("RGB", "FrozenBN")
    detector = build_model(cfg).eval()
    Checkpointer(detector).load(cfg.MODEL.WEIGHTS, checkpointables=[])  # not a pickle, so no flag

    rgb = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    preset = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    with torch.no_grad():
        expected = torchvision_features(trained_net(depth), normalize(rgb / 255, preset.mean, preset.std)[None])
        found = detector.backbone.bottom_up(detector.preprocess_image([{"image": rgb}]).tensor)
    assert found.keys() == expected.keys()
    for name in expected:
        difference = (found[name] - expected[name]).abs().max()
        assert difference <= 1e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_everything_is_loaded_and_nothing_is_left(tmp_path, depth):
    """Alone and inside a detector, whose names have a prefix that Detectron2 matches by their ends."""
    path = tmp_path / "x.pth"
    save(tmp_path / "in.pth", state_dict(depth))
    converted = convert_file(tmp_path / "in.pth")
    assert converted.title == f"ResNet-{depth}"
    converted.save(path)
    tensors = converted.tensors
    opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256 if depth >= 50 else 64]
    cfg = load_cfg(*opts)
    alone = load_cfg(*opts, "MODEL.BACKBONE.NAME", "build_resnet_backbone")
    for model, prefix in ((build_model(cfg), "backbone.bottom_up."), (build_backbone(alone), "")):
        DetectionCheckpointer(model).load(str(path))
        loaded = {name[len(prefix) :]: x for name, x in model.state_dict().items() if name.startswith(prefix)}
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("depth", [18, 50, 152])
def test_the_config_printed_is_ours(tmp_path, monkeypatch, run_command, depth):
    """By default the file is where the config of its depth looks for it (Base-WIDER.yaml has Detectron2's own)."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = run_command(main, save(tmp_path / "in.pth", state_dict(depth)))
    assert status == 0
    printed = yaml.safe_load(out)
    assert Path(printed["MODEL"]["WEIGHTS"]).is_file()
    ours = load_cfg(name=YAML_OF[depth])
    if depth == 50:
        printed["MODEL"]["WEIGHTS"] = ours.MODEL.WEIGHTS
    merged = ours.clone()
    merged.merge_from_other_cfg(CfgNode(printed))
    assert merged == ours


@pytest.mark.parametrize(
    "change",
    [
        {"fc__weight": None, "fc__bias": None},
        {"fc__weight": torch.zeros(7, 512), "fc__bias": torch.zeros(7)},
        {"bn1__weight": torch.nn.Parameter(torch.ones(64, dtype=torch.float64))},
    ],
    ids=["no fc", "another fc", "double"],
)
def test_what_may_differ(change):
    depth, tensors = convert(state_dict(18, **change))
    assert depth == 18 and len(tensors) == 100
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_files_older_than_batchnorms_counters():
    found = {name: value for name, value in state_dict().items() if not name.endswith("num_batches_tracked")}
    assert convert(found)[1].keys() == convert(state_dict())[1].keys()


def nearly(**changes):
    return lambda path: save(path, state_dict(**changes))


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def cut_short(path):
    save(path, state_dict())
    path.write_bytes(path.read_bytes()[:100_000])


WRONG = {
    "missing": (nearly(layer2__0__bn1__bias=None), "ResNet-18, the nearest: missing layer2.0.bn1.bias"),
    "unknown": (nearly(layer1__0__se__weight=torch.ones(3)), "ResNet-18, the nearest: unknown layer1.0.se.weight"),
    "both": (
        lambda path: save(path, {name.replace("bn1", "norm1"): value for name, value in state_dict().items()}),
        "missing bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var, layer1.0.bn1.weight, layer1.0.bn1.bias "
        "and 30 more; unknown norm1.weight",
    ),
    "shape": (
        nearly(conv1__weight=torch.zeros(64, 1, 7, 7)),
        "ResNet-18, the nearest: of another shape conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7)",
    ),
    "NaN": (
        nearly(bn1__running_var=torch.full((64,), torch.nan)),
        "not finite floating-point numbers bn1.running_var",
    ),
    "integers": (
        nearly(bn1__bias=torch.zeros(64, dtype=torch.int32)),
        "not finite floating-point numbers bn1.bias",
    ),
    "sparse": (nearly(bn1__bias=torch.zeros(64).to_sparse()), "holds no model"),
    "wider": (
        lambda path: save(path, torchvision.models.wide_resnet50_2(weights=None).state_dict()),
        "ResNet-50, the nearest: of another shape layer1.0.conv1.weight (128, 64, 1, 1) instead of (64, 64, 1, 1)",
    ),
    "another net": (
        lambda path: save(path, {"features.0.weight": torch.ones(3), "fc.weight": torch.ones(2)}),
        "not a torchvision ResNet: it holds features.0.weight",
    ),
    "checkpoint": (
        lambda path: save(path, {"state_dict": state_dict(), "epoch": 3}),
        "holds no model",
    ),
    "tensor": (lambda path: save(path, torch.zeros(3)), "holds no model"),
    "nothing": (lambda path: save(path, {}), "not a torchvision ResNet: it holds nothing"),
    "a model": (lambda path: save(path, torch.nn.Linear(2, 2)), "cannot be read as weights"),
    "hostile": (lambda path: save(path, Hostile(path.with_name("mark"))), "cannot be read as weights"),
    "hostile pickle": (
        lambda path: path.write_bytes(pickle.dumps(Hostile(path.with_name("mark")))),
        "cannot be read as weights",
    ),
    "text": (lambda path: path.write_text("404: Not Found"), "cannot be read as weights"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as weights"),
    "cut short": (cut_short, "cannot be read as weights"),
    "no file": (lambda path: None, "no such weights"),
    "a folder": (lambda path: path.mkdir(), "no such weights"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_writes_nothing(tmp_path, run_command, make, message):
    source, target = tmp_path / "in.pth", tmp_path / "folder" / "out.pth"
    make(source)
    status, out, err = run_command(main, source, "--output", target)
    assert status == 2 and out == "" and str(source) in err
    assert message in err and err.count("\n") == 1
    assert not target.parent.exists() and not (tmp_path / "mark").exists()


def test_a_failed_write_keeps_what_was_there(tmp_path, run_command, monkeypatch):
    source, target = save(tmp_path / "in.pth", state_dict()), tmp_path / "out.pth"
    target.write_text("as before")

    def dump(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", dump)
    status, _, err = run_command(main, source, "--output", target)
    assert status == 2 and "No space left on device" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.pth"]
    assert target.read_text() == "as before"


def test_detectron2_reads_such_files_by_their_suffix(tmp_path, run_command):
    source = save(tmp_path / "in.pth", state_dict())
    status, _, err = run_command(main, source, "--output", tmp_path / "out.pkl")
    assert status == 2 and "out.pkl: the file to write must be named .pth" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth"]
