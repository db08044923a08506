"""R-FCN's second stage (Dai et al., 2016): position-sensitive maps, which a box only pools and averages.

Shape shorthand: K classes, k bins along each side of a box, S boxes.
"""

from collections.abc import Callable
from functools import partial

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import ps_roi_align, ps_roi_pool

from gs_d2.modeling.roi_heads import GroupedHeads


@ROI_HEADS_REGISTRY.register()
class PositionSensitiveROIHeads(GroupedHeads):
    """One 1x1 convolution and ReLU, then 1x1 convolutions to k * k maps for each score and each delta.

    In bin (i, j) of a box the (i, j)-th map of a score counts; the mean over bins is the score, and alike each delta.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        conv_dim: int,
        pool: Callable[[Tensor, list[Tensor]], Tensor],
        num_bins: int,
        cls_agnostic_bbox_reg: bool = True,
        **heads,
    ):
        """
        Args:
            in_channels: of the one feature map used.
            conv_dim: channels of the first convolution.
            pool: takes maps [B, C k k, H, W], channels ordered by C first, and for each image boxes in pixels; gives
                [S, C, k, k].
            num_bins: k.
            cls_agnostic_bbox_reg: four deltas of a box, or four for each class.
            heads: as :class:`GroupedHeads`.
        """
        super().__init__(**heads)
        if len(self.in_features) != 1:
            raise ValueError(f"PositionSensitiveROIHeads pools from one feature map, got {list(self.in_features)}")
        num_deltas = 4 if cls_agnostic_bbox_reg else 4 * self.num_classes
        self.pool = pool
        self.conv = Conv2d(in_channels, conv_dim, kernel_size=1, activation=nn.functional.relu_)
        self.cls_maps = nn.Conv2d(conv_dim, num_bins**2 * (self.num_classes + 1), kernel_size=1)
        self.delta_maps = nn.Conv2d(conv_dim, num_bins**2 * num_deltas, kernel_size=1)
        weight_init.c2_msra_fill(self.conv)
        for layer, std in ((self.cls_maps, 0.01), (self.delta_maps, 0.001)):  # as Detectron2's box predictor
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        heads, head = super().from_config(cfg, input_shape), cfg.MODEL.ROI_BOX_HEAD
        shape = input_shape[heads["in_features"][0]]
        poolers = {
            "PSROIPool": _pool_by_cells,
            "PSROIAlign": partial(ps_roi_align, sampling_ratio=head.POOLER_SAMPLING_RATIO),
        }
        if head.POOLER_TYPE not in poolers:
            raise ValueError(
                f"ROI_BOX_HEAD.POOLER_TYPE of R-FCN must be one of {', '.join(poolers)}, got {head.POOLER_TYPE!r}"
            )
        return {
            **heads,
            "in_channels": shape.channels,
            "conv_dim": head.CONV_DIM,
            "pool": partial(
                poolers[head.POOLER_TYPE], output_size=head.POOLER_RESOLUTION, spatial_scale=1.0 / shape.stride
            ),
            "num_bins": head.POOLER_RESOLUTION,
            "cls_agnostic_bbox_reg": head.CLS_AGNOSTIC_BBOX_REG,
        }

    def _predict(self, maps: list[Tensor], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        hidden = self.conv(maps[0])
        rois = [x.tensor for x in boxes]
        logits, deltas = (self.pool(layer(hidden).float(), rois) for layer in (self.cls_maps, self.delta_maps))
        return logits.mean(dim=(2, 3)), deltas.mean(dim=(2, 3))


def _pool_by_cells(maps: Tensor, rois: list[Tensor], *, output_size: int, spatial_scale: float) -> Tensor:
    """R-FCN's pooling, where torchvision's own would lose faces at an image's lower and right edge."""
    # A box there may round to beyond the map and pool nothing, for a score of 0.5 that no training changes: it has the
    # last cell at least.
    last_y, last_x = ((size - 1) / spatial_scale for size in maps.shape[-2:])
    rois = [torch.stack([x[:, 0].clamp(max=last_x), x[:, 1].clamp(max=last_y), x[:, 2], x[:, 3]], dim=1) for x in rois]
    # torchvision clips bins to the last row and column exclusively, and so never reads those.
    return ps_roi_pool(nn.functional.pad(maps, (0, 1, 0, 1)), rois, output_size, spatial_scale)
