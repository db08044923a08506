"""`ops.group_subsample`: equal to the slow reference, its quotas, and the distribution of its samples."""

import math

import pytest
import torch
from cases import random_losses
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_d2 import ops
from gs_d2.ops import reference

METHODS = ["random", "wrs", "ohem", "ohem_all"]


def random_labels(n, generator, num_groups):
    labels = torch.randint(-1, 2, (n,), generator=generator, dtype=torch.int8)
    return labels, torch.randint(-1, num_groups + 1, (n,), generator=generator)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(60))
def test_equals_the_reference(device, seed, method):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(0, 6000, (), generator=generator))
    num_groups = int(torch.randint(1, 9, (), generator=generator))
    labels, groups = random_labels(n, generator, num_groups)
    losses = None if method == "random" else random_losses(n, generator)
    arguments = dict(
        num_groups=num_groups,
        num_per_group=int(torch.randint(0, 700, (), generator=generator)),
        positive_fraction=float(torch.rand((), generator=generator)),
        method=method,
        seed=int(torch.randint(-(2**62), 2**62, (), generator=generator)),
        first_image=seed % 5,
    )
    expected = reference.group_subsample(labels, groups, losses=losses, **arguments)
    actual = ops.group_subsample(
        labels.to(device), groups.to(device), losses=None if losses is None else losses.to(device), **arguments
    )
    assert actual.dtype == torch.int8
    assert torch.equal(actual.cpu(), expected)


