"""convert_to_timm.py: our backbones compute what the published nets do, and a wrong file writes nothing.

The files are made here with random weights: EfficientNet-Lite0 by the package's names, and an ONNX graph that is laid
out block by block, from the tables of the papers and not from timm.
"""

import os
import pickle
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from convert_to_timm import main
from onnx import TensorProto, helper, numpy_helper

from gs_d2.modeling import TimmBackbone
from gs_d2.weights import read_weights

# Expansion, channels, repeats, stride of the first (MobileNetV2's Table 2); of EfficientNet-Lite0 also the kernel.
MOBILENETV2 = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]
LITE0 = [(1, 16, 1, 3), (6, 24, 2, 3), (6, 40, 2, 5), (6, 80, 3, 3), (6, 112, 3, 5), (6, 192, 4, 5), (6, 320, 1, 3)]
MAPS = ["stride4", "stride8", "stride16", "stride32"]
RELU = {"act_layer": "relu"}


# EfficientNet-Lite0


def lite0(**changes):
    """A state dict by the names of the package, without those whose change is None."""
    random = torch.Generator().manual_seed(0)
    state = {}

    def conv(name, *shape):
        state[f"{name}.weight"] = torch.randn(shape, generator=random) * (shape[1] * shape[2] ** 2) ** -0.5

    def norm(name, channels):
        for kind, low in (("weight", 0.7), ("bias", -0.3), ("running_mean", -0.3), ("running_var", 0.7)):
            state[f"{name}.{kind}"] = low + 0.6 * torch.rand(channels, generator=random)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    before, index = 32, 0
    for expansion, channels, repeats, kernel_size in LITE0:
        for _ in range(repeats):
            wide = before * expansion
            if expansion > 1:
                conv(f"_blocks.{index}._expand_conv", wide, before, 1, 1)
                norm(f"_blocks.{index}._bn0", wide)
            conv(f"_blocks.{index}._depthwise_conv", wide, 1, kernel_size, kernel_size)
            norm(f"_blocks.{index}._bn1", wide)
            conv(f"_blocks.{index}._project_conv", channels, wide, 1, 1)
            norm(f"_blocks.{index}._bn2", channels)
            before, index = channels, index + 1
    conv("_conv_head", 1280, 320, 1, 1)
    norm("_bn1", 1280)
    state |= {"_fc.weight": torch.randn(1000, 1280, generator=random), "_fc.bias": torch.zeros(1000)}
    state |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


