"""YOLOv3 (Redmon and Farhadi, 2018) as a backbone: all else it shares with the other detectors."""

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from gs_d2.modeling.backbone import doubling_strides
from gs_d2.modeling.pipelines.darknet import build_darknet53_backbone, darknet_conv


class YOLOv3Level(nn.Module):
    """The neck at one stride: five convolutions that end in half of the backbone's channels, and one back to all."""

    def __init__(self, in_channels: int, channels: int, coarser_channels: int | None, norm: str):
        """
        Args:
            in_channels: of the backbone's map.
            channels: of the fifth convolution; the sixth has twice as many.
            coarser_channels: of the fifth convolution at the next coarser stride; None at the coarsest.
        """
        super().__init__()
        self.reduce = None  # the order of registration is that of Darknet's files
        if coarser_channels is not None:
            self.reduce = darknet_conv(coarser_channels, channels, 1, norm=norm)
            in_channels += channels
        self.convs = nn.Sequential(
            darknet_conv(in_channels, channels, 1, norm=norm),
            darknet_conv(channels, 2 * channels, 3, norm=norm),
            darknet_conv(2 * channels, channels, 1, norm=norm),
            darknet_conv(channels, 2 * channels, 3, norm=norm),
            darknet_conv(2 * channels, channels, 1, norm=norm),
        )
        self.output = darknet_conv(channels, 2 * channels, 3, norm=norm)

    def forward(self, feature: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns what the next finer level gets, [N, C, H, W], and what is predicted from, [N, 2 C, H, W]."""
        if self.reduce is not None:
            feature = torch.cat([F.interpolate(self.reduce(coarser), scale_factor=2, mode="nearest"), feature], dim=1)
        hidden = self.convs(feature)
        return hidden, self.output(hidden)


class YOLOv3Neck(Backbone):
    """Darknet-53 and YOLOv3's neck, with the last 3x3 convolution before the predictions: maps "p3".."p5".

    A map of the neck joins the next finer one of the backbone by 1x1 convolution, upsampling and concatenation.
    """

    def __init__(self, bottom_up: Backbone, in_features: list[str], norm: str):
        """
        Args:
            bottom_up: gives `in_features`, named from fine to coarse, each of twice the stride of the one before.
            norm: of every convolution of the neck, see :func:`detectron2.layers.get_norm`.
        """
        super().__init__()
        shapes = bottom_up.output_shape()
        strides = doubling_strides(shapes, in_features)
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self._size_divisibility = strides[-1]
        self._out_features = [f"p{stride.bit_length() - 1}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        self._out_feature_channels = {}
        coarser_channels = None
        for name, out_name in zip(self.in_features[::-1], self._out_features[::-1], strict=True):
            channels = shapes[name].channels // 2
            self.add_module(out_name, YOLOv3Level(shapes[name].channels, channels, coarser_channels, norm))
            self._out_feature_channels[out_name] = 2 * channels
            coarser_channels = channels

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [N, 3, H, W], H and W multiples of `size_divisibility` -> {"p3": [N, C3, H/8, W/8], ...}."""
        features, outputs, hidden = self.bottom_up(image), {}, None
        for name, out_name in zip(self.in_features[::-1], self._out_features[::-1], strict=True):
            hidden, outputs[out_name] = getattr(self, out_name)(features[name], hidden)
        return outputs


@BACKBONE_REGISTRY.register()
def build_darknet53_yolov3_backbone(cfg, input_shape: ShapeSpec):
    """:func:`build_darknet53_backbone`'s keys, and MODEL.FPN.{IN_FEATURES, NORM} of the neck."""
    return YOLOv3Neck(
        bottom_up=build_darknet53_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        norm=cfg.MODEL.FPN.NORM,
    )
