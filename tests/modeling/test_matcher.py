"""The matcher: the same on a matrix and on boxes, and how small regions ignore the anchors near them."""

import pytest
import torch
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_d2 import ops
from gs_d2.modeling import ScaleStrideAnchorGenerator, TwoPassMatcher
from gs_d2.modeling.matcher import enlarge_regions

SCALES = [16, 32, 64, 128]


def random_boxes(n, generator):
    xy = torch.rand(n, 2, generator=generator) * 60
    boxes = torch.cat([xy, xy + 1 + torch.rand(n, 2, generator=generator) * 40], dim=1)
    return boxes.round() if n % 2 else boxes  # whole numbers make ties


@pytest.mark.parametrize("second_pass", ["best", "all", "none"])
@pytest.mark.parametrize("seed", range(25))
def test_on_a_matrix_equals_on_boxes(device, seed, second_pass):
    generator = torch.Generator().manual_seed(seed)
    m, n = (int(torch.randint(0, high, (), generator=generator)) for high in (12, 400))
    gts, anchors = random_boxes(m, generator).to(device), random_boxes(n, generator).to(device)
    matcher = TwoPassMatcher([0.3, 0.6], second_pass=second_pass)
    match = matcher.match(gts, anchors)
    matches, match_labels = matcher(ops.box_iou(gts, anchors))
    assert torch.equal(matches, match.matched_idxs)
    assert torch.equal(match_labels, match.match_labels)


def test_errors():
    with pytest.raises(ValueError, match=r"thresholds must be \[low, high\]"):
        TwoPassMatcher([0.6, 0.4])
    with pytest.raises(ValueError, match=r"thresholds must be \[low, high\]"):
        TwoPassMatcher([0.5])
    with pytest.raises(ValueError, match=r"labels must be \[0, -1, 1\], got \[0, 1\]"):
        TwoPassMatcher([0.4, 0.6], [0, 1])
    with pytest.raises(ValueError, match="second_pass must be best, all or none, got 'low'"):
        TwoPassMatcher([0.4, 0.6], second_pass="low")


def test_min_ignore_size_is_not_negative():
    with pytest.raises(ValueError, match="min_ignore_size must be at least 0, got -1"):
        TwoPassMatcher([0.4, 0.6], min_ignore_size=-1)


sides = st.floats(0.01, 15.9)
scale_16 = st.tuples(sides, sides)
slivers = st.tuples(st.floats(0.01, 2), st.floats(10, 60))  # what a crop leaves of a face
places = st.floats(64, 192)


