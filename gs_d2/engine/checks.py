"""Whether a config can train the method: what of it breaks its detector, does nothing, or contradicts itself."""

import logging
import math
from fnmatch import fnmatchcase

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog

from gs_d2.config import add_gs_config, check_pyramid
from gs_d2.engine.schedule import FLAT_DECAY
from gs_d2.engine.value_checks import check_values
from gs_d2.modeling import description_of
from gs_d2.unread_keys import OF_TRAINER

_logger = logging.getLogger(__name__)


def check_config(cfg, training: bool = True):
    """Refuses values out of range, what silently breaks the config's detector or does nothing in it, and contradictory
    settings.

    Args:
        training: False leaves out what has no meaning at test.

    Raises:
        ValueError: naming every such key, its value and what to set. Detectron2 defaults that break the detector are
            allowed by MODEL.GS.KEEP_DEFAULTS.
    """
    check_values(dict(leaves(cfg)), training)
    if cfg.TEST.GS.PYRAMID:
        check_pyramid(cfg)
    detector = description_of(cfg.MODEL.META_ARCHITECTURE)
    contradictions = detector.contradictions(cfg, training)
    if contradictions:
        raise ValueError("\n".join(contradictions))
    _check_unread(cfg, {**OF_TRAINER, **detector.unread_keys(cfg)})
    _check_defaults(cfg, [row for row in detector.breaking_defaults(cfg) if training or not row.training_only])


def _check_unread(cfg, unread):
    default = get_cfg()
    add_gs_config(default)
    default, found = dict(leaves(default)), []
    for key, value in leaves(cfg):
        if value != default.get(key, value):
            hints = [hint for pattern, hint in unread.items() if fnmatchcase(key, pattern)]
            found += [f"  {key} {value!r}: {hint}" for hint in hints]
    if found:
        raise ValueError(
            f"This config sets keys that do nothing in {cfg.MODEL.META_ARCHITECTURE}, as it is trained and tested "
            "here:\n" + "\n".join(found) + "\nLeave them at their defaults."
        )


def _check_defaults(cfg, rows):
    on_coco = any(name.startswith("coco") for name in cfg.DATASETS.TRAIN)
    values, kept = dict(leaves(cfg)), cfg.MODEL.GS.KEEP_DEFAULTS
    for key in kept:
        if not isinstance(key, str) or key not in values:
            raise ValueError(f"MODEL.GS.KEEP_DEFAULTS names {key!r}, which is no key of the config")
    broken = [
        row
        for row in rows
        if values[row.key] == row.default and row.key not in kept and not (on_coco and row.right_for_coco)
    ]
    if broken:
        lines = [f"  {row.key} is Detectron2's default {row.default}: {row.reason}" for row in broken]
        raise ValueError(
            "This config keeps Detectron2 defaults that break group sampling:\n"
            + "\n".join(lines)
            + "\nStart from configs/Base-WIDER.yaml, for COCO from configs/Base-COCO.yaml; or name those that you keep "
            f'on purpose: MODEL.GS.KEEP_DEFAULTS "{[*kept, *(row.key for row in broken)]}"'
        )


def leaves(cfg, prefix=""):
    """Keys and values; tuples as lists, since a YAML file may have either."""
    for name, value in cfg.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def check_trained_weights(weights: str):
    """Refuses a MODEL.WEIGHTS that cannot be evaluated: none, or those of a backbone that Detectron2's catalog has.

    Raises:
        ValueError: saying what to add to the command.
    """
    what_to_do = "add MODEL.WEIGHTS path/to/model_final.pth to the command"
    if not weights:
        raise ValueError(f"--eval-only needs weights: {what_to_do}")
    if "://ImageNetPretrained/" in weights:
        raise ValueError(f"--eval-only with MODEL.WEIGHTS {weights}, which are a backbone's alone: {what_to_do}")


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
    if gs.KEEP_LAST < 0:
        raise ValueError(f"SOLVER.GS.KEEP_LAST must be a number of checkpoints, or 0 for all, got {gs.KEEP_LAST}")
    reference, ims_per_batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference < 0 or (reference and ims_per_batch % reference):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {ims_per_batch} is for SOLVER.REFERENCE_WORLD_SIZE {reference} processes, which do "
            "not divide it: set IMS_PER_BATCH to a multiple, or REFERENCE_WORLD_SIZE 0 to take the batch as it is"
        )
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


def check_classes(cfg, training: bool = True):
    """Refuses data sets whose classes are not those of the detector; to be called when the data sets are loaded.

    Without it objects of a class beyond NUM_CLASSES would be trained as background, and classes of another order tested
    as each other. A detector that does not tell classes apart takes any data sets.

    Raises:
        ValueError: naming the data set and NUM_CLASSES, or both data sets.
    """
    detector = description_of(cfg.MODEL.META_ARCHITECTURE)
    names = list(cfg.DATASETS.TRAIN) if training else []
    # Evaluators of faces do not ask for classes.
    names += [name for name in cfg.DATASETS.TEST if MetadataCatalog.get(name).get("evaluator_type") == "coco"]
    classes_of = {name: list(MetadataCatalog.get(name).get("thing_classes", [])) for name in names}
    classes_of = {name: classes for name, classes in classes_of.items() if classes}
    key = detector.num_classes_key
    num_classes = dict(leaves(cfg)).get(key)
    for name, classes in classes_of.items():
        if num_classes is not None and len(classes) > num_classes:
            raise ValueError(
                f"{name} has {len(classes)} classes ({_first(classes)}) and {key} is {num_classes}, so that the others "
                f"would be background: set {key} {len(classes)}"
            )
    first = next(iter(classes_of), None)
    for name, classes in classes_of.items():
        if classes == classes_of[first]:
            continue
        said = f"{first} has the classes {_first(classes_of[first])} and {name} has {_first(classes)}"
        if not detector.class_agnostic:
            raise ValueError(f"{said}: a detector that tells classes apart needs the same in the same order")
        if name in cfg.DATASETS.TRAIN:
            _logger.warning(f"{said}: all are trained as one")


def _first(classes: list[str], most: int = 5) -> str:
    return ", ".join(map(str, classes[:most])) + (f", ... ({len(classes)})" if len(classes) > most else "")
