"""ResNet with a top-down path: the paper's feature maps P2..P5 (Fig. 3), and P6 for COCO (section 3)."""

from itertools import pairwise

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from torch import Tensor, nn


def doubling_strides(shapes: dict[str, ShapeSpec], in_features: list[str]) -> list[int]:
    """Strides of maps from fine to coarse, each of which must be twice the one before, so that sums and joins fit."""
    strides = [shapes[name].stride for name in in_features]
    if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise ValueError(f"in_features must double in stride from one to the next, got {strides} of {in_features}")
    return strides


class Context(nn.Module):
    """Adds to a map what lies around each of its cells: a pyramid of coarser maps, each half the size, and back.

    The result of a new module is the map itself (the last normalisation starts at 0, as zero-initialised residual
    blocks do), so that it can be put into a detector that is already trained.
    """

    def __init__(self, channels: int, num_levels: int, norm: str):
        """
        Args:
            channels: of the map and of all levels.
            num_levels: of coarser maps; at least 1. The cells of the coarsest are 2**num_levels as large as the map's.
            norm: of every convolution, see :func:`detectron2.layers.get_norm`; it needs an affine weight.
        """
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i in range(num_levels):
            for convs, stride, last in ((self.down, 2, False), (self.up, 1, i == 0)):
                conv = Conv2d(
                    channels,
                    channels,
                    kernel_size=3,
                    stride=stride,
                    padding=1,
                    bias=False,
                    norm=get_norm(norm, channels),
                    activation=None if last else F.relu,
                )
                weight_init.c2_msra_fill(conv)
                convs.append(conv)
        nn.init.zeros_(self.up[0].norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]; any H and W."""
        maps = [x]
        for down in self.down:
            maps.append(down(maps[-1]))
        coarse = maps.pop()
        for up in reversed(self.up):
            fine = maps.pop()
            coarse = fine + F.interpolate(up(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return coarse


class TopDown(Backbone):
    """1x1 lateral convolutions, bilinear x2 upsampling and elementwise sums.

    Detectron2's FPN differs twice: it upsamples by nearest neighbour and ends each level with a 3x3 convolution.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: list[str],
        out_channels: int,
        norm: str = "",
        top_block: nn.Module | None = None,
        context_levels: int = 0,
    ):
        """
        Args:
            bottom_up: gives `in_features`, named from fine to coarse, each of twice the stride of the one before.
            out_channels: channels of every output map.
            norm: normalisation after each lateral convolution, see :func:`detectron2.layers.get_norm`; "" is none.
            top_block: makes one more map of half the size and `out_channels` channels from the coarsest one.
            context_levels: of :class:`Context` on the coarsest map; 0 is none.
        """
        super().__init__()
        shapes = bottom_up.output_shape()
        strides = doubling_strides(shapes, in_features)
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self._size_divisibility = max(strides[-1], bottom_up.size_divisibility)
        self._out_features = []
        self._out_feature_strides = {}
        self._out_feature_channels = {}
        self._lateral_names = []
        for name, stride in zip(in_features, strides, strict=True):
            stage = stride.bit_length() - 1
            lateral = Conv2d(
                shapes[name].channels,
                out_channels,
                kernel_size=1,
                bias=norm == "",
                norm=get_norm(norm, out_channels),
            )
            weight_init.c2_xavier_fill(lateral)
            self.add_module(f"fpn_lateral{stage}", lateral)
            self._lateral_names.append(f"fpn_lateral{stage}")
            self._out_features.append(f"p{stage}")
            self._out_feature_strides[f"p{stage}"] = stride
            self._out_feature_channels[f"p{stage}"] = out_channels
        self._lateral_outputs = list(self._out_features)
        if context_levels < 0 or (context_levels and not norm):
            raise ValueError("CONTEXT_LEVELS must be at least 0, and above 0 it needs a norm (MODEL.FPN.NORM)")
        self.context = Context(out_channels, context_levels, norm) if context_levels else None
        self.top_block = top_block
        if top_block is not None:
            self._size_divisibility *= 2
            self._top_name = f"p{stage + 1}"
            self._out_features.append(self._top_name)
            self._out_feature_strides[self._top_name] = 2 * strides[-1]
            self._out_feature_channels[self._top_name] = out_channels

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [N, 3, H, W], H and W multiples of `size_divisibility` -> {"p2": [N, C, H/4, W/4], ...}."""
        bottom_up = self.bottom_up(image)
        outputs = {}
        top_down = None
        for name, lateral_name, out_name in zip(
            self.in_features[::-1], self._lateral_names[::-1], self._lateral_outputs[::-1], strict=True
        ):
            lateral = getattr(self, lateral_name)(bottom_up[name])
            if top_down is None:
                lateral = lateral if self.context is None else self.context(lateral)
            else:
                lateral = lateral + F.interpolate(top_down, scale_factor=2, mode="bilinear", align_corners=False)
            outputs[out_name] = top_down = lateral
        if self.top_block is not None:
            outputs[self._top_name] = self.top_block(outputs[self._lateral_outputs[-1]])
        return outputs


class MaxPoolConvs(nn.Sequential):
    """COCO's P6 from P5: 2x2 max-pooling, then two 3x3 convolutions, a ReLU between them."""

    def __init__(self, channels: int):
        first, second = (nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(2))
        weight_init.c2_msra_fill(first)
        weight_init.c2_xavier_fill(second)
        super().__init__(nn.MaxPool2d(2), first, nn.ReLU(), second)


@BACKBONE_REGISTRY.register()
def build_resnet_topdown_backbone(cfg, input_shape: ShapeSpec, top_block: nn.Module | None = None):
    """MODEL.RESNETS with MODEL.FPN.{IN_FEATURES, OUT_CHANNELS, NORM}; start IN_FEATURES at the finest map needed."""
    return TopDown(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        context_levels=cfg.MODEL.GS.CONTEXT_LEVELS,
    )


@BACKBONE_REGISTRY.register()
def build_resnet_topdown_p6_backbone(cfg, input_shape: ShapeSpec):
    """:func:`build_resnet_topdown_backbone` with one more map on top: P6 of P2..P5."""
    return build_resnet_topdown_backbone(cfg, input_shape, top_block=MaxPoolConvs(cfg.MODEL.FPN.OUT_CHANNELS))
