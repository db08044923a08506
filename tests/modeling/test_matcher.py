import pytest
import torch

from gs_d2 import ops
from gs_d2.modeling import TwoPassMatcher


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
