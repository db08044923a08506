"""How a run continues from a checkpoint that another number of processes, batch, rate or length wrote."""

import logging
import math
import os
from dataclasses import asdict, dataclass

from detectron2.solver import LRMultiplier
from detectron2.utils import comm

from gs_d2.engine.schedule import FLAT_DECAY

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """What of a run its checkpoints hold, so that another can continue from them.

    Attributes:
        world_size: processes.
        reference_world_size: SOLVER.REFERENCE_WORLD_SIZE as the config has it; 0 where nothing was scaled.
        ims_per_batch, max_iter, base_lr: of SOLVER, scaled to the processes.
        accumulation_steps, weight_decay: SOLVER.GS.ACCUMULATION_STEPS, SOLVER.WEIGHT_DECAY.
        seed: SEED, or the one chosen in its place.
        optimizer: SOLVER.GS.OPTIMIZER; "" in checkpoints that do not say.
        backbone_multiplier: SOLVER.GS.BACKBONE_MULTIPLIER; None in checkpoints that do not say.
    """

    world_size: int
    reference_world_size: int
    ims_per_batch: int
    accumulation_steps: int
    max_iter: int
    base_lr: float
    weight_decay: float
    seed: int
    optimizer: str = ""
    backbone_multiplier: float | None = None

    @classmethod
    def of(cls, cfg, reference_world_size: int) -> "RunSettings":
        """
        Args:
            cfg: scaled to the processes.
            reference_world_size: before it was.
        """
        solver = cfg.SOLVER
        return cls(
            world_size=comm.get_world_size(),
            reference_world_size=reference_world_size,
            ims_per_batch=solver.IMS_PER_BATCH,
            accumulation_steps=solver.GS.ACCUMULATION_STEPS,
            max_iter=solver.MAX_ITER,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            seed=cfg.SEED,
            optimizer=solver.GS.OPTIMIZER,
            backbone_multiplier=solver.GS.BACKBONE_MULTIPLIER,
        )

    @property
    def images_per_step(self) -> int:
        """The effective batch: images of all processes in one step of the optimizer."""
        return self.ims_per_batch * self.accumulation_steps

    @property
    def _scale(self) -> tuple[int, int]:
        """The fraction by which SOLVER.REFERENCE_WORLD_SIZE has scaled the batch and the rate."""
        return (self.world_size, self.reference_world_size) if self.reference_world_size else (1, 1)

    def is_paced_as(self, other: "RunSettings") -> bool:
        """Whether rate and length are scaled to its batch as the other's are, so that one can become the other."""
        (ours, ours_of), (theirs, theirs_of) = self._scale, other._scale
        return self.images_per_step * ours_of * theirs == other.images_per_step * theirs_of * ours

    def rate_by(self, other: "RunSettings") -> float:
        """The other's base rate, at this run's scale."""
        (ours, ours_of), (theirs, theirs_of) = self._scale, other._scale
        return other.base_lr * (ours * theirs_of) / (ours_of * theirs)

    def __str__(self):
        return (
            f"{self.images_per_step} images a step ({self.world_size} processes, SOLVER.IMS_PER_BATCH "
            f"{self.ims_per_batch} of all together, SOLVER.GS.ACCUMULATION_STEPS {self.accumulation_steps})"
        )


def iterations_done(before: RunSettings, now: RunSettings, done: int) -> int:
    """The number of this run's iterations that see the images of the checkpoint's `done`; a part of one is left out.

    Raises:
        ValueError: the effective batch is another though rate and length are not scaled with it; or the checkpoint is
            beyond SOLVER.MAX_ITER.
    """
    if not now.is_paced_as(before):
        raise ValueError(
            f"--resume: the checkpoint was trained with {before}, and this run has {now}, while its rate and length "
            f"are not scaled to that. {_way_to_keep(before, now)} To train with another batch on purpose, begin with "
            "the weights alone: MODEL.WEIGHTS path/to/checkpoint.pth without --resume"
        )
    images, per_step = done * before.images_per_step, now.images_per_step
    converted = images // per_step
    beyond = images - now.max_iter * per_step
    if beyond > 0 and before.images_per_step != per_step and beyond < max(before.images_per_step, per_step):
        converted = now.max_iter  # one of the lengths was rounded
    elif beyond > 0:
        raise ValueError(
            f"--resume: the checkpoint has {done} iterations of {before.images_per_step} images, which are "
            f"{converted} of this run's, and SOLVER.MAX_ITER is {now.max_iter}: raise it, or resume from an earlier "
            "checkpoint"
        )
    if per_step != before.images_per_step:
        repeated = images - converted * per_step
        _logger.warning(
            f"The checkpoint was trained with {before}, and this run has {now}. Its {done} iterations of "
            f"{before.max_iter} are {converted} of {now.max_iter} here; the rate is "
            f"{now.base_lr / before.base_lr if before.base_lr else 1:g} times what it was"
            + (f". {repeated} images are seen again" if repeated > 0 else "")
        )
    return converted


