#!/usr/bin/env python
"""Ops and sampler alone: a small dense detector labelled and sampled in plain PyTorch, without Detectron2.

    python examples/plain_torch.py

Square anchors of four scales at every cell of a map of stride 8; one classification and one regression output for each.
The loss is a mean over each scale's samples, summed (paper, eq. 2).
"""

import torch
import torch.nn.functional as F
from torch import nn

from gs_d2 import ops
from gs_d2.sampling import GroupSampler, group_by_scale

SCALES = [8.0, 16.0, 32.0, 64.0]
STRIDE, IMAGE_SIZE, NUM_PER_SCALE = 8, 128, 32


class DenseDetector(nn.Module):
    """images [B, 3, H, W] -> logits [B, N] and shifts of the anchors' corners [B, N, 4], in units of their scale."""

    def __init__(self, num_scales):
        super().__init__()
        layers = []
        for inside, outside in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.outputs = nn.Conv2d(64, num_scales * 5, 3, padding=1)

    def forward(self, images):
        outputs = self.outputs(self.features(images)).permute(0, 2, 3, 1).reshape(len(images), -1, 5)
        return outputs[..., 0], outputs[..., 1:]


def make_anchors():
    """Anchors [N, 4], and the scale of each as an index [N]."""
    cells = (torch.arange(IMAGE_SIZE // STRIDE) + 0.5) * STRIDE
    y, x = torch.meshgrid(cells, cells, indexing="ij")
    centres = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
    half = torch.tensor(SCALES)[None, :, None] / 2
    anchors = torch.cat([centres - half, centres + half], dim=-1).reshape(-1, 4)
    return anchors, group_by_scale(anchors[:, 2] - anchors[:, 0], SCALES)  # squares: the side is the scale


def draw_images(num_images, generator):
    """Bright squares on noise, and their boxes."""
    images, boxes_of = torch.rand(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) / 4, []
    for image in images:
        sides = 6 * 12 ** torch.rand(6, 1, generator=generator)
        corners = torch.rand(6, 2, generator=generator) * (IMAGE_SIZE - sides)
        boxes_of.append(torch.cat([corners, corners + sides], dim=1).round())
        for x1, y1, x2, y2 in boxes_of[-1].int().tolist():
            image[:, y1:y2, x1:x2] += 0.5
    return images, boxes_of


def loss_of(model, sampler, images, boxes_of, anchors, group_idxs, seed):
    """The loss, and the labels before and after sampling [B, N]: 1, 0, or -1 where an anchor takes no part."""
    logits, shifts = model(images)
    gt_boxes = torch.cat(boxes_of)
    gt_offsets = torch.tensor([0] + [len(boxes) for boxes in boxes_of]).cumsum(0)
    match = ops.two_pass_match(gt_boxes, anchors, gt_offsets=gt_offsets)  # the whole batch at once

    losses = F.binary_cross_entropy_with_logits(logits, (match.match_labels == 1).float(), reduction="none")
    sampled = sampler(match.match_labels, group_idxs.expand_as(match.match_labels), losses, seed)

    matched = gt_boxes[match.matched_idxs + gt_offsets[:-1, None]]
    targets = (matched - anchors) / (anchors[:, 2] - anchors[:, 0])[:, None]
    box_losses = F.smooth_l1_loss(shifts, targets, reduction="none").sum(-1)
    total = 0
    for group in range(len(SCALES)):
        used = (sampled >= 0) & (group_idxs == group)
        positive = used & (sampled == 1)
        total = total + losses[used].mean() + box_losses[positive].sum() / positive.sum().clamp(min=1)
    return total, match.match_labels, sampled


def main(num_iterations=30):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = DenseDetector(len(SCALES))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    anchors, group_idxs = make_anchors()
    sampler = GroupSampler(len(SCALES), NUM_PER_SCALE, method="wrs")  # hard anchors are sampled more often
    for iteration in range(num_iterations):
        images, boxes_of = draw_images(4, generator)
        loss, labels, sampled = loss_of(model, sampler, images, boxes_of, anchors, group_idxs, seed=iteration)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 10 == 0 or iteration == num_iterations - 1:
            print(f"iteration {iteration}: loss {loss.item():.3f}")
    print("of the last image, at anchor scales " + ", ".join(f"{scale:g}" for scale in SCALES) + ":")
    for name, chosen in (
        ("positive anchors", labels[-1] == 1),
        ("labelled anchors", labels[-1] >= 0),
        ("sampled positives", sampled[-1] == 1),
        ("sampled", sampled[-1] >= 0),
    ):
        print(f"{name}: {torch.bincount(group_idxs[chosen], minlength=len(SCALES)).tolist()}")


if __name__ == "__main__":
    main()
