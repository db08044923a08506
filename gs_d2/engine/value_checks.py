"""Whether the values of a config can be what their keys mean: numbers in range, names and files that exist."""

import math
from fnmatch import fnmatchcase
from numbers import Real

import torch
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY

from gs_d2.engine.schedule import FLAT_DECAY


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(low, high=math.inf, whole=False, above=False):
    """What numbers may be, alone or in lists: the words for it, and the check of one number."""
    words = "whole numbers" if whole else "numbers"
    words += (
        f" above {low:g}" if above else (f" of {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}")
    )

    def fits(value):
        right = _is_number(value) and (low < value if above else low <= value) and value <= high
        return right and (not whole or value == int(value))

    return words, fits


def _one_of(*names):
    return f"one of {', '.join(map(repr, names))}", lambda value: value in names


_COUNT, _SIZE, _SHARE = _numbers(1, whole=True), _numbers(0, whole=True), _numbers(0, 1)
_FACTOR, _NOT_NEGATIVE = _numbers(0, above=True), _numbers(0)

# Pattern of keys -> what each number or name of it must be. The first that fits counts.
_TRAINING = {
    "SOLVER.MAX_ITER": _COUNT,
    "SOLVER.IMS_PER_BATCH": _COUNT,
    "SOLVER.CHECKPOINT_PERIOD": _COUNT,
    "SOLVER.STEPS": _SIZE,
    "SOLVER.WARMUP_ITERS": _SIZE,
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.WARMUP_METHOD": _one_of("linear", "constant"),
    "SOLVER.LR_SCHEDULER_NAME": _one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", FLAT_DECAY
    ),
    "SOLVER.REFERENCE_WORLD_SIZE": _SIZE,
    "SOLVER.MOMENTUM": _SHARE,
    "SOLVER.BASE_LR": _NOT_NEGATIVE,
    "SOLVER.GAMMA": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "TEST.EVAL_PERIOD": _SIZE,
    "INPUT.MIN_SIZE_TRAIN": _SIZE,
    "INPUT.MAX_SIZE_TRAIN": _COUNT,
    "INPUT.RANDOM_FLIP": _one_of("horizontal", "vertical", "none"),
    "INPUT.GS.SCALES": _FACTOR,
    "INPUT.GS.MAX_CROP_SIZE": _SIZE,
    "INPUT.GS.MIN_FACE_SIZE": _NOT_NEGATIVE,
    "INPUT.GS.FACE_CROP_SCALES": _FACTOR,
    "INPUT.GS.FACE_CROP_SIZE": _COUNT,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _one_of("choice", "range"),
    "MODEL.GS.SECOND_PASS": _one_of("best", "all", "none"),
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.R*.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.RPN.P*_NMS_TOPK_TRAIN": _COUNT,
}
_ALWAYS = {
    "SEED": _numbers(-1, 2**32 - 1, whole=True),
    "DATALOADER.NUM_WORKERS": _SIZE,
    "INPUT.FORMAT": _one_of("RGB", "BGR"),
    "INPUT.MIN_SIZE_TEST": _SIZE,
    "INPUT.MAX_SIZE_TEST": _COUNT,
    "MODEL.PIXEL_STD": _FACTOR,
    "MODEL.ANCHOR_GENERATOR.SIZES": _FACTOR,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _FACTOR,
    "MODEL.RPN.NMS_THRESH": _SHARE,
    "MODEL.RPN.P*_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.IOU_THRESHOLDS": _SHARE,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _SHARE,
    "MODEL.R*.NUM_CLASSES": _COUNT,
    "MODEL.FPN.OUT_CHANNELS": _SIZE,
    "MODEL.FPN.FUSE_TYPE": _one_of("sum", "avg"),
    "MODEL.*.NORM": _one_of("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"),
    "MODEL.GS.*GROUP_SCALES": _FACTOR,
    "MODEL.GS.ANCHOR_STRIDES": _FACTOR,
    "MODEL.GS.GROUP_POST_NMS_TOPK_*": _SIZE,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": _NOT_NEGATIVE,
    "MODEL.RESNETS.DEPTH": _one_of(18, 34, 50, 101, 152),
    "TEST.DETECTIONS_PER_IMAGE": _numbers(-1, whole=True),
    "TEST.GS.SCORE_THRESH": _SHARE,
    "TEST.GS.SCALES": _FACTOR,
    "TEST.GS.MAX_SIZE": _COUNT,
}
_NOT_EMPTY = (
    "INPUT.GS.SCALES",
    "INPUT.GS.FACE_CROP_SCALES",
    "INPUT.MIN_SIZE_TRAIN",
    "TEST.GS.SCALES",
    "MODEL.ANCHOR_GENERATOR.SIZES",
)


def check_values(leaves: dict, training: bool = True):
    """Refuses values that no detector or training can have.

    Args:
        leaves: key, with dots -> value, of all keys of a config.
        training: False leaves out keys that have no meaning at test.

    Raises:
        ValueError: in one line the key, what it must be and what it is.
    """
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        if not all(isinstance(name, str) for name in leaves[key]):
            raise ValueError(f"{key} must be names of data sets, such as ('wider_face_val',), got {leaves[key]!r}")
    rules = {**(_TRAINING if training else {}), **_ALWAYS}
    default = get_cfg()
    for key, value in leaves.items():
        pattern = next((pattern for pattern in rules if fnmatchcase(key, pattern)), None)
        values = list(_flat(value))
        if pattern is not None:
            words, fits = rules[pattern]
            if not all(map(fits, values)) or (key in _NOT_EMPTY and not values):
                one = words if not isinstance(value, (list, tuple)) else f"a list of {words}"
                raise ValueError(f"{key} must be {_singular(one)}, got {value!r}")
        elif isinstance(value, (list, tuple)) and not all(map(_is_number, values)):
            known = list(_flat(_of(default, key)))
            if known and all(map(_is_number, known)):
                raise ValueError(f"{key} must be a list of numbers, got {value!r}")
    if training and list(leaves["SOLVER.STEPS"]) != sorted(leaves["SOLVER.STEPS"]):
        raise ValueError(f"SOLVER.STEPS must rise, got {leaves['SOLVER.STEPS']!r}")
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        if len(leaves[key]) != 3:
            raise ValueError(f"{key} must be three numbers, one for each channel, got {leaves[key]!r}")
    backbone = leaves["MODEL.BACKBONE.NAME"]
    if backbone not in BACKBONE_REGISTRY:
        raise ValueError(f"MODEL.BACKBONE.NAME {backbone!r} is not registered: correct it, or import what registers it")


def check_device(device: str, key: str = "MODEL.DEVICE"):
    """Refuses a device that this machine or torch does not have.

    Args:
        key: what names it, for the message.

    Raises:
        ValueError: in one line the key, the reason and what to do.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        message = f"{key} is {device} and torch sees no GPU. Add {key} cpu to the command"
        raise ValueError(message + (", or use a config of configs/quick." if key == "MODEL.DEVICE" else "."))
    try:
        torch.empty(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no reason"])[0]
        raise ValueError(f"{key} {device!r} cannot be used ({reason}): set {key} cpu, cuda or cuda:0") from error


def _flat(value):
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _singular(words: str) -> str:
    if words.startswith("a list"):
        return words
    return words.replace("whole numbers", "a whole number").replace("numbers", "a number", 1)


def _of(cfg, key):
    for name in key.split("."):
        cfg = cfg.get(name) if isinstance(cfg, dict) else None
    return cfg
