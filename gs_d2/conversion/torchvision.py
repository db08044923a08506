"""torchvision's ImageNet weights of a ResNet (18, 34, 50, 101, 152), by Detectron2's names.

The depth is told by the names in the file. The ImageNet classifier (fc), which no detector uses, and BatchNorm's
counters are left out.
"""

import re
from pathlib import Path

import torch
from torchvision.models import resnet

from gs_d2.conversion.checks import listed, problems_of, read_tensors
from gs_d2.conversion.converted import Converted

DEPTHS = (18, 34, 50, 101, 152)
_LEFT_OUT = re.compile(r"fc\.(weight|bias)|(.*\.)?num_batches_tracked")

CONFIG = """\
MODEL:
  WEIGHTS: {{weights}}
  PIXEL_MEAN: [123.675, 116.28, 103.53]  # torchvision's x 255
  PIXEL_STD: [58.395, 57.12, 57.375]
  RESNETS:
    DEPTH: {depth}
    RES2_OUT_CHANNELS: {res2_out_channels}
    STRIDE_IN_1X1: False  # torchvision puts the stride in the 3x3
INPUT:
  FORMAT: "RGB\""""


def convert_file(path: Path) -> Converted:
    """
    Args:
        path: torchvision's file (.pth): a state dict.

    Raises:
        FileNotFoundError, ValueError: naming the file and what in it is not usable.
    """
    state_dict = read_tensors(path)
    try:
        depth, tensors = convert(state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Converted(
        title=f"ResNet-{depth}",
        content={"model": tensors, "__author__": "torchvision", "matching_heuristics": True},
        config=CONFIG.format(depth=depth, res2_out_channels=256 if depth >= 50 else 64),
        file_name=f"resnet{depth}.pth",
        left_out=", ".join(name for name in ("fc.weight", "fc.bias") if name in state_dict),
    )


def convert(state_dict: dict[str, torch.Tensor]) -> tuple[int, dict[str, torch.Tensor]]:
    """
    Args:
        state_dict: of torchvision's names.

    Returns:
        depth (int), and float32 tensors by Detectron2's names, such as "res2.0.conv1.norm.weight".

    Raises:
        ValueError: naming what is missing, unknown, misshapen or not finite.
    """
    found = {name: value for name, value in state_dict.items() if not _LEFT_OUT.fullmatch(name)}
    shapes = {depth: _expected_shapes(depth) for depth in DEPTHS}
    depth = min(DEPTHS, key=lambda depth: len(shapes[depth].keys() ^ found.keys()))
    expected = shapes[depth]
    if not expected.keys() & found.keys():
        raise ValueError(f"not a torchvision ResNet: it holds {listed(found) or 'nothing'}")
    problems = problems_of(found, expected)
    if problems:
        raise ValueError(f"not torchvision's ResNet-{depth}, the nearest: {'; '.join(problems)}")
    return depth, {detectron2_name(name): found[name].detach().float() for name in expected}


def detectron2_name(name: str) -> str:
    """ "layer1.0.downsample.1.bias" -> "res2.0.shortcut.norm.bias"; "bn1.bias" -> "stem.conv1.norm.bias"."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"\bbn(\d)", r"conv\1.norm", name)


def _expected_shapes(depth):
    with torch.device("meta"):
        net = getattr(resnet, f"resnet{depth}")(weights=None)
    return {name: tuple(value.shape) for name, value in net.state_dict().items() if not _LEFT_OUT.fullmatch(name)}
