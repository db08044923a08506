"""Every op against its reference, bit for bit, on two thousand small cases each: sizes where every edge is near."""

import torch
from cases import nasty_boxes, random_boxes, random_losses

from gs_d2 import ops
from gs_d2.ops import reference

CASES = 2000


def pick(generator, *values):
    return values[int(torch.randint(len(values), (), generator=generator))]


def integer(generator, low, high):
    return int(torch.randint(low, high, (), generator=generator))


def test_box_iou():
    for seed in range(CASES):
        generator = torch.Generator().manual_seed(seed)
        make = pick(generator, random_boxes, nasty_boxes)
        boxes1, boxes2 = make(integer(generator, 0, 20), generator), make(integer(generator, 0, 40), generator)
        assert torch.equal(ops.box_iou(boxes1, boxes2), reference.box_iou(boxes1, boxes2)), seed


def test_two_pass_match():
    for seed in range(CASES):
        generator = torch.Generator().manual_seed(seed)
        make = pick(generator, random_boxes, nasty_boxes)
        gts, anchors = make(integer(generator, 0, 9), generator), make(integer(generator, 0, 300), generator)
        low, high = torch.rand(2, generator=generator).sort().values.clamp(min=0.02).tolist()
        arguments = dict(
            low=low,
            high=pick(generator, high, low, 1.0),
            second_pass=pick(generator, "best", "all", "none"),
            ignore_boxes=pick(generator, None, make(integer(generator, 0, 4), generator)),
            ignore_thresh=pick(generator, 0.01, 0.5, 1.0),
        )
        actual = ops.two_pass_match(gts, anchors, **arguments)
        for name, a, e in zip(actual._fields, actual, reference.two_pass_match(gts, anchors, **arguments), strict=True):
            assert torch.equal(a, e), (seed, name)


def test_group_subsample():
    for seed in range(CASES):
        generator = torch.Generator().manual_seed(seed)
        n, num_groups = integer(generator, 0, 300), integer(generator, 1, 5)
        labels = torch.randint(-2, 3, (n,), generator=generator, dtype=torch.int8)
        groups = torch.randint(-1, num_groups + 1, (n,), generator=generator)
        method = pick(generator, "random", "wrs", "ohem", "ohem_all")
        arguments = dict(
            num_groups=num_groups,
            num_per_group=pick(generator, 0, 1, 5, 40, n, 2 * n, 2**31 - 1),
            positive_fraction=pick(generator, 0.0, 0.25, 0.29, 1.0),
            method=method,
            losses=None if method == "random" else random_losses(n, generator),
            seed=pick(generator, 0, 1, -(2**63), 2**63 - 1, seed),
        )
        actual = ops.group_subsample(labels, groups, **arguments)
        assert torch.equal(actual, reference.group_subsample(labels, groups, **arguments)), seed


def test_more_pairs_than_fit_32_bits():
    """n * m above 2^31: 70,000 anchors against 40,000 boxes, most of them far away."""
    generator = torch.Generator().manual_seed(0)
    gts = random_boxes(40_000, generator)
    gts[100:] += 1e6
    anchors = random_boxes(70_000, generator)
    match = ops.two_pass_match(gts, anchors)
    few = ops.two_pass_match(gts[:100], anchors)
    for a, e in zip(match, few, strict=True):
        assert torch.equal(a, e)
