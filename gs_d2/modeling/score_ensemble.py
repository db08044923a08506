"""The score of a box from both stages, as a logit: probabilities near 1 all round to it, their logits keep their order.

The logit of a probability p is log(p / (1 - p)); above 17 its sigmoid is exactly 1 in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def class_logits(logits: Tensor) -> Tensor:
    """The logits of the probabilities that a softmax gives.

    Args:
        logits (float32 Tensor[S, K + 1]): the softmax's, background last; finite.

    Returns:
        float32 Tensor[S, K]: of each class but background.
    """
    log_p = logits.log_softmax(dim=1)
    log_rest = torch.log1p(-log_p.exp())
    # What is left beside a probability near 1 is lost in 1 - p: the sum of the others keeps it.
    best = log_p.argmax(dim=1, keepdim=True)
    log_rest.scatter_(1, best, log_p.scatter(1, best, -math.inf).logsumexp(dim=1, keepdim=True))
    return (log_p - log_rest)[:, :-1]


def _arithmetic(first: Tensor, second: Tensor) -> Tensor:
    log_p = torch.logaddexp(F.logsigmoid(first), F.logsigmoid(second))
    return log_p - torch.logaddexp(F.logsigmoid(-first), F.logsigmoid(-second))


def _geometric(first: Tensor, second: Tensor) -> Tensor:
    log_p = (F.logsigmoid(first) + F.logsigmoid(second)) / 2
    return log_p - (-torch.expm1(log_p)).log()


ENSEMBLES = {
    "arithmetic": _arithmetic,
    "geometric": _geometric,
    "none": lambda first, second: second.clone(),
}
"""Of the first stage's logits and the second's, which broadcast: the logit of the arithmetic or geometric mean of their
probabilities, or the second's."""
