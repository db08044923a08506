"""The sampler and the grouping by scale: their limits, their errors, and what a subclass may change."""

import pytest
import torch

from gs_d2.data import load_wider_face
from gs_d2.modeling import ScaleStrideAnchorGenerator, TwoPassMatcher
from gs_d2.sampling import GroupSampler, first_of_each_group, group_by_scale

SCALES = [16, 32, 64, 128]


def test_group_by_scale_is_eq_4():
    scales = torch.tensor([1.0, 16, 22.6, 22.7, 32, 45.2, 45.3, 90.5, 90.6, 5000])
    assert group_by_scale(scales, SCALES).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert group_by_scale(torch.zeros(0), SCALES).shape == (0,)


def test_errors():
    with pytest.raises(ValueError, match="method must be one of random, wrs, ohem, ohem_all, none, got 'focal'"):
        GroupSampler(4, 256, method="focal")


def test_none_draws_all_that_is_labelled():
    labels = torch.tensor([[1, 0, -1, 0, 1], [0, 0, 0, -1, -1]], dtype=torch.int8)
    groups = torch.tensor([0, 0, 0, 1, 1])
    sampler = GroupSampler(2, 1, method="none")
    assert torch.equal(sampler(labels, groups, torch.rand(2, 5)), labels)
    assert sampler.max_positives is None and not sampler.needs_losses
    pos, neg = sampler.subsample_labels(torch.tensor([1, 3, -1, 0]), groups[:4], bg_label=3)
    assert (pos.tolist(), neg.tolist()) == ([0, 3], [1])


@pytest.mark.parametrize(
    ("method", "needs_losses", "max_positives"),
    [("random", False, 8), ("wrs", True, 8), ("ohem", True, 8), ("ohem_all", True, 40)],
)
def test_what_a_sampler_says_of_itself(method, needs_losses, max_positives):
    sampler = GroupSampler(4, 10, positive_fraction=0.25, method=method)
    assert (sampler.max_positives, sampler.needs_losses) == (max_positives, needs_losses)
    assert sampler.labels_compete == (method == "ohem_all")
    labels = torch.ones(100, dtype=torch.int8)
    assert (sampler(labels, torch.arange(100) % 4, torch.rand(100)) == 1).sum() == sampler.max_positives


def test_a_subclass_that_draws_in_its_own_way_has_no_limit_but_one_of_its_own():
    class More(GroupSampler):
        def __call__(self, match_labels, group_idxs, losses=None, seed=None):
            return match_labels

    class Limited(More):
        max_positives = 5

    class Renamed(GroupSampler):
        pass

    found = [kind(4, 10).max_positives for kind in (GroupSampler, More, Limited, Renamed)]
    assert found == [8, None, 5, 8]


@pytest.mark.parametrize("num", [0, 1, 50])
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_first_of_each_group(num, count, device):
    groups = torch.randint(0, 4, (num,), generator=torch.Generator().manual_seed(num))
    groups[groups == 2] = 3  # an empty group
    taken, expected = [0] * 4, []
    for i, group in enumerate(groups.tolist()):
        if taken[group] < count:
            taken[group] += 1
            expected.append(i)
    assert first_of_each_group(groups.to(device), 4, count).tolist() == expected


@pytest.fixture(scope="module")
def real_labels(shared_data):
    """(match_labels, group_idxs) of every twentieth training image, on P2 at stride 4 of a 640 x 640 view."""
    data = shared_data / "mini_wider" / "widerface"
    records = load_wider_face(data / "wider_face_split" / "wider_face_train_bbx_gt.txt", "")
    generator = ScaleStrideAnchorGenerator(sizes=[SCALES], aspect_ratios=[[1.0]], feature_strides=[4])
    (anchors,) = generator([torch.zeros(1, 1, 160, 160)])
    groups = group_by_scale(anchors.area().sqrt(), SCALES)
    matcher = TwoPassMatcher([0.4, 0.6])
    return [
        (matcher.match(torch.from_numpy(record["gt_boxes"]), anchors.tensor).match_labels, groups)
        for record in records[::20]
    ]


@pytest.mark.parametrize("method", ["random", "wrs", "ohem"])
def test_n_per_group_at_1_to_3_on_real_annotations(real_labels, method):
    """Paper, section 4.2: every group has N samples, a quarter positive, shortages filled with negatives."""
    num_per_group = 256
    sampler = GroupSampler(len(SCALES), num_per_group, method=method)
    full = short = 0
    for labels, groups in real_labels:
        losses = torch.rand(len(labels), generator=torch.Generator().manual_seed(0))
        sampled = sampler(labels, groups, losses, seed=1)
        for group in range(len(SCALES)):
            available = int(((labels == 1) & (groups == group)).sum())
            positives = int(((sampled == 1) & (groups == group)).sum())
            negatives = int(((sampled == 0) & (groups == group)).sum())
            assert positives == min(available, num_per_group // 4)
            assert positives + negatives == num_per_group
            full += positives * 3 == negatives
            short += 0 < available < num_per_group // 4
    assert full > 0 and short > 0  # both cases occurred


def test_ohem_without_groups_takes_the_highest_losses_whatever_the_label(real_labels):
    """Paper, sections 4.3 and 6.2: B of all samples, "regardless of" scale and of "whether the sample is positive"."""
    size = 1024
    sampler = GroupSampler(1, size, method="ohem_all")
    shares = set()
    for labels, groups in real_labels:
        losses = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) + (labels == 1)  # positives first
        sampled = sampler(labels, torch.zeros_like(groups), losses, seed=1)
        taken = sampled >= 0
        assert int(taken.sum()) == size and torch.equal(sampled[taken], labels[taken])
        assert losses[taken].min() >= losses[(labels >= 0) & ~taken].max()
        assert int((sampled == 1).sum()) == min(size, int((labels == 1).sum()))
        shares.add(int((sampled == 1).sum()) > size // 4)
    assert shares == {True, False}  # some images have more positives than a quarter of B


def test_sampled_distribution_is_flat_where_the_labelled_one_is_not(real_labels):
    """Fig. 2: without groups the samples of a scale follow how many anchors matched; with groups they do not."""
    shares = {}
    for name, num_groups in (("grouped", len(SCALES)), ("ungrouped", 1)):
        counts = torch.zeros(2, len(SCALES))
        sampler = GroupSampler(num_groups, 2048 // num_groups)
        for labels, groups in real_labels:
            sampled = sampler(labels, groups if num_groups > 1 else torch.zeros_like(groups), seed=2)
            for label in (0, 1):
                counts[label] += torch.bincount(groups[sampled == label], minlength=len(SCALES))
        shares[name] = counts.sum(dim=0) / counts.sum(), counts[1] / counts[1].sum()
    assert torch.equal(shares["grouped"][0], torch.full((len(SCALES),), 0.25))
    spread = {name: float(positive.max() / positive.clamp(min=1e-6).min()) for name, (_, positive) in shares.items()}
    assert spread["ungrouped"] > 3
    assert spread["grouped"] < spread["ungrouped"] / 1.5
