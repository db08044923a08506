"""A batch must be what its images are alone."""

import torch

from gs_d2 import ops


def test_batch_without_ignore_boxes():
    generator = torch.Generator().manual_seed(0)
    num_images = 1000  # once read past the end of offsets that were not given
    anchors = torch.rand(num_images, 6, 4, generator=generator) * 20
    anchors[..., 2:] += anchors[..., :2]
    gts = anchors[:, :2].reshape(-1, 4) + 0.5
    batch = ops.two_pass_match(gts, anchors, gt_offsets=torch.arange(num_images + 1) * 2)
    for b in range(num_images):
        alone = ops.two_pass_match(gts[2 * b : 2 * b + 2], anchors[b])
        assert all(torch.equal(whole[b], one) for whole, one in zip(batch, alone, strict=True))
