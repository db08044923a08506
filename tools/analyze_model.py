#!/usr/bin/env python
"""Multiply-adds and parameters of our models, beside the paper's (Tables 10, 11 and 15).

    tools/analyze_model.py
    tools/analyze_model.py --config-file configs/wider/fpn.yaml --size 1080 1920 MODEL.FPN.OUT_CHANNELS 128

What is counted, by fvcore and with one multiply-add as one operation: convolutions without their biases; 2 for each
element that a frozen BatchNorm scales and shifts; 4 for each element that bilinear upsampling makes. Sums and pooling
are not. "Feature extraction" is the ResNet, "RPN head" all that follows it: lateral convolutions, upsampling and the
head. Decoding, NMS and a second stage are not counted.

A transposed convolution multiplies at the size of its input. The paper's 98.61 G of CenterNet come out where it is
counted at the size of its output, as the paper's tool did: of a model that has such convolutions both totals are
printed.

The paper's numbers of parameters are met only with two things that train nothing: the scale and shift of each frozen
BatchNorm (buffers in Detectron2, parameters in torchvision), and the ImageNet classifier (fc) that the weights came
with, of which no detector makes use. Both are counted; BatchNorm's running statistics are not.

Exit code 2 where a figure of the paper is missed by more than 0.5 %, an operation was not counted, or a model cannot be
analysed.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from fvcore.nn import FlopCountAnalysis

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from gs_d2.config import load_config  # isort: skip
from gs_d2.modeling.pipelines import CenterNet, CenterNetHead  # isort: skip

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import ResNet, build_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TOLERANCE = 0.005
PAPER_SIZE = (800, 800)
HARMLESS_OPS = {
    "aten::add",  # sums of the top-down path
    "aten::add_",  # sums with the shortcuts of the ResNet
    "aten::max_pool2d",  # comparisons
}
_IMAGENET_CLASSES = 1000
_AT_OUTPUT = "total, output size"
_UNITS = {"feature extraction": "G", "RPN head": "G", "total": "G", _AT_OUTPUT: "G", "parameters": "M"}

# (table, its row, our config, what the paper prints: G multiply-adds and M parameters)
PAPER = [
    ("10", "CenterNet (R18)", "pipelines/centernet.yaml", {_AT_OUTPUT: 98.61}),
    ("10", "FPN-finest-sampling (R18)", "wider/fpn_finest_sampling_r18.yaml", {"total": 29.73}),
    ("11", "FPN", "wider/fpn.yaml", {"feature extraction": 52.42, "RPN head": 36.50, "total": 88.92}),
    (
        "11",
        "FPN-finest-sampling",
        "wider/fpn_finest_sampling.yaml",
        {"feature extraction": 52.42, "RPN head": 28.91, "total": 81.33},
    ),
    ("15", "Ours(R18)", "wider/fpn_finest_sampling_r18.yaml", {"total": 29.8, "parameters": 12.5}),
    ("15", "Ours(R50)", "wider/fpn_finest_sampling.yaml", {"total": 81.3, "parameters": 27.1}),
    ("15", "Ours(R152)", "wider/fpn_finest_sampling_r152.yaml", {"total": 155.7, "parameters": 61.7}),
]


@dataclass(frozen=True)
class Complexity:
    """What a detector costs.

    Attributes:
        size: (height, width) of the network's input in pixels, after padding.
        figures: by the names of the paper's columns, in 1e9 multiply-adds and 1e6 parameters; of a model that has
            transposed convolutions also the total where these are counted at the size of their output.
        fc_parameters: those of the parameters that are the unused classifier's.
        not_counted: operations met that nothing counts, and how often each was.
    """

    size: tuple[int, int]
    figures: dict[str, float]
    fc_parameters: int
    not_counted: dict[str, int]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", metavar="FILE", help="a config to analyse; without it, the paper's tables")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the image, in pixels (default: 800 800)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args(argv)
    if args.config_file is None and (args.size or args.opts):
        parser.error("--size and config overrides need --config-file: the paper's tables are of its own settings")
    try:
        if args.config_file is None:
            return print_paper()
        return print_one(args.config_file, tuple(args.size or PAPER_SIZE), args.opts)
    except (OSError, KeyError, ValueError, AssertionError) as error:
        print(f"analyze_model: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def print_paper() -> int:
    print(f"{'table':7}{'row':27}{'':20}{'paper':>8}{'ours':>12}{'difference':>13}")
    analysed, problems = {}, []
    for table, row, name, paper in PAPER:
        if name not in analysed:
            analysed[name] = analyze(load_config(CONFIGS / name), PAPER_SIZE)
            problems += complaints(analysed[name], name)
        for figure, expected in paper.items():
            ours = analysed[name].figures[figure]
            difference = ours / expected - 1
            print(
                f"{table:7}{row:27}{figure:20}{expected:8g} {_UNITS[figure]}{ours:10.2f} {_UNITS[figure]}"
                f"{difference:+11.2%}"
            )
            if abs(difference) > TOLERANCE:
                problems.append(f"table {table}, {row}: {figure} is not the paper's, to within {TOLERANCE:.1%}")
    print_units(PAPER_SIZE)
    for name, found in analysed.items():
        print_transposed(found, f"{Path(name).stem}: ")
    fc = ", ".join(f"{Path(name).stem} {x.fc_parameters / 1e6:.3f} M" for name, x in analysed.items())
    print(f"Parameters include the unused ImageNet fc layer: {fc}.")
    return report(problems)


def print_one(config_file: str, size: tuple[int, int], opts: list[str]) -> int:
    found = analyze(load_config(config_file, opts), size)
    for figure, value in found.figures.items():
        print(f"{figure:20}{value:10.2f} {_UNITS[figure]}")
    print_units(found.size)
    print_transposed(found)
    if found.fc_parameters:
        print(f"Parameters include the unused ImageNet fc layer: {found.fc_parameters / 1e6:.3f} M.")
    return report(complaints(found, config_file))


def print_units(size):
    print(f"G: 10^9 multiply-adds at {size[0]} x {size[1]} (height x width); M: 10^6 parameters.")


def print_transposed(found: Complexity, name: str = ""):
    if _AT_OUTPUT in found.figures:
        print(
            f"{name}{found.figures[_AT_OUTPUT]:.2f} G where transposed convolutions are counted at the size of their "
            f"output, as by the paper's tool; {found.figures['total']:.2f} G at that of their input, where they "
            "multiply."
        )


def complaints(found: Complexity, name) -> list[str]:
    ops = ", ".join(f"{op} ({times} times)" for op, times in sorted(found.not_counted.items()))
    return [f"{name}: too low, for nothing counts {ops}"] if ops else []


def report(problems: list[str]) -> int:
    for problem in problems:
        print(f"analyze_model: {problem}", file=sys.stderr)
    return 2 if problems else 0


def analyze(cfg, size: tuple[int, int]) -> Complexity:
    """Runs the model of a config once, from random weights, on the CPU.

    Args:
        size: (height, width) of an image; padded to the network's stride as the detector pads it.
    """
    if min(size) < 1:
        raise ValueError(f"--size must be positive, got {size[0]} {size[1]}")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    dense = _DensePart(build_model(cfg)).eval()
    # Where gradients are needed, Detectron2 spells its frozen BatchNorm out in arithmetic that fvcore does not count.
    dense.requires_grad_(False)
    stride = max(dense.backbone.size_divisibility, 1)
    size = tuple(-(-side // stride) * stride for side in size)

    counts = FlopCountAnalysis(dense, torch.zeros(1, len(cfg.MODEL.PIXEL_MEAN), *size))
    counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    extraction, total = counts.total(dense.feature_extraction), counts.total()
    at_output = {}
    transposed = {name: x for name, x in dense.named_modules() if isinstance(x, torch.nn.ConvTranspose2d)}
    if transposed:  # an output is as many times as large as the input as the strides' product
        of_modules = counts.by_module()
        more = sum(of_modules[name] * (math.prod(x.stride) - 1) for name, x in transposed.items())
        at_output[_AT_OUTPUT] = (total + more) / 1e9
    parameters = sum(parameter.numel() for parameter in dense.parameters()) + sum(
        norm.weight.numel() + norm.bias.numel() for norm in dense.modules() if isinstance(norm, FrozenBatchNorm2d)
    )
    fc_parameters = _imagenet_fc(dense.get_submodule(dense.feature_extraction))
    return Complexity(
        size=size,
        figures={
            "feature extraction": extraction / 1e9,
            "RPN head": (total - extraction) / 1e9,
            "total": total / 1e9,
            **at_output,
            "parameters": (parameters + fc_parameters) / 1e6,
        },
        fc_parameters=fc_parameters,
        not_counted={op: times for op, times in counts.unsupported_ops().items() if op not in HARMLESS_OPS},
    )


class _DensePart(torch.nn.Module):
    """From the image to the head's predictions, without what depends on the image's content."""

    def __init__(self, model):
        super().__init__()
        rpn = getattr(model, "proposal_generator", None)
        if isinstance(model, CenterNet):
            self.head, self.in_features = model.head, [model.in_feature]
        elif hasattr(rpn, "rpn_head"):
            self.head, self.in_features = rpn.rpn_head, rpn.in_features
        else:
            raise ValueError(f"only CenterNet and models with an RPN can be analysed, not {type(model).__name__} here")
        self.backbone = model.backbone
        self.feature_extraction = "backbone.bottom_up" if hasattr(model.backbone, "bottom_up") else "backbone"

    def forward(self, image):
        features = self.backbone(image)
        maps = [features[name] for name in self.in_features]
        return self.head(*maps) if isinstance(self.head, CenterNetHead) else self.head(maps)


def _imagenet_fc(bottom_up) -> int:
    """Parameters of the classifier behind the ResNet's last stage; 0 for another network."""
    if not isinstance(bottom_up, ResNet):
        return 0
    channels = max(bottom_up.output_shape().values(), key=lambda shape: shape.stride).channels
    return channels * _IMAGENET_CLASSES + _IMAGENET_CLASSES


if __name__ == "__main__":
    sys.exit(main())