def save(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_lite0_takes_every_tensor_to_its_place(tmp_path, ending):
    """In the order of the layers, in which timm's names differ from the package's."""
    source, target = save(tmp_path / "in.pth", lite0()), tmp_path / "new folder" / f"out.{ending}"
    main([str(source), "--output", str(target)])
    found = read_weights(str(target))["model"]
    published = {name: value for name, value in lite0().items() if "num_batches" not in name}
    assert len(lite0()) == 296 and len(found) == len(published) == 247
    by_timm = timm.create_model("tf_efficientnet_lite0")
    by_timm.load_state_dict(found)  # strictly
    in_order = [value for name, value in by_timm.state_dict().items() if "num_batches" not in name]
    for ours, (name, theirs) in zip(in_order, published.items(), strict=True):
        assert torch.equal(ours, theirs), name
    backbone = TimmBackbone("tf_efficientnet_lite0", MAPS, weights=str(target)).eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = by_timm.eval().forward_intermediates(image, intermediates_only=True)[1:]
        for x, y in zip(backbone(image).values(), expected, strict=True):
            assert (x - y).abs().max() <= 1e-4 * y.abs().max()


# MobileNetV2 in a detector


def mobilenetv2(extra=True, seed=0, **changes):
    """An ONNX model of its maps at strides 4 to 32, by names of no meaning; `changes` of the k-th convolution: "conv5"
    maps to a function of its attributes and constants."""
    random = np.random.default_rng(seed)
    nodes, constants, count, maps = [], [], 0, {}

    def conv(x, inputs, outputs, kernel_size=1, stride=1, groups=1, relu=True):
        nonlocal count
        fan_in = inputs // groups * kernel_size**2
        made = {
            "weight": random.normal(0, fan_in**-0.5, (outputs, inputs // groups, kernel_size, kernel_size)),
            "bias": random.normal(0, 0.1, outputs),
            "relu": relu,
            "attributes": {
                "kernel_shape": [kernel_size] * 2,
                "strides": [stride] * 2,
                "pads": [kernel_size // 2] * 4,
                "group": groups,
            },
        }
        changes.get(f"conv{count}", lambda made: None)(made)
        for kind in ("weight", "bias"):
            if made[kind] is not None:
                constants.append(numpy_helper.from_array(made[kind].astype(np.float32), f"{count}.{kind}"))
        inputs = [x, f"{count}.weight", *([f"{count}.bias"] if made["bias"] is not None else [])]
        nodes.append(helper.make_node("Conv", inputs, [f"y{count}"], **made["attributes"]))
        x = f"y{count}"
        if made["relu"]:
            nodes.append(helper.make_node("Relu", [x], [f"r{count}"]))
            x = f"r{count}"
        count += 1
        return x

    x, before, stride = conv("image", 3, 32, 3, 2), 32, 2
    for expansion, channels, repeats, first in MOBILENETV2:
        for i in range(repeats):
            wide, step, entry = before * expansion, first if i == 0 else 1, x
            if expansion > 1:
                x = conv(x, before, wide)
            x = conv(x, wide, wide, 3, step, groups=wide)
            x = conv(x, wide, channels, relu=False)
            if i > 0:
                nodes.append(helper.make_node("Add", [entry, x], [f"sum{count}"]))
                x = f"sum{count}"
            before = channels
        stride *= first
        maps[f"stride{stride}"] = x
    if extra:
        conv(x, 320, 24)
    outputs = [helper.make_tensor_value_info(maps[name], TensorProto.FLOAT, None) for name in MAPS]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "h", "w"])
    graph = helper.make_graph(nodes, "detector", [image], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("extra", [True, False])
def test_mobilenetv2s_maps_are_those_of_the_graph(tmp_path, run_command, extra):
    source, target = tmp_path / "in.onnx", tmp_path / "out.safetensors"
    model = mobilenetv2(extra)
    onnx.save(model, source)
    status, out, _ = run_command(main, source, "--output", target)
    assert status == 0 and "# mobilenetv2_100, 102 tensors" in out
    image = np.random.default_rng(1).uniform(0, 255, (1, 3, 64, 96)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"image": image})
    backbone = TimmBackbone("mobilenetv2_100", MAPS, options=RELU, weights=str(target)).eval()
    with torch.no_grad():
        found = backbone(torch.from_numpy(image))
    for name, y in zip(MAPS, expected, strict=True):
        assert found[name].shape == y.shape
        assert np.abs(found[name].numpy() - y).max() <= 1e-4 * np.abs(y).max(), name


@pytest.mark.parametrize("kind", ["pth", "onnx"])
def test_the_config_printed_builds(tmp_path, monkeypatch, run_command, kind):
    from detectron2.modeling import build_backbone

    from gs_d2.config import load_config

    if kind == "onnx":
        onnx.save(mobilenetv2(), tmp_path / "in.onnx")
    else:
        save(tmp_path / "in.pth", lite0())
    monkeypatch.chdir(tmp_path)
    status, out, _ = run_command(main, f"in.{kind}")
    assert status == 0
    (tmp_path / "printed.yaml").write_text(out)
    cfg = load_config(tmp_path / "printed.yaml")
    assert os.path.isfile(cfg.MODEL.GS.TIMM.WEIGHTS) and cfg.MODEL.WEIGHTS == "" and cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [127.5 if kind == "pth" else 0] * 3
    assert cfg.MODEL.PIXEL_STD == [127.5 if kind == "pth" else 1] * 3
    assert list(build_backbone(cfg).output_shape()) == ["p2", "p3", "p4", "p5"]
    assert yaml.safe_load((tmp_path / "printed.yaml").read_text())["MODEL"]["GS"]["TIMM"]["BN"] == "folded"


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def set_attribute(name, value):
    return lambda made: made["attributes"].update({name: value})


def set_constant(kind, change):
    return lambda made: made.update({kind: change(made[kind])})


def external(path):
    model = mobilenetv2()
    tensor = model.graph.initializer[4]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())


def graph(**changes):
    return lambda path: onnx.save(mobilenetv2(**changes), path)


def state(**changes):
    return lambda path: save(path, lite0(**changes))


IS_NOT = "not MobileNetV2 1.0 with folded BatchNorm and ReLU: convolution"
WRONG = {
    "lite0, missing": (state(_blocks__3___bn1__bias=None), "Lite0: missing _blocks.3._bn1.bias"),
    "lite0, unknown": (state(_blocks__3___se__weight=torch.ones(2)), "unknown _blocks.3._se.weight"),
    "lite0, shape": (state(_bn0__bias=torch.ones(3)), "of another shape _bn0.bias (3,) instead of (32,)"),
    "lite0, NaN": (state(_bn0__bias=torch.full((32,), torch.nan)), "not finite floating-point numbers _bn0.bias"),
    "lite0, none": (lambda path: save(path, [1]), "holds no model"),
    "lite0, code": (
        lambda path: path.write_bytes(pickle.dumps(Hostile(path.parent / "ran"))),
        "cannot be read as weights",
    ),
    "onnx, damaged": (lambda path: path.write_bytes(b"\x08" * 9), "not an ONNX file"),
    "onnx, few": (lambda path: onnx.save(few(), path), "not MobileNetV2: 40 convolutions, and it has 51"),
    "onnx, stride": (
        graph(conv4=set_attribute("strides", [1, 1])),
        f"{IS_NOT} 4 (y4, timm's blocks.1.0.conv_dw): strides [1, 1] instead of [2, 2]",
    ),
    "onnx, padding": (graph(conv0=set_attribute("pads", [0, 0, 1, 1])), "pads [0, 0, 1, 1] instead of [1, 1, 1, 1]"),
    "onnx, auto_pad": (graph(conv0=set_attribute("auto_pad", "SAME_UPPER")), "it has automatic padding"),
    "onnx, dilation": (graph(conv7=set_attribute("dilations", [2, 2])), "dilations [2, 2] instead of [1, 1]"),
    "onnx, groups": (graph(conv1=set_attribute("group", 16)), "group 16 instead of 32"),
    "onnx, width": (graph(conv3=set_constant("weight", lambda x: x[:90])), "shape [90, 16, 1, 1] instead of [96, 16"),
    "onnx, no bias": (
        graph(conv2=set_constant("bias", lambda x: None)),
        f"{IS_NOT} 2 (y2, timm's blocks.0.0.conv_pw): its bias is not in the file",
    ),
    "onnx, NaN": (graph(conv50=set_constant("weight", lambda x: x * np.nan)), "its weight is not of finite"),
    "onnx, linear": (graph(conv3=set_constant("relu", lambda x: False)), "it must be followed by ReLU"),
    "onnx, ReLU": (graph(conv5=set_constant("relu", lambda x: True)), "it must not be followed by ReLU"),
    "onnx, external": (external, "its weight is not in the file"),
}


def few():
    model = mobilenetv2()
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    for node in convs[40:]:
        model.graph.node.remove(node)
    return model


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_writes_nothing(tmp_path, run_command, case):
    write, message = WRONG[case]
    source, target = tmp_path / ("in.onnx" if case.startswith("onnx") else "in.pth"), tmp_path / "out.safetensors"
    write(source)
    status, _, err = run_command(main, source, "--output", target)
    assert status == 2 and str(source) in err and message in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == [source]


def test_names_of_files_are_checked(tmp_path, run_command):
    source = save(tmp_path / "in.pth", {})
    status, _, err = run_command(main, source, "--output", tmp_path / "out.pkl")
    assert status == 2 and "must be named .safetensors or .pth" in err
    status, _, err = run_command(main, tmp_path / "none.onnx")
    assert status == 2 and "no such weights" in err and "none.onnx" in err


@pytest.mark.parametrize(("package", "ending"), [("timm", "pth"), ("onnx", "onnx"), ("safetensors.torch", "pth")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, run_command, package, ending):
    source = tmp_path / f"in.{ending}"
    onnx.save(mobilenetv2(), source) if ending == "onnx" else save(source, lite0())
    monkeypatch.setitem(sys.modules, package, None)
    status, _, err = run_command(main, source, "--output", tmp_path / "out.safetensors")
    assert status == 2 and f"pip install {package.split('.')[0]}" in err
