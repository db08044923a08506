"""Multiply-adds and parameters of a config's detector.

What is counted, by fvcore and with one multiply-add as one operation: convolutions without their biases; 2 for each
element that a frozen BatchNorm scales and shifts; 4 for each element that bilinear upsampling makes. Sums and pooling
are not. "Feature extraction" is the ResNet, "RPN head" all that follows it: lateral convolutions, upsampling and the
head. Decoding, NMS and a second stage are not counted.

A transposed convolution multiplies at the size of its input. The paper's 98.61 G of CenterNet come out where it is
counted at the size of its output, as the paper's tool did: a model that has such convolutions gets both totals.

The paper's numbers of parameters are met only with two things that train nothing: the scale and shift of each frozen
BatchNorm (buffers in Detectron2, parameters in torchvision), and the ImageNet classifier (fc) that the weights came
with, of which no detector makes use. Both are counted; BatchNorm's running statistics are not.
"""

import math
from dataclasses import dataclass

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import ResNet, build_model
from fvcore.nn import FlopCountAnalysis

from gs_d2.modeling.pipelines import CenterNet, CenterNetHead

AT_OUTPUT = "total, output size"
HARMLESS_OPS = {
    "aten::add",  # sums of the top-down path
    "aten::add_",  # sums with the shortcuts of the ResNet
    "aten::max_pool2d",  # comparisons
}
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Complexity:
    """What a detector costs.

    Attributes:
        size: (height, width) of the network's input in pixels, after padding.
        metrics: by the names of the paper's columns, in 1e9 multiply-adds and 1e6 parameters; of a model that has
            transposed convolutions also AT_OUTPUT, the total where these are counted at the size of their output.
        fc_parameters: those of the parameters that are the unused classifier's.
        not_counted: operations met that nothing counts, and how often each was.
    """

    size: tuple[int, int]
    metrics: dict[str, float]
    fc_parameters: int
    not_counted: dict[str, int]


def analyze(cfg, size: tuple[int, int]) -> Complexity:
    """Runs the model of a config once, from random weights, on the CPU.

    Args:
        size: (height, width) of an image; padded to the network's stride as the detector pads it.

    Raises:
        ValueError: the size is not positive, or the model has neither an RPN nor CenterNet's head.
    """
    if min(size) < 1:
        raise ValueError(f"the size must be positive, got {size[0]} {size[1]}")
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
        at_output[AT_OUTPUT] = (total + more) / 1e9
    parameters = sum(parameter.numel() for parameter in dense.parameters()) + sum(
        norm.weight.numel() + norm.bias.numel() for norm in dense.modules() if isinstance(norm, FrozenBatchNorm2d)
    )
    fc_parameters = _imagenet_fc(dense.get_submodule(dense.feature_extraction))
    return Complexity(
        size=size,
        metrics={
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