def _way_to_keep(before: RunSettings, now: RunSettings) -> str:
    if before.reference_world_size:
        ims_per_batch = before.ims_per_batch * before.reference_world_size // before.world_size
        return (
            f"Leave SOLVER.REFERENCE_WORLD_SIZE {before.reference_world_size}, SOLVER.IMS_PER_BATCH {ims_per_batch} "
            f"and SOLVER.GS.ACCUMULATION_STEPS {before.accumulation_steps} as they were, and all is converted to the "
            f"{now.world_size} processes."
        )
    batch = before.images_per_step
    for steps in range(batch // now.world_size, 0, -1):  # as few images at once as now
        if batch % steps == 0 and batch // steps % now.world_size == 0 and batch // steps >= now.ims_per_batch:
            return (
                f"To keep the batch: SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.IMS_PER_BATCH {batch // steps} "
                f"SOLVER.GS.ACCUMULATION_STEPS {steps}."
            )
    return f"To keep the batch, train with a number of processes that divides {batch}."


def report_changes(before: RunSettings, now: RunSettings, scheduler):
    """Logs what this run's config sets otherwise than the checkpoint's run, and that it counts from now on."""
    changes = []
    expected = now.rate_by(before)
    if not math.isclose(now.base_lr, expected, rel_tol=1e-9):
        kept = "" if isinstance(scheduler, LRMultiplier) else f"; {type(scheduler).__name__} keeps to that"
        changes.append(f"SOLVER.BASE_LR {now.base_lr:g} (before {expected:g}{kept})")
    if now.weight_decay != before.weight_decay:
        changes.append(f"SOLVER.WEIGHT_DECAY {now.weight_decay:g} (before {before.weight_decay:g})")
    if before.backbone_multiplier not in (None, now.backbone_multiplier):
        changes.append(
            f"SOLVER.GS.BACKBONE_MULTIPLIER {now.backbone_multiplier:g} (before {before.backbone_multiplier:g})"
        )
    if now.seed != before.seed:
        changes.append(f"SEED {now.seed} (before {before.seed}), so that images and samples come in another order")
    if changes:
        _logger.warning(f"From here on, otherwise than before the checkpoint: {'; '.join(changes)}")


def resume_rate(cfg, scheduler, base_lrs: list[float], done: int, *, compare: bool):
    """Sets the rates of the next iteration by this run's config; the checkpoint's are by that of its own run.

    Only Detectron2's LRMultiplier can say what they are; other schedulers continue as the checkpoint has them.

    Args:
        scheduler: that has loaded the checkpoint's state, as has its optimizer.
        base_lrs: of the scheduler before it had.
        done: iterations of this run that the checkpoint stands for.
        compare: warn if the schedule was another one in the checkpoint's run.
    """
    if not isinstance(scheduler, LRMultiplier):
        return
    groups = scheduler.optimizer.param_groups
    before = _factor(groups[0])
    scheduler.base_lrs, scheduler.last_epoch = base_lrs, done
    scheduler._last_lr = scheduler.get_lr()
    for group, base_lr, rate in zip(groups, base_lrs, scheduler._last_lr, strict=True):
        group["initial_lr"], group["lr"] = base_lr, rate
    if cfg.SOLVER.LR_SCHEDULER_NAME == FLAT_DECAY and compare:
        _warn_of_decay(cfg, before, _factor(groups[0]), done)


def _factor(group: dict) -> float:
    """Of the base rate."""
    return group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0


def _warn_of_decay(cfg, before: float, now: float, done: int):
    """Of a length that the checkpoint's place in its own run does not go with.

    Args:
        before, now: factors of the base rate, in the checkpoint's run and in this one.
    """
    solver, decay_iters = cfg.SOLVER, cfg.SOLVER.GS.DECAY_ITERS
    if math.isclose(before, now, rel_tol=1e-9):
        return
    if before < now and done >= solver.WARMUP_ITERS:
        _logger.warning(
            f"The checkpoint after {done} iterations lies inside the decay of the run that wrote it: its rate was "
            f"{before:.3g} of the full one. It now continues at {now:.3g} of it, and is not what a run of "
            f"SOLVER.MAX_ITER {solver.MAX_ITER} would have been. For that resume from an earlier checkpoint: "
            f"write its name into {os.path.join(cfg.OUTPUT_DIR, 'last_checkpoint')}"
        )
    elif before > now:
        _logger.warning(
            f"The rate falls at once from {before:.3g} to {now:.3g} of the full one, since SOLVER.MAX_ITER "
            f"{solver.MAX_ITER} leaves {solver.MAX_ITER - done} iterations of the decay's {decay_iters}: set "
            f"SOLVER.MAX_ITER {done + decay_iters} for all of it"
        )


def check_optimizer(before: RunSettings, now: RunSettings):
    """
    Raises:
        ValueError: the checkpoint holds the state of another optimizer.
    """
    if before.optimizer and before.optimizer != now.optimizer:
        raise ValueError(
            f"--resume: the checkpoint has the state of SOLVER.GS.OPTIMIZER {before.optimizer}, and this run has "
            f"{now.optimizer}: set it to {before.optimizer}, or begin with the weights alone: MODEL.WEIGHTS "
            "path/to/checkpoint.pth without --resume"
        )


def state_of(settings: RunSettings, done: int) -> dict:
    """For a checkpoint after `done` iterations. `images_seen` tells :class:`gs_d2.checkpoint.Checkpointer` which of
    several checkpoints is the furthest: their iterations may be of different batches."""
    return {**asdict(settings), "images_seen": done * settings.images_per_step}


def settings_of(state: dict | None) -> RunSettings | None:
    """What :func:`state_of` gave; None, with a warning, of a checkpoint without it."""
    if state is None:
        _logger.warning(
            "The checkpoint does not say with how many processes and which batch it was trained (it is older than "
            "that): resume it with the same"
        )
        return None
    return RunSettings(**{key: value for key, value in state.items() if key != "images_seen"})