@settings(max_examples=150, deadline=None)
@given(
    anchors=st.lists(st.tuples(st.integers(-3, 3), st.integers(-2, 5)), max_size=200),
    num_per_group=st.integers(0, 60),
    positive_fraction=st.floats(0, 1),
    method=st.sampled_from(METHODS),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_quotas(anchors, num_per_group, positive_fraction, method, seed):
    labels = torch.tensor([a for a, _ in anchors], dtype=torch.int8)
    groups = torch.tensor([g for _, g in anchors], dtype=torch.int64)
    losses = None if method == "random" else torch.rand(len(anchors), generator=torch.Generator().manual_seed(0))
    sampled = ops.group_subsample(
        labels,
        groups,
        num_groups=4,
        num_per_group=num_per_group,
        positive_fraction=positive_fraction,
        method=method,
        losses=losses,
        seed=seed,
    )
    drawn = sampled >= 0
    assert torch.equal(sampled[drawn], labels[drawn])
    assert not drawn[(groups < 0) | (groups >= 4) | (labels < 0) | (labels > 1)].any()
    for group in range(4):
        num_pos, num_neg = (int(((labels == label) & (groups == group)).sum()) for label in (1, 0))
        if method == "ohem_all":
            assert int(drawn[groups == group].sum()) == min(num_pos + num_neg, num_per_group)
            continue
        want_pos = min(num_pos, int(num_per_group * positive_fraction))
        want_neg = min(num_neg, num_per_group - want_pos)
        assert int((sampled[groups == group] == 1).sum()) == want_pos
        assert int((sampled[groups == group] == 0).sum()) == want_neg


def test_philox_known_answers():
    """Vectors published with the generator (Random123, philox4x32-10)."""
    ones, pi = 0xFFFFFFFF, ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0))
    for counter, key, expected in (
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (*pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        words = reference.philox4x32_10([torch.tensor([c]) for c in counter], key)
        assert [int(w) for w in words] == expected


def test_neg_log_uniform_is_accurate():
    """Relative error of the log at both ends and in between; the kernels equal this reference bit for bit."""
    generator = torch.Generator().manual_seed(0)
    edges = [d for s in range(32) for d in ((1 << s) - 1, 1 << s, (1 << s) + 1)] + [2**32 - 1 - d for d in range(200)]
    bits = torch.cat([torch.tensor(edges), torch.randint(0, 2**32, (20000,), generator=generator)]).clamp(max=2**32 - 1)
    exact = torch.tensor([-math.log1p((2 * b + 1 - 2**33) / 2**33) for b in bits.tolist()], dtype=torch.float64)
    error = ((reference.neg_log_uniform(bits).double() - exact) / exact).abs().max()
    assert error < 1.7e-7


def test_wrs_follows_exact_successive_sampling():
    """Weighted reservoir sampling draws without replacement, each time in proportion to loss + eps (Efraimidis).

    Chi-square of how often each anchor is drawn against exact inclusion probabilities, for losses from 1e-6 to 1e3.
    """
    from scipy.stats import chi2

    losses = torch.tensor([1e-6, 1e-4, 1e-3, 0.01, 0.05, 0.2, 1.0, 3.0, 30.0, 1000.0])
    weights = (losses.double() + 1e-6).tolist()
    n, k, draws = len(weights), 4, 20000

    def inclusion(remaining, picks):
        """Probability that each anchor is among the next `picks`, by enumeration."""
        if picks == 0:
            return {}
        total = sum(weights[i] for i in remaining)
        probability = dict.fromkeys(remaining, 0.0)
        for i in remaining:
            p = weights[i] / total
            probability[i] += p
            for j, q in inclusion([r for r in remaining if r != i], picks - 1).items():
                probability[j] += p * q
        return probability

    expected = inclusion(list(range(n)), k)
    # One image per draw, in one call.
    labels = torch.zeros(draws, n, dtype=torch.int8)
    sampled = ops.group_subsample(
        labels,
        torch.zeros(n, dtype=torch.int64),
        num_groups=1,
        num_per_group=k,
        method="wrs",
        losses=losses.expand(draws, n).contiguous(),
        seed=11,
    )
    counts = (sampled == 0).sum(dim=0).tolist()
    assert sum(counts) == k * draws
    # Each anchor's count is binomial; rare ones are compared together with their exact total.
    statistic, degrees = 0.0, 0
    for i in range(n):
        p = expected[i]
        if draws * p * (1 - p) > 10:
            statistic += (counts[i] - draws * p) ** 2 / (draws * p * (1 - p))
            degrees += 1
    assert degrees >= 5
    assert statistic < chi2.ppf(1 - 1e-4, degrees)


def test_random_is_uniform():
    from scipy.stats import chi2

    n, k, draws = 20, 5, 20000
    sampled = ops.group_subsample(
        torch.zeros(draws, n, dtype=torch.int8),
        torch.zeros(n, dtype=torch.int64),
        num_groups=1,
        num_per_group=k,
        seed=3,
    )
    counts = (sampled == 0).sum(dim=0).double()
    expected = draws * k / n
    statistic = float(((counts - expected) ** 2 / (expected * (1 - k / n))).sum())
    assert statistic < chi2.ppf(1 - 1e-4, n)


def test_wrs_does_not_favour_low_indices_at_tiny_losses():
    """The literal r^(1/l) underflows to 0 there and its ties keep the first anchors; the log-domain key must not."""
    n, k = 4000, 500
    sampled = ops.group_subsample(
        torch.zeros(n, dtype=torch.int8),
        torch.zeros(n, dtype=torch.int64),
        num_groups=1,
        num_per_group=k,
        method="wrs",
        losses=torch.full((n,), 1e-5),
        seed=1,
    )
    first_half = int((sampled[: n // 2] == 0).sum())
    assert abs(first_half - k / 2) < 5 * math.sqrt(k / 4)


def test_ohem_takes_the_hardest_and_the_first_of_equals():
    losses = torch.tensor([0.5, 2.0, 2.0, float("nan"), 2.0, 0.1])
    sampled = ops.group_subsample(
        torch.zeros(6, dtype=torch.int8),
        torch.zeros(6, dtype=torch.int64),
        num_groups=1,
        num_per_group=2,
        method="ohem",
        losses=losses,
    )
    assert sampled.tolist() == [-1, 0, 0, -1, -1, -1]


def test_ohem_all_takes_the_hardest_of_both_labels(device):
    labels = torch.tensor([1, 0, 1, 1, 0, 0, -1, 1, 0], dtype=torch.int8, device=device)
    losses = torch.tensor([0.9, 0.3, 0.5, 0.5, 0.5, 0.1, 9.0, 0.7, 9.0], device=device)
    groups = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 5], device=device)

    def draw(num_per_group, positive_fraction=0.25):
        return ops.group_subsample(
            labels,
            groups,
            num_groups=2,
            num_per_group=num_per_group,
            positive_fraction=positive_fraction,
            method="ohem_all",
            losses=losses,
        ).tolist()

    assert draw(2) == [1, -1, -1, -1, -1, -1, -1, 1, -1]  # two positives, though a quarter of 2 is none
    assert draw(3) == [1, -1, 1, -1, -1, -1, -1, 1, -1]  # of equal losses the lowest index
    assert draw(5) == [1, -1, 1, 1, 0, -1, -1, 1, -1]
    assert draw(7) == draw(2**31 - 1) == [1, 0, 1, 1, 0, 0, -1, 1, -1]
    assert draw(3, 0.0) == draw(3, 1.0) == draw(3)
    assert draw(0) == [-1] * 9


@settings(max_examples=150, deadline=None)
@given(
    anchors=st.lists(st.tuples(st.integers(-2, 2), st.integers(-1, 3), st.integers(0, 6)), max_size=200),
    num_per_group=st.integers(0, 60),
)
def test_no_anchor_left_beats_one_that_ohem_all_took(anchors, num_per_group):
    """In (loss, lowest index), among both labels of a group."""
    labels, groups, losses = (torch.tensor([a[k] for a in anchors]) for k in range(3))
    sampled = ops.group_subsample(
        labels.to(torch.int8),
        groups.long(),
        num_groups=3,
        num_per_group=num_per_group,
        method="ohem_all",
        losses=losses.float(),
    )
    for group in range(3):
        ranked = sorted((-loss, i) for i, (label, g, loss) in enumerate(anchors) if g == group and label in (0, 1))
        expected = {i for _, i in ranked[:num_per_group]}
        assert {i for i in range(len(anchors)) if anchors[i][1] == group and sampled[i] >= 0} == expected
        assert all(sampled[i] == anchors[i][0] for i in expected)


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_image_by_image(device, method):
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(-1, 2, (3, 2500), generator=generator, dtype=torch.int8).to(device)
    groups = torch.randint(0, 4, (3, 2500), generator=generator).to(device)
    losses = None if method == "random" else torch.rand(3, 2500, generator=generator).to(device)
    arguments = dict(num_groups=4, num_per_group=100, method=method, seed=5)
    for group_idxs in (groups, groups[0]):
        batch = ops.group_subsample(labels, group_idxs, losses=losses, **arguments)
        for b in range(3):
            alone = ops.group_subsample(
                labels[b],
                group_idxs[b] if group_idxs.dim() == 2 else group_idxs,
                losses=None if losses is None else losses[b],
                first_image=b,
                **arguments,
            )
            assert torch.equal(batch[b], alone)


def test_seeds(device):
    labels = torch.zeros(3000, dtype=torch.int8, device=device)
    groups = torch.zeros(3000, dtype=torch.int64, device=device)

    def draw(seed):
        return ops.group_subsample(labels, groups, num_groups=1, num_per_group=300, seed=seed)

    assert torch.equal(draw(7), draw(7))
    assert torch.equal(draw(7), draw(torch.tensor(7, device=device)))
    assert not torch.equal(draw(7), draw(8))
    assert not torch.equal(draw(-(2**63)), draw(2**63 - 1))
    torch.manual_seed(0)
    first, second = draw(None), draw(None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, draw(None))


def test_losses_with_a_gradient_are_taken_as_numbers():
    losses = torch.rand(50, requires_grad=True)
    sampled = ops.group_subsample(
        torch.zeros(50, dtype=torch.int8),
        torch.zeros(50, dtype=torch.int64),
        num_groups=1,
        num_per_group=5,
        method="wrs",
        losses=losses,
    )
    assert not sampled.requires_grad


LABELS, GROUPS = torch.zeros(5, dtype=torch.int8), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match_labels": LABELS.long()}, "match_labels must be int8, got torch.int64"),
        ({"match_labels": LABELS[None, None]}, r"match_labels must have shape \(N,\) or \(B, N\), got \(1, 1, 5\)"),
        ({"group_idxs": GROUPS.int()}, "group_idxs must be int64, got torch.int32"),
        ({"group_idxs": GROUPS[:4]}, r"group_idxs must have shape \(5,\) or that of match_labels, got \(4,\)"),
        ({"num_groups": 0}, r"num_groups must be in \[1, 1024\], got 0"),
        ({"num_per_group": -1}, r"num_per_group must be in \[0, 2\^31\), got -1"),
        ({"positive_fraction": 1.1}, r"positive_fraction must be in \[0, 1\], got 1.1"),
        ({"positive_fraction": float("nan")}, r"positive_fraction must be in \[0, 1\], got nan"),
        ({"first_image": -1}, r"first_image must be in \[0, 2147483646\], got -1"),
        ({"first_image": 2**31 - 1}, r"first_image must be in \[0, 2147483646\], got 2147483647"),
        ({"first_image": 2**63 - 1}, r"first_image must be in \[0, 2147483646\], got 9223372036854775807"),
        ({"method": "wrs"}, "losses must be given for wrs, ohem and ohem_all, and only for them, got none"),
        ({"method": "ohem_all"}, "losses must be given for wrs, ohem and ohem_all, and only for them, got none"),
        (
            {"losses": torch.ones(5)},
            "losses must be given for wrs, ohem and ohem_all, and only for them, got losses for random",
        ),
        ({"method": "wrs", "losses": torch.ones(4)}, r"losses must have the shape of match_labels, \(5,\), got \(4,\)"),
        ({"method": "ohem", "losses": torch.ones(5, dtype=torch.int64)}, "losses must be float32, got torch.int64"),
        ({"seed": torch.tensor([1])}, r"seed must be an int or a 0-dim int64 tensor, got shape \(1,\)"),
        ({"seed": torch.tensor(1.0)}, "seed must be int64, got torch.float32"),
    ],
)
def test_errors(changes, message):
    arguments = {"match_labels": LABELS, "group_idxs": GROUPS, "num_groups": 1, "num_per_group": 2, **changes}
    with pytest.raises(RuntimeError, match=f"^group_subsample: {message}"):
        ops.group_subsample(arguments.pop("match_labels"), arguments.pop("group_idxs"), **arguments)


def test_value_errors():
    with pytest.raises(
        ValueError, match=r"^group_subsample: method must be one of random, wrs, ohem, ohem_all, got 'focal'"
    ):
        ops.group_subsample(LABELS, GROUPS, num_groups=1, num_per_group=1, method="focal")
    with pytest.raises(ValueError, match=r"^group_subsample: seed must fit int64, got 9223372036854775808"):
        ops.group_subsample(LABELS, GROUPS, num_groups=1, num_per_group=1, seed=2**63)
