"""RetinaFace's network: a feature pyramid P2..P6, a context module on every map, and predictors that all maps share.

It goes into :class:`RPNDetector` and :class:`GroupSamplingRPN`, which match, sample, weigh and decode.
"""

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from torch import Tensor, nn

from gs_d2.modeling.rpn_heads import init_predictors, shared_by_maps
from gs_d2.unread_keys import OF_RPN_HEADS


class TopConv(nn.Module):
    """A map above FPN's coarsest one, by a 3x3 convolution of stride 2 on a map of the bottom-up network."""

    num_levels = 1  # asked for by FPN, as is in_feature

    def __init__(self, in_feature: str, in_channels: int, out_channels: int):
        """
        Args:
            in_feature: name of the map it reads, the coarsest of the bottom-up network.
            in_channels, out_channels: of that map, and of FPN's maps.
        """
        super().__init__()
        self.in_feature = in_feature
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        weight_init.c2_xavier_fill(self.conv)

    def forward(self, feature: Tensor) -> list[Tensor]:
        """[N, C, H, W] -> one map [N, C', ceil(H / 2), ceil(W / 2)]."""
        return [self.conv(feature)]


@BACKBONE_REGISTRY.register()
def build_retinaface_resnet_fpn_backbone(cfg, input_shape: ShapeSpec):
    """MODEL.RESNETS with MODEL.FPN.{IN_FEATURES, OUT_CHANNELS, NORM}: Detectron2's FPN and one map above."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    top, channels = cfg.MODEL.FPN.IN_FEATURES[-1], cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=TopConv(top, bottom_up.output_shape()[top].channels, channels),
    )


class ContextModule(nn.Module):
    """Looks at 3x3, 5x5 and 7x7 cells around each, by one, two and three 3x3 convolutions.

    As in SSH half of the channels come from 3x3, and a quarter each from 5x5 and 7x7, whose first convolution is one.
    """

    def __init__(self, channels: int):
        """
        Args:
            channels: of input and output, a multiple of 4.
        """
        super().__init__()
        if channels % 4:
            raise ValueError(f"channels of a context module must be a multiple of 4, got {channels}")
        self.conv3 = nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1)
        self.reduce = nn.Conv2d(channels, channels // 4, kernel_size=3, padding=1)
        self.conv5 = nn.Conv2d(channels // 4, channels // 4, kernel_size=3, padding=1)
        self.middle = nn.Conv2d(channels // 4, channels // 4, kernel_size=3, padding=1)
        self.conv7 = nn.Conv2d(channels // 4, channels // 4, kernel_size=3, padding=1)
        for layer in self.children():
            weight_init.c2_msra_fill(layer)

    def forward(self, feature: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, not negative."""
        reduced = self.reduce(feature).relu_()
        wide = self.conv7(self.middle(reduced).relu_())
        return F.relu_(torch.cat([self.conv3(feature), self.conv5(reduced), wide], dim=1))


@RPN_HEAD_REGISTRY.register()
class RetinaFaceHead(nn.Module):
    """A context module for every map, then 1x1 convolutions, the same for all maps, to logits and box deltas."""

    unread_keys = OF_RPN_HEADS

    @configurable
    def __init__(self, *, in_channels: int, num_anchors: int, num_maps: int):
        """
        Args:
            in_channels: channels of every input feature map, a multiple of 4.
            num_anchors: A, anchors per cell, the same on every map.
            num_maps: how many maps there are.
        """
        super().__init__()
        self.context = nn.ModuleList(ContextModule(in_channels) for _ in range(num_maps))
        self.objectness_logits = nn.Conv2d(in_channels, 2 * num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(in_channels, 4 * num_anchors, kernel_size=1)
        init_predictors(self.objectness_logits, self.anchor_deltas)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        return {
            **shared_by_maps(input_shape, build_anchor_generator(cfg, input_shape).num_anchors),
            "num_maps": len(input_shape),
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As :meth:`SoftmaxRPNHead.forward`."""
        hidden = [context(feature) for context, feature in zip(self.context, features, strict=True)]
        return [self.objectness_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]
