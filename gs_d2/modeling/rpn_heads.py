"""Heads that predict face / background logits and box deltas for every anchor of a cell."""

import fvcore.nn.weight_init as weight_init
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from torch import Tensor, nn


@RPN_HEAD_REGISTRY.register()
class SoftmaxRPNHead(nn.Module):
    """One shared 3x3 convolution and ReLU, then 1x1 convolutions to two logits and four deltas per anchor."""

    @configurable
    def __init__(self, *, in_channels: int, num_anchors: int):
        """
        Args:
            in_channels: channels of every input feature map, kept by the 3x3 convolution.
            num_anchors: A, anchors per cell.
        """
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)
        self.objectness_logits = nn.Conv2d(in_channels, 2 * num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(in_channels, 4 * num_anchors, kernel_size=1)
        weight_init.c2_msra_fill(self.conv)  # Detectron2's std of 0.01 starts too slowly from random weights
        for layer in (self.objectness_logits, self.anchor_deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        (in_channels,) = _same("channels of the RPN's feature maps", [shape.channels for shape in input_shape])
        (num_anchors,) = _same(
            "anchors per cell of the RPN's feature maps", build_anchor_generator(cfg, input_shape).num_anchors
        )
        return {"in_channels": in_channels, "num_anchors": num_anchors}

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [N, C, Hi, Wi] -> logits [N, 2A, Hi, Wi] (background, face for each anchor), deltas [N, 4A, Hi, Wi]."""
        hidden = [self.conv(feature).relu_() for feature in features]
        return [self.objectness_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]


def _same(what, values):
    if len(set(values)) != 1:
        raise ValueError(f"A head shared by all maps needs the same number of {what}, got {values}")
    return set(values)
