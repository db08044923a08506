"""Anchors on one or several feature maps, each scale with its own stride, and the layout that follows from it.

Shape shorthand: A anchors per cell of a feature map, C channels per anchor, R anchors of an image over all maps.

The R anchors of an image are ordered by feature map, then by stride (ascending), then by row, column and anchor. With
one stride per map, the usual case, that is Detectron2's own (Hi, Wi, A) order. Predictions, anchors and groups all use
it.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, BufferList, DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor, nn


@ANCHOR_GENERATOR_REGISTRY.register()
class ScaleStrideAnchorGenerator(nn.Module):
    """Tiles anchors with a stride per scale; a stride coarser than the feature map sub-samples the map.

    FPN puts one scale on each of P2..P5; FPN-finest all scales on P2 at stride 4; FPN-finest-stride all on P2 at
    strides 4, 8, 16, 32 (paper, Fig. 1 and Table 1).
    """

    box_dim: int = 4

    @configurable
    def __init__(self, *, sizes, aspect_ratios, feature_strides, anchor_strides=None, offset=0.5):
        """
        Args:
            sizes (list[list[float]]): scales sqrt(w * h) in pixels for each feature map; a single list serves all.
            aspect_ratios (list[list[float]]): height / width; a single list serves all.
            feature_strides (list[int]): stride of each feature map, in pixels.
            anchor_strides (list[list[int]]): stride of each of `sizes`, a multiple of the map's own. None or empty:
                the map's own.
            offset (float): position of the first centre, in strides, in [0, 1).
        """
        super().__init__()
        num_features = len(feature_strides)
        sizes = _broadcast("sizes", sizes, num_features)
        aspect_ratios = _broadcast("aspect_ratios", aspect_ratios, num_features)
        if not anchor_strides:
            anchor_strides = [[stride] * len(s) for stride, s in zip(feature_strides, sizes, strict=True)]
        anchor_strides = _broadcast("anchor_strides", anchor_strides, num_features)
        if not 0 <= offset < 1:
            raise ValueError(f"offset must be in [0, 1), got {offset}")
        self.offset = offset

        # Per feature map a list of (stride, sub-sampling of the map, first and last anchor of a cell).
        self._grids = []
        cells = []
        for feature_stride, map_sizes, map_ratios, strides in zip(
            feature_strides, sizes, aspect_ratios, anchor_strides, strict=True
        ):
            if len(strides) != len(map_sizes) or sorted(strides) != list(strides):
                raise ValueError(f"anchor_strides must rise, one for each of sizes {map_sizes}, got {strides}")
            if any(stride % feature_stride for stride in strides):
                raise ValueError(
                    f"anchor_strides must be multiples of the map's stride {feature_stride}, got {strides}"
                )
            per_size = len(map_ratios)
            grids = []
            for stride in sorted(set(strides)):
                first = strides.index(stride) * per_size
                last = first + strides.count(stride) * per_size
                grids.append((stride, stride // feature_stride, first, last))
            self._grids.append(grids)
            cells.append(DefaultAnchorGenerator.generate_cell_anchors(None, map_sizes, map_ratios).float())
        self._cells = BufferList(cells)  # on the model's device: a copy in each step would wait for it
        self.scales = sorted({float(size) for map_sizes in sizes for size in map_sizes})
        """The distinct anchor scales, ascending, in pixels."""
        self.strides = sorted({stride for grids in self._grids for stride, *_ in grids})
        """The distinct anchor strides, ascending, in pixels."""
        self.max_side = max(float((cell[:, 2:] - cell[:, :2]).max()) for cell in cells)
        """The longest side of any anchor, in pixels."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            "feature_strides": [shape.stride for shape in input_shape],
            "anchor_strides": cfg.MODEL.GS.ANCHOR_STRIDES,
            "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        }

    @property
    def num_anchors(self) -> list[int]:
        """Anchors per cell of each feature map, before any sub-sampling: what the head must predict."""
        return [len(cell) for cell in self._cells]

    num_cell_anchors = num_anchors

    @property
    def cell_scales(self) -> list[list[float]]:
        """For each feature map the scale, in pixels, of each anchor of a cell."""
        return [Boxes(cell).area().sqrt().tolist() for cell in self._cells]

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """Anchors of each feature map [N, C, Hi, Wi], float32 on its device."""
        anchors = []
        for feature, cell, grids in zip(features, self._cells, self._grids, strict=True):
            cell = cell.to(feature.device, torch.float32)
            parts = []
            for stride, step, first, last in grids:
                # len(range(step // 2, size, step)), as arithmetic that tracing records
                rows, columns = ((size - step // 2 + step - 1) // step for size in feature.shape[-2:])
                y = (torch.arange(rows, dtype=torch.float32, device=feature.device) + self.offset) * stride
                x = (torch.arange(columns, dtype=torch.float32, device=feature.device) + self.offset) * stride
                y, x = torch.meshgrid(y, x, indexing="ij")
                centres = torch.stack((x, y, x, y), dim=-1)
                parts.append((centres[:, :, None] + cell[first:last]).reshape(-1, 4))
            anchors.append(Boxes(torch.cat(parts)))
        return anchors

    def flatten(self, predictions: list[Tensor], channels: int) -> Tensor:
        """Brings a head's output into the order of the anchors, sub-sampling where a stride asks for it.

        Args:
            predictions: for each feature map a Tensor[N, A * C, Hi, Wi].
            channels (int): C.

        Returns:
            Tensor[N, R, C]
        """
        parts = []
        for prediction, grids in zip(predictions, self._grids, strict=True):
            num_images, _, height, width = prediction.shape
            prediction = prediction.view(num_images, -1, channels, height, width)
            for _, step, first, last in grids:
                # The map's cell nearest to an anchor's centre is the middle one of those that its stride spans.
                cells = prediction[:, first:last, :, step // 2 :: step, step // 2 :: step]
                parts.append(cells.permute(0, 3, 4, 1, 2).reshape(num_images, -1, channels))
        return torch.cat(parts, dim=1)


def _broadcast(name, values, num_features):
    """Detectron2's convention: one list for every feature map, or one for all."""
    if not isinstance(values[0], (list, tuple)):
        return [list(values)] * num_features
    if len(values) not in (1, num_features):
        raise ValueError(
            f"{name} must have one list, or one for each of {num_features} feature maps, got {len(values)}"
        )
    return [list(value) for value in values] * (num_features if len(values) == 1 else 1)
