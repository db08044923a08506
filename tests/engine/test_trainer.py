"""Trainer: settings of the solver that are refused, and what of it others may replace."""

import pytest
from runs import small_config

from gs_d2.config import check_training
from gs_d2.engine import Trainer


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.GS.ACCUMULATION_STEPS", 0), r"SOLVER\.GS\.ACCUMULATION_STEPS must be at least 1, got 0"),
        (("SOLVER.GS.NONFINITE_LOSS", "ignore"), r"SOLVER\.GS\.NONFINITE_LOSS must be stop or skip, got 'ignore'"),
        (("SOLVER.AMP.ENABLED", True), r"SOLVER\.AMP\.ENABLED needs a GPU, and MODEL\.DEVICE is cpu"),
        (
            ("SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cuda", "MODEL.GS.AUTOCAST_DTYPE", "bfloat16"),
            r"SOLVER\.AMP\.ENABLED trains in float16 and MODEL\.GS\.AUTOCAST_DTYPE bfloat16 in bfloat16",
        ),
        (("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"), r"set it to TrainingSampler"),
    ],
)
def test_settings_that_cannot_train_are_refused(drawn_datasets, tmp_path, opts, message):
    cfg = small_config(drawn_datasets, tmp_path, *opts)
    with pytest.raises(ValueError, match=message):
        Trainer(cfg)


def test_amp_with_the_same_format_at_test_is_no_contradiction(drawn_datasets, tmp_path):
    opts = ("SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cuda", "MODEL.GS.AUTOCAST_DTYPE")
    for dtype in ("float16", ""):
        check_training(small_config(drawn_datasets, tmp_path, *opts, dtype))


def test_any_iterable_can_be_the_train_loader(drawn_datasets, tmp_path):
    class Own(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            loader = iter(super().build_train_loader(cfg))
            return [next(loader) for _ in range(2)]

    trainer = Own(small_config(drawn_datasets, tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()))
    trainer.train()
    assert trainer.iter == 2
