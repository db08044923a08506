"""`ops.box_iou`: equal to the slow reference and to torchvision, its range, and its errors."""

import pytest
import torch
import torchvision
from cases import nasty_boxes, random_boxes

from gs_d2 import ops
from gs_d2.ops import reference


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_reference(device, seed):
    generator = torch.Generator().manual_seed(seed)
    m, n = torch.randint(0, 700, (2,), generator=generator).tolist()
    make = nasty_boxes if seed % 2 else random_boxes
    boxes1, boxes2 = make(m, generator), make(n, generator)
    ious = ops.box_iou(boxes1.to(device), boxes2.to(device)).cpu()
    assert ious.dtype == torch.float32
    assert torch.equal(ious, reference.box_iou(boxes1, boxes2))


def test_is_torchvisions_on_ordinary_boxes(device):
    generator = torch.Generator().manual_seed(0)
    boxes1, boxes2 = random_boxes(50, generator).to(device), random_boxes(80, generator).to(device)
    boxes1[:, 2:] += 1  # torchvision gives NaN where both boxes are empty
    torch.testing.assert_close(ops.box_iou(boxes1, boxes2), torchvision.ops.box_iou(boxes1, boxes2))


def test_range_symmetry_and_identity():
    boxes = nasty_boxes(300, torch.Generator().manual_seed(1))
    ious = ops.box_iou(boxes, boxes)
    assert ((ious >= 0) & (ious <= 1)).all()
    assert torch.equal(ious, ious.T)
    valid = reference.canonical_boxes(boxes).abs().sum(dim=1) > 0
    assert (ious.diagonal()[valid] == 1).all()
    assert (ious[~valid] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(device, shape):
    ious = ops.box_iou(torch.zeros(shape[0], 4, device=device), torch.zeros(shape[1], 4, device=device))
    assert ious.shape == shape


def test_non_contiguous_and_other_float_types(device):
    boxes = random_boxes(40, torch.Generator().manual_seed(2)).to(device)
    expected = ops.box_iou(boxes, boxes[::2].contiguous())
    assert torch.equal(ops.box_iou(boxes.T.contiguous().T, boxes[::2]), expected)
    assert torch.equal(ops.box_iou(boxes.double(), boxes[::2]), expected)


def test_errors(device):
    boxes = torch.zeros(3, 4, device=device)
    with pytest.raises(RuntimeError, match=r"^box_iou: boxes1 must have shape \(M, 4\), got \(3, 5\)$"):
        ops.box_iou(torch.zeros(3, 5, device=device), boxes)
    with pytest.raises(RuntimeError, match=r"^box_iou: boxes2 must have shape \(M, 4\), got \(4,\)$"):
        ops.box_iou(boxes, boxes[0])
    with pytest.raises(RuntimeError, match=r"^box_iou: boxes2 must be float32, got torch.int64$"):
        ops.box_iou(boxes, boxes.long())
