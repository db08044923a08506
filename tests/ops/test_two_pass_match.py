"""`ops.two_pass_match`: equal to the slow reference, its properties, ties, ignore boxes and edges."""

import math

import pytest
import torch
from cases import grid_anchors, nasty_boxes, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_d2 import ops
from gs_d2.ops import reference

SECOND_PASSES = ["best", "all", "none"]


def assert_equals_reference(gt_boxes, anchors, device, **arguments):
    expected = reference.two_pass_match(gt_boxes, anchors, **arguments)
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    actual = ops.two_pass_match(gt_boxes.to(device), anchors.to(device), **on_device)
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a.cpu(), e), name


@pytest.mark.parametrize("second_pass", SECOND_PASSES)
@pytest.mark.parametrize("seed", range(60))
def test_equals_the_reference(device, seed, second_pass):
    generator = torch.Generator().manual_seed(seed)
    m, n, k = (int(torch.randint(0, high, (), generator=generator)) for high in (40, 1500, 6))
    make = nasty_boxes if seed % 2 else random_boxes
    low, high = torch.rand(2, generator=generator).sort().values.clamp(min=0.05).tolist()
    assert_equals_reference(
        make(m, generator),
        make(n, generator),
        device,
        low=low,
        high=high,
        second_pass=second_pass,
        ignore_boxes=make(k, generator) if seed % 3 else None,
        ignore_thresh=0.05 + 0.9 * float(torch.rand((), generator=generator)),
    )


@pytest.mark.parametrize("second_pass", SECOND_PASSES)
def test_equals_the_reference_on_a_grid(device, second_pass):
    generator = torch.Generator().manual_seed(3)
    scales = 8 * 16 ** torch.rand(60, 1, generator=generator)
    centres = torch.rand(60, 2, generator=generator) * 200
    gt_boxes = torch.cat([centres - scales / 2, centres + scales / 2], dim=1)
    assert_equals_reference(gt_boxes, grid_anchors(50, 50), device, second_pass=second_pass)


coordinate = st.sampled_from([0.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, -8.0, float("nan"), float("inf")])


@settings(max_examples=150, deadline=None)
@given(
    gts=st.lists(st.tuples(*[coordinate] * 4), max_size=6),
    anchors=st.lists(st.tuples(*[coordinate] * 4), min_size=1, max_size=40),
    thresholds=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    second_pass=st.sampled_from(SECOND_PASSES),
)
def test_properties(gts, anchors, thresholds, second_pass):
    low, high = thresholds
    gts = torch.tensor(gts, dtype=torch.float32).reshape(-1, 4)
    anchors = torch.tensor(anchors, dtype=torch.float32)
    idxs, labels, ious = ops.two_pass_match(gts, anchors, low=low, high=high, second_pass=second_pass)
    low, high = torch.tensor([low, high])  # compared in float32
    assert ((ious >= 0) & (ious <= 1)).all()
    assert (labels[ious >= high] == 1).all() and (labels[ious < low] == 0).all()
    between = (ious >= low) & (ious < high)
    if second_pass == "none":
        assert (labels[between] == -1).all()
    for j in range(len(gts)):
        mine = idxs == j
        taken_first = (mine & (ious >= high)).any()
        rescued = mine & between & (labels == 1)
        if taken_first:
            assert not rescued.any()
        elif (mine & between).any() and second_pass != "none":
            assert rescued.sum() == (1 if second_pass == "best" else (mine & between).sum())
            assert ious[rescued].max() == ious[mine & between].max()


def test_second_pass_rescues_a_23_px_face():
    """SPEC section 2, row 1: no one-octave square anchor reaches IoU 0.6 with a 23 px face, wherever it lies."""
    best_first_pass = max((16 / 23) ** 2, (23 / 32) ** 2)
    assert best_first_pass < 0.6
    anchors = grid_anchors(40, 40)
    centre = 81.3
    gt = torch.tensor([[centre - 11.5, centre - 11.5, centre + 11.5, centre + 11.5]])
    without = ops.two_pass_match(gt, anchors, second_pass="none")
    assert (without.match_labels == 1).sum() == 0
    rescued = ops.two_pass_match(gt, anchors, second_pass="best")
    (index,) = torch.nonzero(rescued.match_labels == 1)[:, 0].tolist()
    assert rescued.max_ious[index] == rescued.max_ious.max()
    assert math.isclose(float(anchors[index, 2] - anchors[index, 0]), 32)
    assert 0.4 <= rescued.max_ious[index] < 0.6


def test_ties_go_to_the_lowest_index():
    gt = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 10]])
    anchors = torch.tensor([[2.0, 0, 12, 10], [0.0, 2, 10, 12], [-2.0, 0, 8, 10]])
    match = ops.two_pass_match(gt, anchors, low=0.4, high=0.9)
    assert match.matched_idxs.tolist() == [0, 0, 0]
    assert match.match_labels.tolist() == [1, -1, -1]


def test_ignore_boxes_take_negatives_only():
    gt = torch.tensor([[0.0, 0, 10, 10]])
    anchors = torch.tensor([[0.0, 0, 10, 10], [100.0, 0, 110, 10], [104.0, 0, 114, 10], [106.0, 0, 116, 10]])
    ignore = torch.tensor([[0.0, 0, 109, 10]])
    match = ops.two_pass_match(gt, anchors, ignore_boxes=ignore)
    assert match.match_labels.tolist() == [1, -1, -1, 0]


