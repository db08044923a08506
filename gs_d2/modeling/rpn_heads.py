"""Heads that predict face / background logits and box deltas for every anchor of a cell."""

import math
from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from torch import Tensor, nn

from gs_d2.unread_keys import OF_RPN_HEADS


@RPN_HEAD_REGISTRY.register()
class SoftmaxRPNHead(nn.Module):
    """Shared 3x3 convolutions and ReLU, one by default, then 1x1 convolutions to two logits and four deltas per anchor.

    Its 3x3 convolutions are set and named as those of Detectron2's StandardRPNHead.
    """

    @configurable
    def __init__(self, *, in_channels: int, num_anchors: int, conv_dims: Sequence[int] = (-1,)):
        """
        Args:
            in_channels: channels of every input feature map.
            num_anchors: A, anchors per cell.
            conv_dims: output channels of each 3x3 convolution; -1 keeps its input's. At least one.

        Raises:
            ValueError: `conv_dims` is empty, or has a number of channels that is neither -1 nor positive.
        """
        super().__init__()
        if not conv_dims or any(dim != -1 and dim < 1 for dim in conv_dims):
            raise ValueError(
                f"conv_dims (MODEL.RPN.CONV_DIMS) must be one or more numbers of channels, or -1; got {list(conv_dims)}"
            )
        convs, channels = [], in_channels
        for dim in conv_dims:
            convs.append(nn.Conv2d(channels, channels if dim == -1 else dim, kernel_size=3, padding=1))
            channels = convs[-1].out_channels
        if len(convs) == 1:
            self.conv = convs[0]
        else:
            self.conv = nn.Sequential()
            for i, conv in enumerate(convs):
                self.conv.add_module(f"conv{i}", conv)
                if i < len(convs) - 1:  # forward() has the last one
                    self.conv.add_module(f"relu{i}", nn.ReLU(inplace=True))
        self.objectness_logits = nn.Conv2d(channels, 2 * num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(channels, 4 * num_anchors, kernel_size=1)
        for conv in convs:
            weight_init.c2_msra_fill(conv)  # Detectron2's std of 0.01 starts too slowly from random weights
        init_predictors(self.objectness_logits, self.anchor_deltas)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        num_anchors = build_anchor_generator(cfg, input_shape).num_anchors
        return {**shared_by_maps(input_shape, num_anchors), "conv_dims": cfg.MODEL.RPN.CONV_DIMS}

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [N, C, Hi, Wi] -> logits [N, 2A, Hi, Wi] (background, face for each anchor), deltas [N, 4A, Hi, Wi]."""
        hidden = [self.conv(feature).relu_() for feature in features]
        return [self.objectness_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]


@RPN_HEAD_REGISTRY.register()
class DilatedRPNHead(nn.Module):
    """FPN-finest-DC's head: a larger receptive field for larger anchors on the same feature map.

    After the shared 3x3 convolution each anchor scale has a branch of its own: a 3x3 convolution dilated by 1, 2, 4,
    ... from the smallest scale on, ReLU, and 1x1 convolutions. The layout is ours: Fig. 5's is not in the text.
    Scales of one octave, as RetinaNet has them, share a branch. :class:`GroupSamplingRetinaNet` can use it too.
    """

    unread_keys = OF_RPN_HEADS

    @configurable
    def __init__(self, *, in_channels: int, num_scales: int, anchors_per_scale: int, num_logits: int = 2):
        """
        Args:
            in_channels: channels of every input feature map, kept by the 3x3 convolutions.
            num_scales: octaves of anchor scales of a cell, in rising order; one branch each.
            anchors_per_scale: A / num_scales: aspect ratios times scales in an octave.
            num_logits: of each anchor: background and face, or one for each class.
        """
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=2**i, dilation=2**i) for i in range(num_scales)
        )
        self.objectness_logits = nn.ModuleList(
            nn.Conv2d(in_channels, num_logits * anchors_per_scale, kernel_size=1) for _ in range(num_scales)
        )
        self.anchor_deltas = nn.ModuleList(
            nn.Conv2d(in_channels, 4 * anchors_per_scale, kernel_size=1) for _ in range(num_scales)
        )
        for layer in (self.conv, *self.branches):
            weight_init.c2_msra_fill(layer)
        init_predictors(*self.objectness_logits, *self.anchor_deltas)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        (num_scales,) = _same("octaves of anchor sizes", [num_octaves(x) for x in cfg.MODEL.ANCHOR_GENERATOR.SIZES])
        shared = shared_by_maps(input_shape, build_anchor_generator(cfg, input_shape).num_anchors)
        return {
            "in_channels": shared["in_channels"],
            "num_scales": num_scales,
            "anchors_per_scale": shared["num_anchors"] // num_scales,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As :meth:`SoftmaxRPNHead.forward`."""
        logits, deltas = [], []
        for feature in features:
            shared = self.conv(feature).relu_()
            hidden = [branch(shared).relu_() for branch in self.branches]
            logits.append(torch.cat([layer(x) for layer, x in zip(self.objectness_logits, hidden, strict=True)], dim=1))
            deltas.append(torch.cat([layer(x) for layer, x in zip(self.anchor_deltas, hidden, strict=True)], dim=1))
        return logits, deltas


@RPN_HEAD_REGISTRY.register()
class PerMapRPNHead(nn.Module):
    """For every feature map 1x1 convolutions of its own to two logits and four deltas per anchor, as SSD and YOLOv3."""

    unread_keys = OF_RPN_HEADS

    @configurable
    def __init__(self, *, in_channels: list[int], num_anchors: list[int]):
        """
        Args:
            in_channels: channels of each input feature map.
            num_anchors: A of each, the anchors per cell.
        """
        super().__init__()
        maps = list(zip(in_channels, num_anchors, strict=True))
        self.objectness_logits = nn.ModuleList(nn.Conv2d(c, 2 * a, kernel_size=1) for c, a in maps)
        self.anchor_deltas = nn.ModuleList(nn.Conv2d(c, 4 * a, kernel_size=1) for c, a in maps)
        init_predictors(*self.objectness_logits, *self.anchor_deltas)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        return {
            "in_channels": [shape.channels for shape in input_shape],
            "num_anchors": build_anchor_generator(cfg, input_shape).num_anchors,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As :meth:`SoftmaxRPNHead.forward`, with C and A of each map."""
        return (
            [layer(x) for layer, x in zip(self.objectness_logits, features, strict=True)],
            [layer(x) for layer, x in zip(self.anchor_deltas, features, strict=True)],
        )


def shared_by_maps(input_shape: list[ShapeSpec], num_anchors: list[int]) -> dict[str, int]:
    """`in_channels` and `num_anchors` of a head that is one for all feature maps.

    Args:
        input_shape, num_anchors: of each feature map; anchors are those of a cell.

    Raises:
        ValueError: the maps differ in their channels or in their anchors per cell.
    """
    (in_channels,) = _same("channels of the RPN's feature maps", [shape.channels for shape in input_shape])
    (anchors_per_cell,) = _same("anchors per cell of the RPN's feature maps", num_anchors)
    return {"in_channels": in_channels, "num_anchors": anchors_per_cell}


def num_octaves(sizes: list[float]) -> int:
    """How many octaves, from the smallest size on, a feature map's rising anchor sizes have.

    Raises:
        ValueError: the octaves have not the same number of sizes each.
    """
    octaves = [math.floor(math.log2(size / sizes[0]) + 0.01) for size in sizes]
    counts = [octaves.count(octave) for octave in range(octaves[-1] + 1)]
    if octaves != sorted(octaves) or len(set(counts)) != 1:
        raise ValueError(f"DilatedRPNHead needs rising anchor sizes, the same number in every octave, got {sizes}")
    return len(counts)


def init_predictors(*layers: nn.Conv2d):
    """How the last layers of a head start: near zero, so that every anchor begins with equal odds and its own box."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)


def _same(what, values):
    if len(set(values)) != 1:
        raise ValueError(f"A head shared by all maps needs the same number of {what}, got {values}")
    return set(values)
