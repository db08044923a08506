"""CenterNet (Zhou et al., "Objects as Points", 2019): faces are the peaks of a heat map; no anchors, no samples.

What it shares with the other detectors, from images to NMS, is in :class:`BoxDetector`.

Shape shorthand in this module:

    B images, M ground-truth boxes of all images, [H, W] the size of the map that is predicted from

Naming convention:

    cell: a position of the map. Cells are numbered row by row. Boxes are in pixels, all else is in cells.
"""

import math
from typing import NamedTuple

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, build_resnet_backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from gs_d2.modeling.box_detector import BoxDetector
from gs_d2.modeling.decoding import top_boxes
from gs_d2.modeling.description import DETECTION_LIMITS, LOOSE_NMS
from gs_d2.unread_keys import OF_DETECTORS, OF_ROI_HEADS, OF_RPN, OF_RPN_HEADS

_NUM_UPSAMPLINGS = 3
_PRIOR = 0.1  # probability that the heat map begins with everywhere
_FOCUS, _PENALTY_REDUCTION = 2, 4  # alpha and beta of eq. 1
_MAX_ELEMENTS = 1 << 22  # of the profiles of several faces at a time: 16 MB
_EVERY_CELL = "every cell of the map is trained on: there are no anchors, samples or groups"
_OWN_LOSS = "use MODEL.GS.CENTERNET.LOSS_WEIGHTS; the losses are penalty-reduced focal loss and L1"


class TransposedConvs(Backbone):
    """A backbone's coarsest map, brought to an eighth of its stride by three transposed convolutions, 4x4, stride 2."""

    def __init__(self, bottom_up: Backbone, out_channels: int, norm: str = ""):
        """
        Args:
            bottom_up: its coarsest map is used; for images that its stride divides.
            out_channels: channels of every transposed convolution.
            norm: normalisation after each of them, see :func:`detectron2.layers.get_norm`; "" is none.
        """
        super().__init__()
        self.bottom_up = bottom_up
        shapes = bottom_up.output_shape()
        self.in_feature = max(shapes, key=lambda name: shapes[name].stride)
        channels, stride = shapes[self.in_feature].channels, shapes[self.in_feature].stride
        self._size_divisibility = max(stride, bottom_up.size_divisibility)
        layers = []
        for _ in range(_NUM_UPSAMPLINGS):
            conv = nn.ConvTranspose2d(channels, out_channels, 4, stride=2, padding=1, bias=norm == "")
            # An output cell sees 2 x 2 cells: He's initialisation, which torch's own has no way to be told of.
            nn.init.normal_(conv.weight, std=math.sqrt(2 / (4 * channels)))
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            layers += [conv, *([get_norm(norm, out_channels)] if norm else []), nn.ReLU(inplace=True)]
            channels = out_channels
        self.upsampling = nn.Sequential(*layers)
        stride //= 2**_NUM_UPSAMPLINGS
        name = f"p{stride.bit_length() - 1}"
        self._out_features = [name]
        self._out_feature_strides = {name: stride}
        self._out_feature_channels = {name: out_channels}

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [N, 3, H, W], H and W multiples of `size_divisibility` -> {"p2": [N, C, H/4, W/4]}; not negative."""
        return {self._out_features[0]: self.upsampling(self.bottom_up(image)[self.in_feature])}


@BACKBONE_REGISTRY.register()
def build_resnet_transposed_backbone(cfg, input_shape: ShapeSpec):
    """MODEL.RESNETS with MODEL.FPN.{OUT_CHANNELS, NORM} of the transposed convolutions."""
    return TransposedConvs(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
    )


class CenterNetHead(nn.Module):
    """For the heat map, the sizes and the offsets a 3x3 convolution, ReLU and a 1x1 convolution each."""

    def __init__(self, in_channels: int, conv_dim: int = 64):
        """
        Args:
            in_channels: channels of the feature map.
            conv_dim: channels of each of the three 3x3 convolutions.
        """
        super().__init__()
        self.heatmap, self.size, self.offset = (
            nn.Sequential(
                nn.Conv2d(in_channels, conv_dim, kernel_size=3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(conv_dim, num, kernel_size=1),
            )
            for num in (1, 2, 2)
        )
        for branch in self.children():
            weight_init.c2_msra_fill(branch[0])
            nn.init.normal_(branch[2].weight, std=0.01)
            nn.init.zeros_(branch[2].bias)
        nn.init.constant_(self.heatmap[2].bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Feature [B, C, H, W] -> logits of the heat map [B, H, W], sizes and offsets [B, 2, H, W], x before y."""
        return self.heatmap(feature)[:, 0], self.size(feature), self.offset(feature)


