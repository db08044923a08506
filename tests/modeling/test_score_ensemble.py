"""Logits of scores against probabilities in float64, where they differ long after float32 rounds them to 1."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_d2.modeling.score_ensemble import ENSEMBLES, class_logits


def logit(p: float, rest: float) -> float:
    return math.log(p) - math.log(rest)


def p_and_rest(x: float) -> tuple[float, float]:
    return 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))


def literal(kind, first, second):
    (p1, rest1), (p2, rest2) = p_and_rest(first), p_and_rest(second)
    if kind == "arithmetic":
        return logit((p1 + p2) / 2, (rest1 + rest2) / 2)
    log_p = (math.log1p(-rest1) + math.log1p(-rest2)) / 2 if p1 > 0.5 and p2 > 0.5 else math.log(p1 * p2) / 2
    return log_p - math.log(-math.expm1(log_p))


@settings(max_examples=200, deadline=None)
@given(st.floats(-60, 60, width=32), st.floats(-60, 60, width=32), st.sampled_from(["arithmetic", "geometric"]))
def test_ensemble_is_the_logit_of_the_mean(first, second, kind):
    found = ENSEMBLES[kind](torch.tensor([first]), torch.tensor([second]))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(literal(kind, first, second), rel=1e-4, abs=1e-5)
    assert float(ENSEMBLES["none"](torch.tensor([first]), torch.tensor([second]))) == second


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_the_order_of_scores_that_round_to_1_is_kept(kind):
    first, second = torch.tensor([18.0, 20, 25, 30]), torch.tensor([19.0, 18, 40, 41])
    logits = ENSEMBLES[kind](first[:, None], second[None])
    assert (logits.sigmoid() == 1).all()
    assert (logits[1:] > logits[:-1]).all(), "a higher score of the first stage"
    assert logits[0].argsort()[:2].tolist() == [1, 0] and (logits[0, 2:] > logits[0, 0]).all(), "or of the second"


def test_of_several_classes_the_geometric_mean_rules_out_what_the_second_stage_does():
    """Objectness speaks for all classes: its arithmetic mean would give a class of probability 0 half its score."""
    first, second = torch.tensor([[0.9], [0.6]]).logit(), torch.tensor([[1e-12, 0.9], [0.5, 0.1]]).logit()
    arithmetic, geometric = (ENSEMBLES[name](first, second).sigmoid() for name in ("arithmetic", "geometric"))
    assert arithmetic[0, 0] > 0.4 and geometric[0, 0] < 1e-5
    assert geometric[:, 0].argmax() == 1 and geometric[:, 1].argmax() == 0
    torch.testing.assert_close(geometric[1, 0], torch.tensor(0.3).sqrt())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=6))
def test_class_logits_are_those_of_softmax(row):
    found = class_logits(torch.tensor([row]))[0]
    assert found.shape == (len(row) - 1,)
    exact = [math.exp(x) for x in row]
    for k, value in enumerate(found.tolist()):
        rest = sum(exact[:k] + exact[k + 1 :])
        assert value == pytest.approx(logit(exact[k], rest), rel=1e-5, abs=2e-5)


def test_no_box_and_no_class_apart():
    assert class_logits(torch.zeros(0, 3)).shape == (0, 2)
    assert torch.allclose(class_logits(torch.tensor([[30.0, -5.0]])), torch.tensor([[35.0]]))
