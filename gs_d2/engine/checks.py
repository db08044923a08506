"""Whether a config can train the method: what of it breaks its detector, or contradicts itself."""

import math

from gs_d2.config import check_pyramid
from gs_d2.engine.schedule import FLAT_DECAY
from gs_d2.modeling import description_of


def check_config(cfg):
    """Refuses Detectron2 defaults that silently break the config's detector, and contradictory settings.

    Raises:
        ValueError: naming every such key, its value and what to set. MODEL.GS.CHECK_DEFAULTS False allows the defaults.
    """
    if cfg.TEST.GS.PYRAMID:
        check_pyramid(cfg)
    if not cfg.MODEL.GS.CHECK_DEFAULTS:
        return
    detector = description_of(cfg.MODEL.META_ARCHITECTURE)
    contradictions = detector.contradictions(cfg)
    if contradictions:
        raise ValueError("\n".join(contradictions))
    on_coco = any(name.startswith("coco") for name in cfg.DATASETS.TRAIN)
    broken = [
        f"  {row.key} is Detectron2's default {row.default}: {row.reason}"
        for row in detector.breaking_defaults(cfg)
        if _value(cfg, row.key) == row.default and not (on_coco and row.right_for_coco)
    ]
    if broken:
        raise ValueError(
            "This config keeps Detectron2 defaults that break group sampling:\n"
            + "\n".join(broken)
            + "\nStart from configs/Base-WIDER.yaml, for COCO from configs/Base-COCO.yaml, or set "
            "MODEL.GS.CHECK_DEFAULTS False to keep them on purpose."
        )


def _value(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return list(cfg) if isinstance(cfg, (list, tuple)) else cfg


def check_training(cfg):
    """Refuses settings of the solver that contradict each other or have no meaning.

    Raises:
        ValueError: naming the key, its value and what to set.
    """
    gs = cfg.SOLVER.GS
    if gs.ACCUMULATION_STEPS < 1:
        raise ValueError(f"SOLVER.GS.ACCUMULATION_STEPS must be at least 1, got {gs.ACCUMULATION_STEPS}")
    if gs.OPTIMIZER not in ("sgd", "adamw"):
        raise ValueError(f"SOLVER.GS.OPTIMIZER must be sgd or adamw, got {gs.OPTIMIZER!r}")
    if not 0 < gs.BACKBONE_MULTIPLIER < math.inf:
        raise ValueError(f"SOLVER.GS.BACKBONE_MULTIPLIER must be positive, got {gs.BACKBONE_MULTIPLIER}")
    if gs.NONFINITE_LOSS not in ("stop", "skip"):
        raise ValueError(f"SOLVER.GS.NONFINITE_LOSS must be stop or skip, got {gs.NONFINITE_LOSS!r}")
    _check_schedule(cfg)
    if cfg.TEST.GS.PERIODIC_IMAGES < 0:
        raise ValueError(
            f"TEST.GS.PERIODIC_IMAGES must be a number of images, or 0 for all, got {cfg.TEST.GS.PERIODIC_IMAGES}"
        )
    if not 0 <= gs.EMA_DECAY < 1:
        raise ValueError(f"SOLVER.GS.EMA_DECAY must be at least 0 and below 1, got {gs.EMA_DECAY}")
    if gs.EMA_DECAY > 0 and cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError(
            f"SOLVER.GS.EMA_DECAY {gs.EMA_DECAY} evaluates averaged weights, and TEST.PRECISE_BN.ENABLED computes the "
            "statistics of those that are trained: set TEST.PRECISE_BN.ENABLED False"
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.GS.AUTOCAST_DTYPE == "bfloat16":
        raise ValueError(
            "SOLVER.AMP.ENABLED trains in float16 and MODEL.GS.AUTOCAST_DTYPE bfloat16 in bfloat16: "
            'set SOLVER.AMP.ENABLED False, or MODEL.GS.AUTOCAST_DTYPE ""'
        )
    if cfg.MODEL.GS.AUTOCAST_DTYPE == "float16" and not cfg.SOLVER.AMP.ENABLED:
        raise ValueError(
            "MODEL.GS.AUTOCAST_DTYPE float16 trains without scaling the loss, so that small gradients vanish: "
            "set SOLVER.AMP.ENABLED True as well on a GPU, or MODEL.GS.AUTOCAST_DTYPE bfloat16"
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise ValueError(
            "SOLVER.AMP.ENABLED needs a GPU, and MODEL.DEVICE is cpu: "
            "set SOLVER.AMP.ENABLED False and, if wanted, MODEL.GS.AUTOCAST_DTYPE bfloat16"
        )


def _check_schedule(cfg):
    solver, decay_iters = cfg.SOLVER, cfg.SOLVER.GS.DECAY_ITERS
    if solver.LR_SCHEDULER_NAME != FLAT_DECAY:
        if decay_iters != 0:
            raise ValueError(
                f"SOLVER.GS.DECAY_ITERS {decay_iters} does nothing in {solver.LR_SCHEDULER_NAME}: "
                f"set SOLVER.LR_SCHEDULER_NAME {FLAT_DECAY}, or DECAY_ITERS 0"
            )
        return
    if decay_iters < 1:
        raise ValueError(f"SOLVER.GS.DECAY_ITERS must be at least 1 with {FLAT_DECAY}, got {decay_iters}")
    if solver.WARMUP_ITERS + decay_iters > solver.MAX_ITER:
        raise ValueError(
            f"SOLVER.MAX_ITER {solver.MAX_ITER} has no room for SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} and "
            f"SOLVER.GS.DECAY_ITERS {decay_iters}: lower them, or raise MAX_ITER"
        )