@settings(max_examples=150, deadline=None)
@given(
    sides=st.one_of(scale_16, slivers, slivers.map(lambda x: x[::-1])),
    x=places,
    y=places,
    stride=st.sampled_from([4, 8]),
)
def test_a_small_region_ignores_the_nearest_smallest_anchors_and_no_larger_ones(sides, x, y, stride):
    centre = torch.tensor([x, y])
    region = torch.cat([centre - torch.tensor(sides) / 2, centre + torch.tensor(sides) / 2])
    generator = ScaleStrideAnchorGenerator(sizes=[SCALES], aspect_ratios=[[1.0]], feature_strides=[stride])
    (anchors,) = generator([torch.zeros(1, 1, 256 // stride, 256 // stride)])
    matcher = TwoPassMatcher([0.4, 0.6], min_ignore_size=16)
    labels, _, _ = matcher.match_images(anchors.tensor, [Boxes(torch.zeros(0, 4))], [Boxes(region[None])])
    offsets = (anchors.get_centers() - centre).abs().amax(dim=1)
    smallest = anchors.area().sqrt().round() == 16
    assert (labels[0, smallest & (offsets <= 4)] == -1).all() and (smallest & (offsets <= 4)).any()
    assert (labels[0, ~smallest] == 0).all()


def test_three_hundred_tiny_faces():
    """Of each at least one anchor of 40,000 is ignored; none was, as long as the regions kept their size."""
    generator = torch.Generator().manual_seed(0)
    corner = 20 + 360 * torch.rand(300, 2, generator=generator)
    faces = torch.cat([corner, corner + 2 + 5.9 * torch.rand(300, 2, generator=generator)], dim=1)
    anchors = ScaleStrideAnchorGenerator(sizes=[SCALES], aspect_ratios=[[1.0]], feature_strides=[4])
    (anchors,) = anchors([torch.zeros(1, 1, 100, 100)])
    no_faces = [Boxes(torch.zeros(0, 4))]
    ignored = {}
    for size in (0, 16):
        matcher = TwoPassMatcher([0.4, 0.6], min_ignore_size=size)
        ignored[size] = matcher.match_images(anchors.tensor, no_faces, [Boxes(faces)])[0][0] == -1
    assert len(anchors) == 40_000 and not ignored[0].any()
    near = ops.box_iou(faces, anchors.tensor[ignored[16]]) > 0
    assert near.any(dim=1).all() and near.any(dim=0).all()


def test_regions_are_enlarged_about_their_centres():
    boxes = torch.tensor([[10.0, 10, 14, 12], [0, 0, 16, 40], [0, 0, 4, 31], [0, 0, 4, 32], [50, 50, 130, 140]])
    expected = [[4.0, 3, 20, 19], [0, 0, 16, 40], [-6, 0, 10, 31], [-4, 0, 8, 32], [50, 50, 130, 140]]
    assert enlarge_regions(boxes, 16).tolist() == expected
    assert torch.equal(enlarge_regions(boxes, 0), boxes)
    assert enlarge_regions(boxes[:0], 16).shape == (0, 4)


def test_a_region_without_area_ignores_nothing():
    nan = float("nan")
    boxes = torch.tensor([[10.0, 10, 10, 14], [10, 10, 4, 4], [nan, 10, 12, 14], [10, 10, 10, 10]])
    torch.testing.assert_close(enlarge_regions(boxes, 16), boxes, rtol=0, atol=0, equal_nan=True)
    matcher = TwoPassMatcher([0.4, 0.6], min_ignore_size=16)
    assert (matcher.match(boxes[:0], torch.tensor([[2.0, 2, 18, 18]]), ignore_boxes=boxes).match_labels == 0).all()


@pytest.mark.parametrize("own_anchors", [False, True], ids=["shared", "of each image"])
def test_negatives_on_padding_are_ignored_and_positives_are_not(own_anchors, device):
    """Anchor by anchor, against the labels without padding."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(96, 96), (40, 70), (96, 1), (33, 96)]
    anchors = ScaleStrideAnchorGenerator(sizes=[[16, 32]], aspect_ratios=[[1.0]], feature_strides=[4])
    (anchors,) = anchors([torch.zeros(1, 1, 24, 24)])
    # The second image's face is clipped at its border, and large enough for an anchor centred beyond it.
    faces = [[40.0, 30, 58, 46], [60, 10, 70, 26], [200, 200, 230, 230], [10, 5, 40, 33]]
    shift = torch.randint(-3, 4, (len(sizes), 1, 4), generator=generator).float() if own_anchors else torch.zeros(4)
    boxes = (anchors.tensor + shift).to(device)
    arguments = boxes, [Boxes(torch.tensor([face], device=device)) for face in faces], None
    matcher = TwoPassMatcher([0.3, 0.4])
    without, idxs, gts = matcher.match_images(*arguments)
    labels, same_idxs, same_gts = matcher.match_images(*arguments, sizes)
    assert torch.equal(idxs, same_idxs) and torch.equal(gts, same_gts)
    seen = set()
    for b, (height, width) in enumerate(sizes):
        for i in range(len(anchors)):
            x1, y1, x2, y2 = (boxes[b, i] if own_anchors else boxes[i]).tolist()
            inside = 0 <= (x1 + x2) / 2 < width and 0 <= (y1 + y2) / 2 < height
            expected = -1 if without[b, i] == 0 and not inside else int(without[b, i])
            assert int(labels[b, i]) == expected
            seen.add((inside, expected))
    assert {(True, 0), (False, -1), (True, 1), (False, 1)} <= seen
