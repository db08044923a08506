#!/usr/bin/env python
"""Converts torchvision's ImageNet weights of a ResNet (18, 34, 50, 101, 152) into a file for MODEL.WEIGHTS.

    tools/convert_torchvision.py resnet18-f37072fd.pth

The output is a .pth that Detectron2's checkpointer loads into a ResNet, alone or inside a detector. The depth is told
by the names in the file. The ImageNet classifier (fc) is left out, for no detector uses it, and so are BatchNorm's
counters. Whatever else is missing, unknown, of another shape or not a finite number is an error, and then nothing is
written. Prints the config that these weights need, as YAML. Exit code 2 on an error.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torchvision.models import resnet

DEPTHS = (18, 34, 50, 101, 152)
_LEFT_OUT = re.compile(r"fc\.(weight|bias)|(.*\.)?num_batches_tracked")
_SHOWN = 6  # names listed in one message

CONFIG = """\
MODEL:
  WEIGHTS: {weights}
  PIXEL_MEAN: [123.675, 116.28, 103.53]  # torchvision's x 255
  PIXEL_STD: [58.395, 57.12, 57.375]
  RESNETS:
    DEPTH: {depth}
    RES2_OUT_CHANNELS: {res2_out_channels}
    STRIDE_IN_1X1: False  # torchvision puts the stride in the 3x3
INPUT:
  FORMAT: "RGB\""""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="torchvision's file (.pth): a state dict")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write, .pth (default: weights/resnet<depth>.pth, where our configs look for it)",
    )
    args = parser.parse_args(argv)
    try:
        if args.output is not None and args.output.suffix != ".pth":
            raise ValueError(f"{args.output}: Detectron2 reads these weights from a file named .pth only")
        state_dict = read(args.weights)
        try:
            depth, arrays = convert(state_dict)
        except ValueError as error:
            raise ValueError(f"{args.weights}: {error}") from error
        output = args.output or Path("weights") / f"resnet{depth}.pth"
        write(output, arrays)
    except (OSError, ValueError) as error:
        print(f"convert_torchvision: {error}", file=sys.stderr)
        return 2
    left_out = [name for name in ("fc.weight", "fc.bias") if name in state_dict]
    print(f"# ResNet-{depth}, {len(arrays)} arrays; left out: {', '.join(left_out) or 'nothing'}")
    print(
        CONFIG.format(
            weights=json.dumps(str(output)),  # JSON's strings are YAML's too
            depth=depth,
            res2_out_channels=256 if depth >= 50 else 64,
        )
    )
    return 0


def read(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file. Nothing in it is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file may raise anything, according to where it breaks
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: not a file of weights alone, as torch.save writes a state dict ({reason})"
        ) from error
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError(f"{path}: holds no state dict, but {_described(state_dict)}")
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: holds no state dict: {name!r} is {_described(value)}, not a tensor")
    return state_dict


def convert(state_dict: dict[str, torch.Tensor]) -> tuple[int, dict[str, np.ndarray]]:
    """
    Args:
        state_dict: of torchvision's names.

    Returns:
        depth (int), and float32 arrays by Detectron2's names, such as "res2.0.conv1.norm.weight".

    Raises:
        ValueError: naming what is missing, unknown, misshapen or not finite.
    """
    found = {name: value for name, value in state_dict.items() if not _LEFT_OUT.fullmatch(name)}
    shapes = {depth: _expected_shapes(depth) for depth in DEPTHS}
    depth = min(DEPTHS, key=lambda depth: len(shapes[depth].keys() ^ found.keys()))
    expected = shapes[depth]
    if not expected.keys() & found.keys():
        raise ValueError(f"not a torchvision ResNet: it holds {listed(found)}")
    problems = problems_of(found, expected)
    if problems:
        raise ValueError(f"not torchvision's ResNet-{depth}, the nearest: {'; '.join(problems)}")
    return depth, {detectron2_name(name): found[name].detach().float().numpy() for name in expected}


def problems_of(found: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors from being those expected by name and shape; each must be of finite floating-point numbers."""
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing {listed(missing)}")
    if unknown := [name for name in found if name not in expected]:
        problems.append(f"unknown {listed(unknown)}")
    both = [name for name in expected if name in found]
    if misshapen := [
        f"{name} {tuple(found[name].shape)} instead of {expected[name]}"
        for name in both
        if tuple(found[name].shape) != expected[name]
    ]:
        problems.append(f"of another shape {listed(misshapen)}")
    elif unusable := [name for name in both if not is_finite(found[name])]:
        problems.append(f"not finite floating-point numbers {listed(unusable)}")
    return problems


def detectron2_name(name: str) -> str:
    """ "layer1.0.downsample.1.bias" -> "res2.0.shortcut.norm.bias"; "bn1.bias" -> "stem.conv1.norm.bias"."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"\bbn(\d)", r"conv\1.norm", name)


def write(path: Path, arrays: dict[str, np.ndarray]):
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    content = {"model": state, "__author__": "torchvision", "matching_heuristics": True}
    replace_file(path, lambda file: torch.save(content, file))


def replace_file(path: Path, write: Callable[[BinaryIO], None]):
    """Writes a file whole or not at all, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _expected_shapes(depth):
    with torch.device("meta"):
        net = getattr(resnet, f"resnet{depth}")(weights=None)
    return {name: tuple(value.shape) for name, value in net.state_dict().items() if not _LEFT_OUT.fullmatch(name)}


def is_finite(tensor) -> bool:
    """Whether a tensor is plain, on the CPU, and of floating-point numbers that are all finite."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    return plain and bool(torch.isfinite(tensor.detach().float()).all())


def listed(names) -> str:
    """The first few, and how many more."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _described(value):
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__


if __name__ == "__main__":
    sys.exit(main())