def test_batch_equals_image_by_image(device):
    generator = torch.Generator().manual_seed(5)
    counts, ignore_counts, n = [3, 0, 17, 1], [0, 2, 1, 0], 700
    gts = nasty_boxes(sum(counts), generator).to(device)
    ignores = random_boxes(sum(ignore_counts), generator).to(device)
    shared = nasty_boxes(n, generator).to(device)
    per_image = torch.stack([nasty_boxes(n, generator) for _ in counts]).to(device)
    gt_offsets, ignore_offsets = (torch.tensor([0, *c], device=device).cumsum(0) for c in (counts, ignore_counts))
    without_ignores = ops.two_pass_match(gts, shared, gt_offsets=gt_offsets)
    for b in range(len(counts)):
        alone = ops.two_pass_match(gts[gt_offsets[b] : gt_offsets[b + 1]], shared)
        assert torch.equal(without_ignores.match_labels[b], alone.match_labels)
    for anchors in (shared, per_image):
        batch = ops.two_pass_match(
            gts, anchors, gt_offsets=gt_offsets, ignore_boxes=ignores, ignore_offsets=ignore_offsets
        )
        for b in range(len(counts)):
            alone = ops.two_pass_match(
                gts[gt_offsets[b] : gt_offsets[b + 1]],
                anchors if anchors.dim() == 2 else anchors[b],
                ignore_boxes=ignores[ignore_offsets[b] : ignore_offsets[b + 1]],
            )
            for together, single in zip(batch, alone, strict=True):
                assert torch.equal(together[b], single)


@pytest.mark.parametrize(("m", "n"), [(0, 9), (9, 0), (0, 0)])
def test_empty(device, m, n):
    match = ops.two_pass_match(torch.ones(m, 4, device=device), torch.ones(n, 4, device=device))
    assert match.matched_idxs.tolist() == [0] * n
    assert match.match_labels.tolist() == [0] * n
    assert match.max_ious.tolist() == [0.0] * n


def test_empty_batch():
    match = ops.two_pass_match(torch.ones(0, 4), torch.ones(7, 4), gt_offsets=torch.zeros(1, dtype=torch.int64))
    assert match.match_labels.shape == (0, 7)


def test_non_contiguous(device):
    generator = torch.Generator().manual_seed(6)
    gts, anchors = random_boxes(20, generator).to(device), random_boxes(600, generator).to(device)
    expected = ops.two_pass_match(gts[::2].contiguous(), anchors[::3].contiguous())
    for a, e in zip(ops.two_pass_match(gts[::2], anchors[::3]), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0.0}, r"low must be in \(0, 1\], got 0"),
        ({"low": float("nan")}, r"low must be in \(0, 1\], got nan"),
        ({"high": 1.5}, r"high must be in \(0, 1\], got 1.5"),
        ({"low": 0.7}, "low must not exceed high, got low = 0.7, high = 0.6"),
        ({"ignore_thresh": 0.0}, r"ignore_thresh must be in \(0, 1\], got 0"),
        (
            {"gt_offsets": torch.tensor([0, 1])},
            "gt_offsets must rise from 0 to the number of boxes, 2, got 1 at index 1",
        ),
        ({"gt_offsets": torch.tensor([0, 3, 2])}, "gt_offsets must rise from 0 .*, got 2 at index 2"),
        ({"gt_offsets": torch.tensor([-1, 2])}, "gt_offsets must rise from 0 .*, got -1 at index 0"),
        ({"gt_offsets": torch.tensor([1, 2])}, "gt_offsets must rise from 0 .*, got 1 at index 0"),
        ({"gt_offsets": torch.tensor([0.0, 2.0])}, "gt_offsets must be int64, got torch.float32"),
        ({"gt_offsets": torch.tensor(2)}, r"gt_offsets must have shape \(B \+ 1,\), got \(\)"),
        ({"ignore_boxes": torch.zeros(2, 3)}, r"ignore_boxes must have shape \(M, 4\), got \(2, 3\)"),
        (
            {"ignore_boxes": torch.zeros(2, 4), "gt_offsets": torch.tensor([0, 2])},
            "ignore_offsets must be given exactly when gt_offsets and ignore_boxes are, got none with them",
        ),
        (
            {
                "ignore_boxes": torch.zeros(2, 4),
                "gt_offsets": torch.tensor([0, 2]),
                "ignore_offsets": torch.tensor([0, 1, 2]),
            },
            r"ignore_offsets must have shape \(2,\)",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError, match=f"^two_pass_match: {message}"):
        ops.two_pass_match(torch.ones(2, 4), torch.ones(5, 4), **arguments)


def test_more_errors():
    boxes = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"^two_pass_match: second_pass must be one of none, best, all, got 'low'"):
        ops.two_pass_match(boxes, boxes, second_pass="low")
    with pytest.raises(RuntimeError, match=r"anchors must have shape \(N, 4\)"):
        ops.two_pass_match(boxes, torch.ones(4))
    with pytest.raises(RuntimeError, match=r"anchors of shape \(B, N, 4\) need gt_offsets"):
        ops.two_pass_match(boxes, torch.ones(2, 5, 4))
    with pytest.raises(RuntimeError, match=r"^two_pass_match: anchors must be float32, got torch.int32$"):
        ops.two_pass_match(boxes, boxes.int())


def test_memory_does_not_grow_with_the_product():
    """2,000 faces on 360,000 anchors would need a 2.9 GB matrix; the results alone take 4.7 MB."""
    import resource

    anchors = grid_anchors(300, 300)
    gts = random_boxes(2000, torch.Generator().manual_seed(7), size=1200)
    ops.two_pass_match(gts[:1], anchors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    match = ops.two_pass_match(gts, anchors)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert (match.match_labels == 1).any()
    assert grown < 64, f"{grown:.0f} MiB"
