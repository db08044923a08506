"""top_nms and top_nms_of_groups against the whole of torchvision's NMS, prune_overlapping against pairs one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

import gs_d2.modeling.nms
from gs_d2.modeling.nms import prune_overlapping, top_nms, top_nms_of_groups
from gs_d2.ops import reference

SMALL_CHUNKS = {"cpu": 16, "cuda": 16}


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 60
    return torch.cat([corner, corner + 10 + 20 * torch.rand(*shape, 2, generator=generator)], dim=-1)


def test_top_nms_stops_at_any_limit_and_keeps_the_order(monkeypatch, device):
    monkeypatch.setattr("gs_d2.modeling.nms._CHUNK", SMALL_CHUNKS)
    boxes = random_boxes(200).to(device)
    scores = torch.rand(200, generator=torch.Generator().manual_seed(1)).to(device)
    whole = nms(boxes, scores, 0.4)
    assert 20 < len(whole) < 150
    for limit in (0, 1, 15, 16, 17, len(whole), 1000):
        assert torch.equal(top_nms(boxes, scores, 0.4, limit), whole[:limit])


def test_top_nms_keeps_classes_apart(monkeypatch, device):
    monkeypatch.setattr("gs_d2.modeling.nms._CHUNK", SMALL_CHUNKS)
    boxes = (random_boxes(200) - 30).to(device)  # negative coordinates, too
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(200, generator=generator).to(device)
    classes = torch.randint(0, 80, (200,), generator=generator).clamp(min=75).to(device)
    kept = []
    for k in classes.unique():
        rows = torch.nonzero(classes == k)[:, 0]
        kept.append(rows[nms(boxes[rows], scores[rows], 0.4)])
    kept = torch.cat(kept)
    kept = kept[scores[kept].argsort(descending=True)]
    assert len(kept) < 200 and len(kept) > len(nms(boxes, scores, 0.4))
    for limit in (0, 17, len(kept), 1000):
        assert torch.equal(top_nms(boxes, scores, 0.4, limit, classes), kept[:limit])
    assert torch.equal(top_nms(boxes[:0], scores[:0], 0.4, 5, classes[:0]), kept[:0])


def first_of_each(kept, groups, num_groups, max_per_group):
    taken, first = [0] * num_groups, []
    for i in kept.tolist():
        taken[groups[i]] += 1
        if taken[groups[i]] <= max_per_group:
            first.append(i)
    return first


@st.composite
def crowds(draw):
    """Boxes on a coarse grid, so that IoUs of exactly 1/3, 1/2 and 0.7 are frequent, with many equal scores."""
    num = draw(st.integers(0, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    corner = torch.randint(0, 8, (num, 2), generator=generator)
    side = torch.randint(1, 11, (num, 2), generator=generator)
    boxes = torch.cat([corner, corner + side], dim=1).float() * draw(st.sampled_from([1.0, 7.3]))
    scores = torch.randint(0, draw(st.sampled_from([2, 1000])), (num,), generator=generator).float()
    groups = torch.randint(0, 3, (num,), generator=generator)
    return boxes, scores, groups


@settings(max_examples=100, deadline=None)
@given(crowds(), st.sampled_from([0.3, 1 / 3, 0.5, 0.7]), st.integers(0, 30), st.integers(0, 70))
def test_top_nms_is_the_whole_nms_cut_off(crowd, iou_thresh, max_per_group, max_kept):
    """Bit for bit, whatever the size of the chunks, of all boxes and of each group."""
    boxes, scores, groups = crowd
    whole = nms(boxes, scores, iou_thresh)
    expected = first_of_each(whole, groups.tolist(), 3, max_per_group)[:max_kept]
    before = dict(gs_d2.modeling.nms._CHUNK)
    try:
        for size in (1, 16, 8192):
            gs_d2.modeling.nms._CHUNK["cpu"] = size
            assert torch.equal(top_nms(boxes, scores, iou_thresh, max_kept), whole[:max_kept])
            found = top_nms_of_groups(boxes, scores, iou_thresh, max_kept, groups, 3, max_per_group)
            assert found.dtype == torch.int64 and found.tolist() == expected
    finally:
        gs_d2.modeling.nms._CHUNK.update(before)


@pytest.fixture
def looked_at(monkeypatch):
    """How many boxes NMS compared with each other."""
    counts = []
    inner = gs_d2.modeling.nms.nms

    def counting(boxes, scores, iou_thresh):
        counts.append(len(boxes))
        return inner(boxes, scores, iou_thresh)

    monkeypatch.setattr("gs_d2.modeling.nms._CHUNK", SMALL_CHUNKS)
    monkeypatch.setattr("gs_d2.modeling.nms.nms", counting)
    return counts


def test_it_stops_when_every_group_is_full(looked_at, device):
    boxes, generator = random_boxes(4000).to(device), torch.Generator().manual_seed(1)
    scores = torch.rand(4000, generator=generator).to(device)
    groups = torch.randint(0, 4, (4000,), generator=generator).to(device)
    whole = nms(boxes, scores, 0.7)
    expected = first_of_each(whole, groups.tolist(), 4, 5)
    assert top_nms_of_groups(boxes, scores, 0.7, 1000, groups, 4, 5).tolist() == expected
    assert len(expected) == 20 and sum(looked_at) < 200
    last = int((scores >= scores[expected[-1]]).sum())
    assert sum(looked_at) <= last + 16, "no chunk beyond the one of the last box"


def test_it_stops_at_the_limit_of_all_groups(looked_at):
    boxes = random_boxes(4000)
    scores = torch.rand(4000, generator=torch.Generator().manual_seed(1))
    groups = torch.zeros(4000, dtype=torch.int64)  # the other group stays empty
    whole = nms(boxes, scores, 0.7)
    assert top_nms_of_groups(boxes, scores, 0.7, 9, groups, 2, 20).tolist() == whole[:9].tolist()
    assert sum(looked_at) <= 32
    assert top_nms_of_groups(boxes, scores, 0.7, 1000, groups, 2, 20).tolist() == whole[:20].tolist()


@pytest.mark.parametrize("labels_compete", [False, True])
@pytest.mark.parametrize("shared_groups", [True, False])
@pytest.mark.parametrize("max_kept", [3, 10**6])
def test_prune_overlapping_is_greedy_in_each_group_and_label(shared_groups, max_kept, labels_compete, device):
    num_images, num, num_groups, thresh = 2, 120, 3, 0.3
    generator = torch.Generator().manual_seed(2)
    boxes = random_boxes(num_images, num)
    losses = torch.rand(num_images, num, generator=generator)
    labels = torch.randint(-1, 2, (num_images, num), generator=generator).to(torch.int8)
    groups = torch.randint(0, num_groups, (num,) if shared_groups else (num_images, num), generator=generator)
    pruned = prune_overlapping(
        *(x.to(device) for x in (labels, groups)),
        num_groups,
        *(x.to(device) for x in (boxes, losses)),
        thresh,
        max_kept,
        labels_compete,
    ).cpu()
    expected = torch.full_like(labels, -1)
    dropped = 0
    for b in range(num_images):
        ious = reference.box_iou(boxes[b], boxes[b])
        of_image = groups.expand(num_images, num)[b]
        for group in range(num_groups):
            for competing in [(0, 1)] if labels_compete else [(0,), (1,)]:
                rows = [i for i in range(num) if of_image[i] == group and labels[b, i] in competing]
                kept = []
                for i in sorted(rows, key=lambda i: -losses[b, i]):
                    if len(kept) < max_kept and all(ious[i, j] <= thresh for j in kept):
                        kept.append(i)
                dropped += len(rows) - len(kept)
                expected[b, kept] = labels[b, kept]
    assert torch.equal(pruned, expected)
    assert dropped > 0 and (expected == 1).any() and (expected == 0).any()


def test_identical_boxes_of_other_groups_labels_and_images_stay():
    boxes = torch.tensor([0.0, 0, 10, 10]).expand(2, 4, 4)
    labels = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.int8)
    groups = torch.tensor([0, 0, 1, 1])
    losses = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4]])
    assert prune_overlapping(labels, groups, 2, boxes, losses, 0.5, 9).tolist() == [[0, 1, 0, 1], [0, 1, -1, 0]]
    competing = prune_overlapping(labels, groups, 2, boxes, losses, 0.5, 9, labels_compete=True)
    assert competing.tolist() == [[-1, 1, -1, 1], [-1, 1, -1, 0]]
    labels[:] = -1
    assert (prune_overlapping(labels, groups, 2, boxes, losses, 0.5, 9) == -1).all()


def test_pruning_takes_a_loss_of_nan_for_0_and_keeps_an_infinite_one():
    """As the op that draws: the box of NaN is dropped for the one that it overlaps, whatever that costs."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 11], [50, 0, 60, 10], [50, 0, 60, 11]]])
    losses = torch.tensor([[float("nan"), 0.1, 9, float("inf")]])
    labels, groups = torch.zeros(1, 4, dtype=torch.int8), torch.zeros(4, dtype=torch.int64)
    assert prune_overlapping(labels, groups, 1, boxes, losses, 0.5, 9).tolist() == [[-1, 0, -1, 0]]
