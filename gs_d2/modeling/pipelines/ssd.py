"""SSD's network on a ResNet: the maps of its stages and two smaller ones above, each with predictors of its own.

No map hears of another but through the stages themselves: no top-down path, no lateral connections. It goes into
:class:`RPNDetector` and :class:`GroupSamplingRPN`, which match, sample, weigh and decode.
"""

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from torch import Tensor, nn


class ExtraMaps(Backbone):
    """A backbone and above it `extra1`, `extra2`, ..., each of twice the stride of the map below.

    An extra map is a 1x1 convolution to half its channels and a 3x3 convolution of stride 2, as in SSD. Each map is
    given through a 3x3 convolution of its own, for predictors of one layer diverge on the thousands of channels of maps
    as they are.
    """

    def __init__(self, bottom_up: Backbone, num_extra: int, out_channels: int, norm: str = ""):
        """
        Args:
            bottom_up: all of its maps are used; the last is its coarsest.
            num_extra: maps to add.
            out_channels: channels of every map that is given, even.
            norm: normalisation after each convolution here, see :func:`detectron2.layers.get_norm`; "" is none.
        """
        super().__init__()
        self.bottom_up = bottom_up
        self._shapes = dict(bottom_up.output_shape())
        self._extra_names = [f"extra{i}" for i in range(1, num_extra + 1)]
        *_, self._top = self._shapes
        below = self._shapes[self._top]
        for name in self._extra_names:
            self.add_module(
                name,
                nn.Sequential(
                    _conv_relu(below.channels, out_channels // 2, norm, kernel_size=1),
                    _conv_relu(out_channels // 2, out_channels, norm, kernel_size=3, stride=2, padding=1),
                ),
            )
            below = ShapeSpec(channels=out_channels, stride=2 * below.stride)
            self._shapes[name] = below
        self.branches = nn.ModuleDict(
            {
                name: _conv_relu(shape.channels, out_channels, norm, kernel_size=3, padding=1)
                for name, shape in self._shapes.items()
            }
        )

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self.branches[name].out_channels, stride=shape.stride)
            for name, shape in self._shapes.items()
        }

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [N, 3, H, W] -> {"res2": [N, C, H/4, W/4], ..., "extra1": ...}, sizes rounded up; not negative."""
        outputs = dict(self.bottom_up(image))
        x = outputs[self._top]
        for name in self._extra_names:
            outputs[name] = x = getattr(self, name)(x)
        return {name: branch(outputs[name]) for name, branch in self.branches.items()}


def _conv_relu(in_channels, out_channels, norm, **conv):
    layer = Conv2d(
        in_channels,
        out_channels,
        bias=norm == "",
        norm=get_norm(norm, out_channels),
        activation=nn.functional.relu_,
        **conv,
    )
    weight_init.c2_msra_fill(layer)
    return layer


@BACKBONE_REGISTRY.register()
def build_resnet_ssd_backbone(cfg, input_shape: ShapeSpec):
    """MODEL.RESNETS, two extra maps and MODEL.FPN.{OUT_CHANNELS, NORM}: with four stages six maps, as SSD300."""
    return ExtraMaps(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        num_extra=2,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
    )