class CenterTargets(NamedTuple):
    """What the maps of a batch are trained towards.

    Attributes:
        heatmap (float32 Tensor[B, H, W]): exactly 1 in the cells that have the centre of a face, and lower elsewhere.
        counted (bool Tensor[B, H, W]): which cells the heat map's loss is of.
        cells (int64 Tensor[M]): of each face, its centre's cell among all B H W.
        sizes (float32 Tensor[M, 2]): width and height.
        offsets (float32 Tensor[M, 2]): of the centre from its cell's left and top edge, in [0, 1).
        valid (bool Tensor[M]): False for boxes that are not trained on; their rows of the three above may be anything.
    """

    heatmap: Tensor
    counted: Tensor
    cells: Tensor
    sizes: Tensor
    offsets: Tensor
    valid: Tensor


def gaussian_radius(sizes: Tensor, min_overlap: float) -> Tensor:
    """The largest r for which moving each side of a box by at most r leaves an IoU of `min_overlap` with the box.

    Moving all sides inwards lowers the IoU most, hence (w - 2r)(h - 2r) = min_overlap w h.

    Args:
        sizes (Tensor[M, 2]): width and height, not negative.
        min_overlap: in (0, 1].

    Returns:
        Tensor[M]: in the unit of `sizes`, less than half of the shorter side.
    """
    total, area = sizes.sum(dim=1), sizes.prod(dim=1)
    return (total - (total**2 - 4 * (1 - min_overlap) * area).clamp(min=0).sqrt()) / 4


@torch.no_grad()
def center_targets(
    gt_boxes: list[Boxes],
    ignore_boxes: list[Boxes] | None,
    image_sizes: list[tuple[int, int]],
    map_size: tuple[int, int],
    stride: int,
    min_overlap: float,
) -> CenterTargets:
    """
    Args:
        gt_boxes: of each image. Boxes without area, with NaN, or with their centre off the image are not valid.
        ignore_boxes: of each image; a cell that one of them touches is no negative. None is none.
        image_sizes: (height, width) of each image before padding; cells beyond it are not counted.
        map_size: (H, W).
        stride: pixels of a cell.
        min_overlap: the heat of a face is a Gaussian, cut off beyond r cells in x or y; r is
            :func:`gaussian_radius`, rounded down, and the standard deviation (2r + 1) / 6 cells. Where faces overlap,
            the highest heat counts.
    """
    per_image = []
    for i, (boxes, (height, width)) in enumerate(zip(gt_boxes, image_sizes, strict=True)):
        boxes = boxes.tensor.float()
        regions = boxes[:0] if ignore_boxes is None else ignore_boxes[i].tensor
        centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        valid = ((sizes > 0) & (centres >= 0)).all(dim=1)
        valid &= (centres[:, 0] < width) & (centres[:, 1] < height)
        centres, sizes = (torch.where(valid[:, None], x, 0.0) / stride for x in (centres, sizes))
        cells = centres.floor()
        heatmap = _gaussians(cells, gaussian_radius(sizes, min_overlap).floor(), valid, map_size)
        rows, columns = (torch.arange(num, device=boxes.device) * stride for num in map_size)
        inside = (rows < height)[:, None] & (columns < width)
        counted = inside & ((heatmap == 1) | ~_touched(regions, map_size, stride))
        x, y = cells.long().unbind(dim=1)
        flat = (i * map_size[0] + y) * map_size[1] + x
        per_image.append((heatmap, counted, flat, sizes, centres - cells, valid))
    heatmaps, counted, *of_faces = zip(*per_image, strict=True)
    return CenterTargets(torch.stack(heatmaps), torch.stack(counted), *map(torch.cat, of_faces))


