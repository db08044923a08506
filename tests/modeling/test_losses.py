"""Losses of boxes: the paper's gradient, checked numerically, and finite values everywhere."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from gs_d2.modeling.losses import (
    box_regression_loss,
    group_mean_weights,
    iou_loss,
    least_square_iou_loss,
    paired_iou,
)
from gs_d2.ops import reference

TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))


def boxes(n, seed):
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 20
    return torch.cat([xy, xy + 5 + 20 * torch.rand(n, 2, generator=generator, dtype=torch.float64)], dim=1)


def test_paired_iou_is_the_diagonal_of_the_matrix():
    a, b = boxes(50, 0).float(), boxes(50, 1).float()
    torch.testing.assert_close(paired_iou(a, b), reference.box_iou(a, b).diagonal())
    assert (paired_iou(a, a) == 1).all()
    assert (paired_iou(a[:, [2, 3, 2, 3]], a[:, [2, 3, 2, 3]]) == 0).all()


def test_gradient_is_the_papers():
    """Eq. 6 and 12 (with its typo y2* - y1* corrected), by hand for x1 of the prediction."""
    p = torch.tensor([[2.0, 1.0, 12.0, 9.0]], requires_grad=True)
    g = torch.tensor([[4.0, 0.0, 13.0, 8.0]])
    least_square_iou_loss(p, g).sum().backward()
    inter, union = (12 - 4) * (8 - 1), 80 + 72 - (12 - 4) * (8 - 1)
    d_iou = inter * (9 - 1) / union**2  # x1 of p is left of x1 of g: only the union depends on it
    assert math.isclose(float(p.grad[0, 0]), -2 * (1 - inter / union) * d_iou, rel_tol=1e-5)


@pytest.mark.parametrize("loss", [least_square_iou_loss, iou_loss])
def test_gradient_numerically(loss):
    a, b = boxes(20, 2), boxes(20, 3)
    touching = paired_iou(a, b) > 0.05
    a, b = a[touching], b[touching]
    p = a.float().requires_grad_()
    loss(p, b.float()).sum().backward()
    step = 1e-2
    for k in range(4):
        shift = torch.zeros(4)
        shift[k] = step
        numeric = (loss(a.float() + shift, b.float()) - loss(a.float() - shift, b.float())) / (2 * step)
        torch.testing.assert_close(p.grad[:, k], numeric, atol=2e-3, rtol=2e-2)


def test_gradient_at_iou_1():
    """Zero for the least-square loss, and small beside it; -ln IoU pushes as hard as ever: the paper's reason."""
    g = boxes(10, 4).float()
    width, height = (g[:, 2:] - g[:, :2]).unbind(dim=1)
    p = g.clone().requires_grad_()
    least_square_iou_loss(p, g).sum().backward()
    assert (p.grad == 0).all()
    for side in (1e-3, -1e-3):  # all corners outwards, then inwards
        p = (g + side * torch.tensor([-1.0, -1, 1, 1])).requires_grad_()
        least_square_iou_loss(p, g).sum().backward()
        assert p.grad.abs().max() < 1e-3
        p = p.detach().requires_grad_()
        iou_loss(p, g).sum().backward()
        # d(-ln IoU) / dx2 is 1 / w outside of the face, where the area grows, and -1 / w inside.
        sign = 1 if side > 0 else -1
        torch.testing.assert_close(p.grad[:, 2], sign / width, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(p.grad[:, 1], -sign / height, rtol=1e-2, atol=1e-4)


def test_boxes_that_do_not_touch_are_finite():
    p = torch.tensor([[0.0, 0, 1, 1]], requires_grad=True)
    for loss in (least_square_iou_loss, iou_loss):
        value = loss(p, torch.tensor([[50.0, 50, 60, 60]]))
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(p.grad).all()


@pytest.mark.parametrize("loss_type", ["smooth_l1", "iou", "least_square_iou"])
@pytest.mark.parametrize("beta", [0.0, 0.1111])
def test_box_regression_loss_is_zero_at_the_target(loss_type, beta):
    anchors, targets = boxes(30, 5).float(), boxes(30, 6).float()
    deltas = TRANSFORM.get_deltas(anchors, targets)
    arguments = dict(loss_type=loss_type, smooth_l1_beta=beta)
    at_target = box_regression_loss(deltas, anchors, targets, TRANSFORM, **arguments)
    away = box_regression_loss(deltas + 0.3, anchors, targets, TRANSFORM, **arguments)
    assert at_target.shape == (30,) and (at_target < 1e-4).all()
    assert (away > at_target).all()
    half = box_regression_loss(deltas.half() + 0.3, anchors, targets, TRANSFORM, **arguments)
    assert half.dtype == torch.float32 and torch.isfinite(half).all()


def test_unknown_loss():
    with pytest.raises(ValueError, match="loss_type must be one of smooth_l1, least_square_iou, iou, got 'giou'"):
        box_regression_loss(boxes(1, 0), boxes(1, 0), boxes(1, 0), TRANSFORM, loss_type="giou", smooth_l1_beta=0)


def test_weights_make_a_sum_of_per_group_means(device):
    generator = torch.Generator().manual_seed(7)
    values = torch.rand(3, 200, generator=generator).to(device)
    mask = (torch.rand(3, 200, generator=generator) < 0.3).to(device)
    groups = torch.randint(0, 5, (200,), generator=generator).to(device)
    mask[:, groups == 2] = False  # an empty group
    mask[1, groups == 4] = False
    weighted = (values * group_mean_weights(mask, groups, 5)).sum()
    expected = 0.0
    for b in range(3):
        for g in range(5):
            members = mask[b] & (groups == g)
            if members.any():
                expected += float(values[b][members].mean())
    assert math.isclose(float(weighted), expected, rel_tol=1e-5)
