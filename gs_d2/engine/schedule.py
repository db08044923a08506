"""A learning rate that stays flat until a decay of fixed length, so that a run can be extended or ended at any time."""

from fvcore.common.param_scheduler import ParamScheduler

FLAT_DECAY = "WarmupFlatDecayLR"  # SOLVER.LR_SCHEDULER_NAME


class FlatThenDecay(ParamScheduler):
    """Factor of the base rate: warm-up, then 1, and over the last `decay_iters` iterations a line towards 0.

    Iteration i of the decay's n, from 0 on, has the factor (n - i) / n: the first still 1, the last 1 / n. Before the
    decay the factors do not depend on `max_iter`, to the last bit.

    Args:
        max_iter, decay_iters, warmup_iters: lengths, in iterations.
        warmup_factor, warmup_method: SOLVER.WARMUP_FACTOR and WARMUP_METHOD: from this factor on "linear"ly to 1, or
            "constant".
    """

    def __init__(self, *, max_iter: int, decay_iters: int, warmup_iters: int, warmup_factor: float, warmup_method: str):
        if warmup_method not in ("linear", "constant"):
            raise ValueError(f"SOLVER.WARMUP_METHOD must be linear or constant, got {warmup_method!r}")
        self._max_iter, self._decay_iters, self._warmup_iters = max_iter, decay_iters, warmup_iters
        self._warmup_factor, self._is_linear = warmup_factor, warmup_method == "linear"

    def __call__(self, where: float) -> float:
        """
        Args:
            where: iteration / max_iter, as `detectron2.solver.LRMultiplier` gives it.
        """
        iteration = round(where * self._max_iter)
        if iteration < self._warmup_iters:
            done = iteration / self._warmup_iters if self._is_linear else 0.0
            return self._warmup_factor * (1 - done) + done
        return min(1.0, max(0, self._max_iter - iteration) / self._decay_iters)