def _gaussians(centres: Tensor, radii: Tensor, valid: Tensor, map_size: tuple[int, int]) -> Tensor:
    """[H, W]: the highest of the Gaussians about cells [M, 2], x before y, of these radii, whole cells."""
    deviations = (2 * radii + 1) / 6

    def profile(centre, length):
        distance = torch.arange(length, device=centre.device) - centre[:, None]
        heat = torch.exp(-((distance / deviations[:, None]) ** 2) / 2)
        return torch.where((distance.abs() <= radii[:, None]) & valid[:, None], heat, 0.0)

    along_x, along_y = profile(centres[:, 0], map_size[1]), profile(centres[:, 1], map_size[0])
    heatmap = along_x.new_zeros(map_size)
    step = max(1, _MAX_ELEMENTS // (map_size[0] * map_size[1]))
    for x, y in zip(along_x.split(step), along_y.split(step), strict=True):
        if len(x):
            heatmap = torch.maximum(heatmap, (y[:, :, None] * x[:, None, :]).amax(dim=0))
    return heatmap


def _touched(regions: Tensor, map_size: tuple[int, int], stride: int) -> Tensor:
    """bool [H, W]: cells that have some area in common with one of regions [K, 4], in pixels."""

    def spans(low, high, length):
        edges = torch.arange(length + 1, device=low.device) * stride
        touched = (edges[:-1] < high[:, None]) & (edges[1:] > low[:, None]) & (low < high)[:, None]
        return touched.float()

    along_x = spans(regions[:, 0], regions[:, 2], map_size[1])
    along_y = spans(regions[:, 1], regions[:, 3], map_size[0])
    return along_y.T @ along_x > 0


def penalty_reduced_focal_loss(logits: Tensor, heatmap: Tensor, counted: Tensor) -> Tensor:
    """Eq. 1 of CenterNet, a scalar: its sum over cells, over the number of cells with a face (at least 1).

    Args:
        logits (Tensor[B, H, W]): those of cells that are not counted may be anything.
        heatmap, counted: of :class:`CenterTargets`.
    """
    logits = torch.where(counted, logits.float(), 0.0)
    of_faces = torch.sigmoid(-logits) ** _FOCUS * F.logsigmoid(logits)
    elsewhere = (1 - heatmap) ** _PENALTY_REDUCTION * torch.sigmoid(logits) ** _FOCUS * F.logsigmoid(-logits)
    has_face = heatmap == 1
    losses = torch.where(counted, torch.where(has_face, of_faces, elsewhere), 0.0)
    return -losses.sum() / (has_face & counted).sum().clamp(min=1)


def l1_at_faces(predicted: Tensor, targets: Tensor, cells: Tensor, valid: Tensor) -> Tensor:
    """A scalar: |predicted - target| in the faces' cells, summed over x and y, its mean over faces.

    Each face counts, also where several have their centres in one cell. Without a face it is 0, but part of the graph.

    Args:
        predicted (Tensor[B, 2, H, W])
        targets (Tensor[M, 2]), cells, valid: of :class:`CenterTargets`.
    """
    at_faces = predicted.float().permute(0, 2, 3, 1).flatten(0, 2)[cells]
    losses = torch.where(valid[:, None], (at_faces - targets).abs(), 0.0)
    return losses.sum() / valid.sum().clamp(min=1)


def heat_peaks(logits: Tensor) -> Tensor:
    """Cells of a map [H, W] that no neighbour (of eight) exceeds, int64 [n], rising; of equal neighbours all are peaks.

    A logit that is not finite counts as the lowest, and is no peak.
    """
    logits = logits.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    highest = F.max_pool2d(logits[None, None], kernel_size=3, stride=1, padding=1)[0, 0]
    return torch.nonzero(((logits == highest) & torch.isfinite(logits)).flatten())[:, 0]


@META_ARCH_REGISTRY.register()
class CenterNet(BoxDetector):
    """A heat map of face centres, and in every cell the size of a face and where in the cell its centre is."""

    @configurable
    def __init__(
        self,
        *,
        head: nn.Module,
        in_feature: str,
        min_overlap: float = 0.3,
        loss_weights: tuple[float, float, float] = (1.0, 0.1, 1.0),
        topk: int = 50000,
        score_thresh: float = 0.0,
        min_box_size: float = 0.0,
        **detector,
    ):
        """
        Args:
            head: as :class:`CenterNetHead`.
            in_feature: name of the backbone's map that it reads.
            min_overlap: see :func:`center_targets`.
            loss_weights: factors of "loss_heatmap", "loss_size" and "loss_offset".
            topk: peaks kept of an image, the highest.
            score_thresh: probability below which a peak is dropped.
            min_box_size: boxes with a side not above this many pixels are dropped.
            detector: as :class:`BoxDetector`.
        """
        super().__init__(**detector)
        if not 0 < min_overlap <= 1:
            raise ValueError(f"CENTERNET.MIN_OVERLAP must be in (0, 1], got {min_overlap}")
        if len(loss_weights) != 3 or min(loss_weights) < 0:
            raise ValueError(
                "CENTERNET.LOSS_WEIGHTS must be three numbers not below 0, of heat map, size and offset, got "
                f"{list(loss_weights)}"
            )
        self.head = self._prepare(head)
        self.in_feature = in_feature
        self.stride = self.backbone.output_shape()[in_feature].stride
        self.min_overlap = min_overlap
        self.loss_weights = tuple(loss_weights)
        self.topk = topk
        self.score_thresh = score_thresh
        self.min_box_size = float(min_box_size)

    @classmethod
    def from_config(cls, cfg):
        detector, settings, own = super().from_config(cfg), cls.test_settings(cfg), cfg.MODEL.GS.CENTERNET
        if len(cfg.MODEL.RPN.IN_FEATURES) != 1:
            raise ValueError(f"CenterNet has one map, got MODEL.RPN.IN_FEATURES {list(cfg.MODEL.RPN.IN_FEATURES)}")
        (in_feature,) = cfg.MODEL.RPN.IN_FEATURES
        shapes = detector["backbone"].output_shape()
        if in_feature not in shapes:
            raise ValueError(f"MODEL.RPN.IN_FEATURES names {in_feature!r}, and the backbone has {', '.join(shapes)}")
        return {
            **detector,
            "head": CenterNetHead(shapes[in_feature].channels, own.CONV_DIM),
            "in_feature": in_feature,
            "min_overlap": own.MIN_OVERLAP,
            "loss_weights": own.LOSS_WEIGHTS,
            "topk": settings.before_nms,
            "score_thresh": settings.score_thresh,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
        }

    @classmethod
    def breaking_defaults(cls, cfg):
        return [*DETECTION_LIMITS, LOOSE_NMS]

    @classmethod
    def unread_keys(cls, cfg):
        own = ("GROUP_*", "SAMPLER", "OHEM_*", "SECOND_PASS", "IGNORE_THRESH", "ANCHOR_STRIDES")
        return {
            **OF_DETECTORS,
            **OF_RPN,
            **OF_RPN_HEADS,
            **OF_ROI_HEADS,
            **{f"MODEL.GS.{key}": _EVERY_CELL for key in own},
            "MODEL.GS.CLS_LOSS_TYPE": _OWN_LOSS,
            "MODEL.GS.IOU_AWARE": _OWN_LOSS,
            "MODEL.RPN.BBOX_REG_LOSS_*": _OWN_LOSS,
            "MODEL.RPN.LOSS_WEIGHT": _OWN_LOSS,
        }

    def _predict(self, images: ImageList) -> tuple[Tensor, Tensor, Tensor]:
        return self.head(self.backbone(images.tensor)[self.in_feature])

    def _losses(self, images: ImageList, gt_instances: list[Instances], ignore_boxes) -> dict:
        logits, sizes, offsets = self._predict(images)
        gt_boxes, map_size = [x.gt_boxes for x in gt_instances], tuple(logits.shape[1:])
        targets = center_targets(gt_boxes, ignore_boxes, images.image_sizes, map_size, self.stride, self.min_overlap)
        losses = {
            "loss_heatmap": penalty_reduced_focal_loss(logits, targets.heatmap, targets.counted),
            "loss_size": l1_at_faces(sizes, targets.sizes, targets.cells, targets.valid),
            "loss_offset": l1_at_faces(offsets, targets.offsets, targets.cells, targets.valid),
        }
        return {name: w * losses[name] for name, w in zip(losses, self.loss_weights, strict=True)}

    def _candidates(self, images: ImageList) -> list[Instances]:
        maps = (x.float() for x in self._predict(images))
        return [self._of_image(*x, size) for *x, size in zip(*maps, images.image_sizes, strict=True)]

    def _of_image(self, logits: Tensor, sizes: Tensor, offsets: Tensor, image_size: tuple[int, int]) -> Instances:
        # Cells beyond the image are not trained, and must not suppress a peak at its edge.
        height, width = (-(-side // self.stride) for side in image_size)
        logits, sizes, offsets = (x[..., :height, :width] for x in (logits, sizes, offsets))
        peaks = heat_peaks(logits)

        def decode(rows):
            cells = peaks[rows]
            corners = torch.stack([cells % width, cells // width], dim=1)
            centres, half = (x.flatten(1).T[cells] for x in (offsets, sizes / 2))
            centres = centres + corners
            return torch.cat([centres - half, centres + half], dim=1) * self.stride

        boxes, logits, _ = top_boxes(
            logits.flatten()[peaks],
            decode,
            image_size,
            topk=self.topk,
            score_thresh=self.score_thresh,
            min_size=self.min_box_size,
        )
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes),
            logits=logits,
            scores=logits.sigmoid(),
            pred_classes=torch.zeros_like(logits, dtype=torch.int64),
        )

    @property
    def tile_geometry(self) -> tuple[int, int]:
        """(alignment, reach), in pixels: see :class:`BoxDetector`. A transposed convolution sees one cell more, of
        32, 16 and 8 pixels; the 3x3 convolution and the search for peaks 4 pixels each: 64 in all."""
        return self.size_divisibility, 2 * self.size_divisibility
