"""convert_torchvision.py: Detectron2's ResNet computes what torchvision's does, and a wrong file writes nothing."""

import functools
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model
from torchvision.transforms.functional import normalize

import gs_d2.modeling  # noqa: F401
from gs_d2.checkpoint import Checkpointer
from gs_d2.config import add_gs_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
YAML_OF = {18: "wider/fpn_finest_sampling_r18.yaml", 50: "Base-WIDER.yaml", 152: "wider/fpn_finest_sampling_r152.yaml"}


@pytest.fixture(scope="module")
def tool(load_script):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_script("tools/convert_torchvision.py")
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
def test_a_detector_computes_torchvisions_features(tool, tmp_path, capsys, depth, legacy):
    """From the pixels on, so mean, deviation and order of the channels are right in configs/Base-WIDER.yaml too."""
    source, target = tmp_path / "in.pth", tmp_path / "new folder" / "out.pth"
    torch.save(state_dict(depth), source, _use_new_zipfile_serialization=not legacy)
    assert tool.main([str(source), "--output", str(target)]) == 0
    assert "left out: fc.weight, fc.bias" in capsys.readouterr().out

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
def test_everything_is_loaded_and_nothing_is_left(tool, tmp_path, depth):
    """Alone and inside a detector, whose names have a prefix that Detectron2 matches by their ends."""
    path = tmp_path / "x.pth"
    detected, arrays = tool.convert(state_dict(depth))
    assert detected == depth
    tool.write(path, arrays)
    opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256 if depth >= 50 else 64]
    cfg = load_cfg(*opts)
    alone = load_cfg(*opts, "MODEL.BACKBONE.NAME", "build_resnet_backbone")
    for model, prefix in ((build_model(cfg), "backbone.bottom_up."), (build_backbone(alone), "")):
        DetectionCheckpointer(model).load(str(path))
        loaded = {name[len(prefix) :]: x for name, x in model.state_dict().items() if name.startswith(prefix)}
        assert loaded.keys() == arrays.keys()
        assert all(torch.equal(loaded[name], torch.from_numpy(arrays[name])) for name in arrays)


@pytest.mark.parametrize("depth", [18, 50, 152])
def test_the_config_printed_is_ours(tool, tmp_path, monkeypatch, capsys, depth):
    """By default the file is where the config of its depth looks for it (Base-WIDER.yaml has Detectron2's own)."""
    monkeypatch.chdir(tmp_path)
    assert tool.main([save(tmp_path / "in.pth", state_dict(depth))]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
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
def test_what_may_differ(tool, change):
    depth, arrays = tool.convert(state_dict(18, **change))
    assert depth == 18 and len(arrays) == 100
    assert {str(array.dtype) for array in arrays.values()} == {"float32"}


def test_files_older_than_batchnorms_counters(tool):
    found = {name: value for name, value in state_dict().items() if not name.endswith("num_batches_tracked")}
    assert tool.convert(found)[1].keys() == tool.convert(state_dict())[1].keys()


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
    "sparse": (nearly(bn1__bias=torch.zeros(64).to_sparse()), "not finite floating-point numbers bn1.bias"),
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
        "holds no state dict: 'state_dict' is dict of 122, not a tensor",
    ),
    "tensor": (lambda path: save(path, torch.zeros(3)), "holds no state dict, but Tensor of 3"),
    "nothing": (lambda path: save(path, {}), "holds no state dict, but dict of 0"),
    "a model": (lambda path: save(path, torch.nn.Linear(2, 2)), "not a file of weights alone"),
    "hostile": (lambda path: save(path, Hostile(path.with_name("mark"))), "not a file of weights alone"),
    "hostile pickle": (
        lambda path: path.write_bytes(pickle.dumps(Hostile(path.with_name("mark")))),
        "not a file of weights alone",
    ),
    "text": (lambda path: path.write_text("404: Not Found"), "not a file of weights alone"),
    "empty": (lambda path: path.write_bytes(b""), "not a file of weights alone"),
    "cut short": (cut_short, "not a file of weights alone"),
    "no file": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "no such file"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_writes_nothing(tool, tmp_path, capsys, make, message):
    source, target = tmp_path / "in.pth", tmp_path / "folder" / "out.pth"
    make(source)
    assert tool.main([str(source), "--output", str(target)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"convert_torchvision: {source}: ")
    assert message in printed.err and printed.err.count("\n") == 1
    assert not target.parent.exists() and not (tmp_path / "mark").exists()


def test_a_failed_write_keeps_what_was_there(tool, tmp_path, capsys, monkeypatch):
    source, target = save(tmp_path / "in.pth", state_dict()), tmp_path / "out.pth"
    target.write_text("as before")

    def dump(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(tool.torch, "save", dump)
    assert tool.main([source, "--output", str(target)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.pth"]
    assert target.read_text() == "as before"


def test_detectron2_reads_such_files_by_their_suffix(tool, tmp_path, capsys):
    source = save(tmp_path / "in.pth", state_dict())
    assert tool.main([source, "--output", str(tmp_path / "out.pkl")]) == 2
    assert "out.pkl: Detectron2 reads these weights from a file named .pth only" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth"]
