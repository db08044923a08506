"""Darknet-53, the backbone of YOLOv3 (Redmon and Farhadi, 2018)."""

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

NUM_BLOCKS = (1, 2, 8, 8, 4)


def darknet_conv(in_channels: int, out_channels: int, kernel_size: int, *, norm: str, stride: int = 1) -> Conv2d:
    """Darknet's layer: convolution, normalisation, leaky ReLU of slope 0.1; sizes are halved rounding up."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=norm == "",
        norm=get_norm(norm, out_channels),
        activation=nn.LeakyReLU(0.1, inplace=True),
    )
    weight_init.c2_msra_fill(conv)
    return conv


class DarknetBlock(nn.Module):
    """1x1 convolution to half the channels, 3x3 back to all of them, and the input added."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.conv1 = darknet_conv(channels, channels // 2, 1, norm=norm)
        self.conv2 = darknet_conv(channels // 2, channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class Darknet53(Backbone):
    """52 convolutions: a stem of stride 1 and five stages "res1".."res5", "res<k>" of stride 2**k as in a ResNet.

    Its modules are registered in the order of the layers in Darknet's files, which tools/convert_darknet.py needs.
    """

    def __init__(self, out_features: list[str], stem_channels: int = 32, norm: str = "FrozenBN", freeze_at: int = 0):
        """
        Args:
            out_features: names of the stages to return.
            stem_channels: channels of the first convolution; "res<k>" has 2**k times as many.
            norm: of every convolution, see :func:`detectron2.layers.get_norm`.
            freeze_at: 1 freezes stem and "res1", 2 "res2" too, and so on: with 2 what is trained begins where it does
                in Detectron2's ResNet of FREEZE_AT 2, behind stride 4. 0 freezes nothing.
        """
        super().__init__()
        names = [f"res{k}" for k in range(1, len(NUM_BLOCKS) + 1)]
        if not out_features or set(out_features) - set(names):
            raise ValueError(f"out_features of Darknet-53 must be some of {', '.join(names)}, got {list(out_features)}")
        self.stem = darknet_conv(3, stem_channels, 3, norm=norm)
        self.stage_names = tuple(names)
        for k, (name, num_blocks) in enumerate(zip(names, NUM_BLOCKS, strict=True), 1):
            channels = stem_channels * 2**k
            down = darknet_conv(channels // 2, channels, 3, stride=2, norm=norm)
            self.add_module(name, nn.Sequential(down, *(DarknetBlock(channels, norm) for _ in range(num_blocks))))
        self._out_features = list(out_features)
        self._out_feature_strides = {name: 2**k for k, name in enumerate(names, 1)}
        self._out_feature_channels = {name: stem_channels * 2**k for k, name in enumerate(names, 1)}
        for name in ["stem", *names][: freeze_at + 1 if freeze_at else 0]:
            for parameter in getattr(self, name).parameters():
                parameter.requires_grad = False
            FrozenBatchNorm2d.convert_frozen_batchnorm(getattr(self, name))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [N, 3, H, W] -> {"res<k>": [N, C, H / 2**k, W / 2**k], ...}, sizes rounded up."""
        x, outputs = self.stem(image), {}
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


@BACKBONE_REGISTRY.register()
def build_darknet53_backbone(cfg, input_shape: ShapeSpec):
    """MODEL.RESNETS.{OUT_FEATURES, STEM_OUT_CHANNELS, NORM}, of which Darknet-53's own STEM_OUT_CHANNELS is 32, and
    MODEL.BACKBONE.FREEZE_AT."""
    return Darknet53(
        out_features=cfg.MODEL.RESNETS.OUT_FEATURES,
        stem_channels=cfg.MODEL.RESNETS.STEM_OUT_CHANNELS,
        norm=cfg.MODEL.RESNETS.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
