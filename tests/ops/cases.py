"""Inputs that every op's tests share: random, and as nasty as they come."""

import torch

NASTY_VALUES = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-40, 0.0, -0.0, 1e20]


def random_boxes(n, generator, size=100.0):
    """Boxes [n, 4] of sizes from 0.1 to `size`, some on an integer grid so that overlaps tie."""
    xy = torch.rand(n, 2, generator=generator) * size
    wh = size * torch.rand(n, 2, generator=generator) ** 3 + 0.1
    boxes = torch.cat([xy, xy + wh], dim=1)
    snap = torch.rand(n, 1, generator=generator) < 0.5
    return torch.where(snap, (boxes / 8).round() * 8, boxes)


def nasty_boxes(n, generator):
    """Random boxes of which some are empty, inverted, NaN, infinite, huge, or copies of another."""
    boxes = random_boxes(n, generator)
    for i in range(0, n, 3):
        kind = int(torch.randint(5, (), generator=generator))
        if kind == 0:
            boxes[i, 2:] = boxes[i, :2]
        elif kind == 1:
            boxes[i] = boxes[i].flip(0)
        elif kind == 2:
            which = int(torch.randint(4, (), generator=generator))
            boxes[i, which] = NASTY_VALUES[int(torch.randint(len(NASTY_VALUES), (), generator=generator))]
        elif kind == 3:
            boxes[i] *= 1e19
        else:
            boxes[i] = boxes[int(torch.randint(n, (), generator=generator))]
    return boxes


def grid_anchors(rows, columns, stride=4, scales=(16, 32, 64, 128)):
    """Square anchors in Detectron2's (row, column, scale) order."""
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    centres = (torch.stack([x, y], dim=-1) * stride).reshape(-1, 1, 2)
    half = torch.tensor(scales, dtype=torch.float32).view(1, -1, 1) / 2
    return torch.cat([centres - half, centres + half], dim=-1).reshape(-1, 4)


def random_losses(n, generator):
    """Losses from 1e-6 to 1e3, with zeros, ties and what must count as 0 or as the largest."""
    losses = 10 ** (9 * torch.rand(n, generator=generator) - 6)
    for value in (0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e9, 0.5):
        losses[torch.rand(n, generator=generator) < 0.05] = value
    return losses
