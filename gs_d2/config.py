"""This project's config keys, the only reader of config files, and the check that a config can train the method."""

import io
import math
import os

import yaml

from gs_d2 import compat  # noqa: F401

from detectron2.config import CfgNode as CN  # isort: skip
from detectron2.config import get_cfg  # isort: skip

_MAX_CONFIG_BYTES = 2**20  # of a file, and of what it stands for when all aliases are written out


def add_gs_config(cfg):
    """Adds MODEL.GS, INPUT.GS, SOLVER.GS and TEST.GS to a Detectron2 config, in place.

    Where a Detectron2 key fits it is used instead: MODEL.RPN.BATCH_SIZE_PER_IMAGE is N, the samples per group (per
    image without groups); POSITIVE_FRACTION, IOU_THRESHOLDS [low, high], NMS_THRESH, PRE_NMS_TOPK_* and
    POST_NMS_TOPK_* keep their meaning, over all feature maps together; BBOX_REG_LOSS_TYPE is one of "smooth_l1",
    "iou" (-ln IoU) and "least_square_iou"; LOSS_WEIGHT scales both terms, BBOX_REG_LOSS_WEIGHT is eta of eq. 2.
    GroupSamplingRetinaNet reads the first two, and MODEL.RETINANET.* for the rest.
    """
    cfg.MODEL.GS = CN()
    # False: all anchors form one group, the paper's baselines.
    cfg.MODEL.GS.GROUP_SAMPLING = True
    # Scales (pixels) that define the groups; an anchor belongs to the nearest in log2. [] = one group per anchor scale.
    cfg.MODEL.GS.GROUP_SCALES = []
    # Which samples of a group are drawn: "random", "wrs" (weighted reservoir sampling by loss), "ohem" (the highest
    # losses of each label), "ohem_all" (the highest losses whatever the label, POSITIVE_FRACTION without effect: the
    # paper's OHEM without groups), "none" (all of them).
    cfg.MODEL.GS.SAMPLER = "random"
    # With "ohem" and "ohem_all", at both stages: of boxes of one group (and with "ohem" of one label) whose IoU is
    # above this, only the one of highest loss can be drawn; in (0, 1], 1 is no such pruning. It costs an NMS for every
    # group and image.
    cfg.MODEL.GS.OHEM_NMS_THRESH = 1.0
    # How samples weigh in their group's loss: "softmax" (alike), "focal" (focal loss over the number of positives) or
    # "focal_normalized" (focal weights over their own sum, the paper's Focal*). Alpha and gamma are
    # MODEL.RETINANET.FOCAL_LOSS_ALPHA and FOCAL_LOSS_GAMMA.
    cfg.MODEL.GS.CLS_LOSS_TYPE = "softmax"
    # Second pass of matching: "best" (one anchor for each unmatched face), "all", or "none".
    cfg.MODEL.GS.SECOND_PASS = "best"
    # A negative anchor (or proposal) of which at least this share lies in one ignore region is ignored; in (0, 1].
    # Regions smaller than the smallest anchor (or reference scale) are enlarged to its size first.
    cfg.MODEL.GS.IGNORE_THRESH = 0.5
    # One list per feature map of the stride (pixels) for each of its anchor sizes; a stride coarser than the map
    # sub-samples it. [] = every anchor at its map's own stride.
    cfg.MODEL.GS.ANCHOR_STRIDES = []
    # GroupSamplingRetinaNet: True puts DilatedRPNHead's branches in place of RetinaNet's two subnets of convolutions.
    cfg.MODEL.GS.RETINANET_DILATED_HEAD = False
    # Proposals kept of each reference scale (MODEL.GS.ROI.GROUP_SCALES) after NMS, so that small ones reach the second
    # stage; POST_NMS_TOPK_*, the limit of their sum, must have room for all. In training more than
    # ROI_HEADS.BATCH_SIZE_PER_IMAGE, or its sampler has nothing to choose from. 0 = the best of all scales together.
    cfg.MODEL.GS.GROUP_POST_NMS_TOPK_TRAIN = 0
    cfg.MODEL.GS.GROUP_POST_NMS_TOPK_TEST = 0
    # Convolutions in channels-last memory order: the same result up to rounding, faster on CPUs and with tensor cores.
    cfg.MODEL.GS.CHANNELS_LAST = False
    # "bfloat16" or "float16": convolutions run in it (torch.autocast), in training and at test; losses, decoding and
    # NMS stay in float32. "" = float32. To train in float16 use SOLVER.AMP.ENABLED instead, which scales the loss. What
    # either of the two brings on a CPU: docs/benchmarks/2026-11-24-cpu-detector.md.
    cfg.MODEL.GS.AUTOCAST_DTYPE = ""
    # False: train even with Detectron2 defaults that break the method (see check_config).
    cfg.MODEL.GS.CHECK_DEFAULTS = True
    # Levels of gs_d2.modeling.Context on the coarsest map of the top-down path, for anchors that are larger than what
    # the backbone sees; 0 is none, as in the paper.
    cfg.MODEL.GS.CONTEXT_LEVELS = 0

    # A backbone of the package timm, for MODEL.BACKBONE.NAME build_timm_topdown_backbone (docs/backbones.md).
    # MODEL.FPN.IN_FEATURES names its maps: "stride8" the last of that stride, "index2" timm's out index 2.
    # MODEL.BACKBONE.FREEZE_AT n freezes all that gives the map of stride 2**n, 0 nothing.
    cfg.MODEL.GS.TIMM = CN()
    # Of timm's registry, such as "mobilenetv2_100".
    cfg.MODEL.GS.TIMM.NAME = ""
    # More arguments of timm.create_model, names and values in turn: ["act_layer", "relu"].
    cfg.MODEL.GS.TIMM.OPTIONS = []
    # A .pth or .safetensors file of the backbone alone, by timm's names; nothing is fetched. It is read when the model
    # is built; if it is not there, only training without a checkpoint is an error. "" = random weights.
    cfg.MODEL.GS.TIMM.WEIGHTS = ""
    # BatchNorm: "folded" (of fixed statistics, as part of the convolutions), "frozen" (the same, but layers of their
    # own) or "trained".
    cfg.MODEL.GS.TIMM.BN = "folded"

    # The second stage, GroupedROIHeads. MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE is its N; POSITIVE_FRACTION,
    # IOU_THRESHOLDS [low, high], PROPOSAL_APPEND_GT, IN_FEATURES, NMS_THRESH_TEST and MODEL.ROI_BOX_HEAD.* keep their
    # meaning.
    cfg.MODEL.GS.ROI = CN()
    # As the keys of the same names above, for proposals.
    cfg.MODEL.GS.ROI.GROUP_SAMPLING = True
    cfg.MODEL.GS.ROI.SAMPLER = "random"
    cfg.MODEL.GS.ROI.CLS_LOSS_TYPE = "softmax"
    # Reference scales (pixels), eq. 4: a proposal belongs to the nearest in log2.
    cfg.MODEL.GS.ROI.GROUP_SCALES = [16, 32, 64, 128]
    # Final score of a box from those of both stages: "arithmetic" or "geometric" mean, or "none" (the second's).
    cfg.MODEL.GS.ROI.SCORE_ENSEMBLE = "arithmetic"

    cfg.INPUT.GS = CN()
    # Training images are resized by one of these factors, drawn uniformly...
    cfg.INPUT.GS.SCALES = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    # ...and cropped at random so that no side exceeds this many pixels. COCO's images are resized to a short side of
    # INPUT.MIN_SIZE_TRAIN before, or with 0 here as Detectron2 does, without a crop.
    cfg.INPUT.GS.MAX_CROP_SIZE = 1200
    # Faces with sqrt(w * h) below this many pixels after resizing become ignore regions: no anchor of the smallest
    # scale near them is a negative.
    cfg.INPUT.GS.MIN_FACE_SIZE = 8.0
    # Probability in [0, 1] that a training view is instead made around a face, so that small scales get faces too
    # (gs_d2.data.FaceCrop): a face and one of FACE_CROP_SCALES are drawn uniformly, the image is resized so that
    # sqrt(w * h) of the face comes within a factor of sqrt(2) of that scale, and cropped around it. 0 = the paper's
    # views only. Images without a face to train on keep those.
    cfg.INPUT.GS.FACE_CROP_PROB = 0.0
    # Pixels; these are the anchors of configs/Base-WIDER.yaml.
    cfg.INPUT.GS.FACE_CROP_SCALES = [16, 32, 64, 128]
    # Sides of such a view in pixels; smaller where the image ends.
    cfg.INPUT.GS.FACE_CROP_SIZE = 640
    # Largest factor by which an image is enlarged for it; with 2.0 faces go to the next larger scale at most.
    cfg.INPUT.GS.FACE_CROP_MAX_UPSCALE = 2.0
    # Strength s in [0, 1]: brightness, contrast and saturation of training views change by factors drawn uniformly from
    # [1 - s, 1 + s], each its own (Detectron2's RandomBrightness, RandomContrast, RandomSaturation). 0 = as they are.
    cfg.INPUT.GS.COLOR_JITTER = 0.0

    cfg.SOLVER.GS = CN()
    # "sgd", Detectron2's and the paper's, or "adamw" with betas (SOLVER.MOMENTUM, 0.999): small networks without
    # BatchNorm learn several times faster with it; BASE_LR is then about 0.001 and WEIGHT_DECAY 0.01.
    cfg.SOLVER.GS.OPTIMIZER = "sgd"
    # Factor of the rates of the backbone without its top-down path, positive: below 1 spares pretrained weights.
    cfg.SOLVER.GS.BACKBONE_MULTIPLIER = 1.0
    # Every iteration runs this many batches of SOLVER.IMS_PER_BATCH images forward and backward, averages their
    # gradients and makes one optimizer step: the effective batch is the product. BASE_LR and MAX_ITER stay as they are.
    cfg.SOLVER.GS.ACCUMULATION_STEPS = 1
    # When a loss is infinite or NaN: "stop", naming the images and saving the batch, or "skip" that iteration's step
    # (in all processes; it stops all the same after 20 in a row).
    cfg.SOLVER.GS.NONFINITE_LOSS = "stop"
    # Above 0, say 0.999: evaluations and checkpoints have an exponential moving average of the weights; every optimizer
    # step keeps this share of it (at first less: docs/training.md). Not scaled to the number of processes. 0 = none.
    cfg.SOLVER.GS.EMA_DECAY = 0.0
    # With SOLVER.LR_SCHEDULER_NAME "WarmupFlatDecayLR": the rate is flat after the warm-up and falls linearly over this
    # many last iterations; STEPS and GAMMA are not read. A flat run can be resumed with another MAX_ITER.
    cfg.SOLVER.GS.DECAY_ITERS = 0

    cfg.TEST.GS = CN()
    # Detections below this score (probability) are dropped. Above 0.05 it costs average precision. (RetinaNet has
    # MODEL.RETINANET.SCORE_THRESH_TEST for it.)
    cfg.TEST.GS.SCORE_THRESH = 0.01
    # True: test on an image pyramid and merge its levels by one NMS (gs_d2.inference.PyramidDetector). Needs
    # INPUT.MIN_SIZE_TEST 0. MODEL.RPN.PRE_NMS_TOPK_TEST boxes are kept of each level, and MODEL.RPN.NMS_THRESH (with a
    # second stage MODEL.ROI_HEADS.NMS_THRESH_TEST) and TEST.DETECTIONS_PER_IMAGE apply to all levels together. False: a
    # single scale.
    cfg.TEST.GS.PYRAMID = False
    # Factors of the file's size, one level each.
    cfg.TEST.GS.SCALES = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    # Levels with a side above this many pixels are skipped; if all are, the smallest is resized to it.
    cfg.TEST.GS.MAX_SIZE = 3000
    # True: every level also mirrored.
    cfg.TEST.GS.FLIP = False
    # True: a detection moves to the score-weighted mean of the boxes that overlap it by at least that
    # threshold.
    cfg.TEST.GS.BOX_VOTING = False
    # [low, high]: of each level only boxes of sqrt(w * h) in this range, in pixels of the level, are kept; the largest
    # level has no lower and the smallest no upper limit, so that every face keeps a level. [] = all boxes.
    cfg.TEST.GS.LEVEL_BOX_SIZE = []
    # True: evaluation on WIDER FACE also gives the AP of each anchor scale's outputs alone (the paper's @16, @32, ...),
    # after an NMS among themselves, which takes more time and memory. Detections stay the same.
    cfg.TEST.GS.AP_BY_SCALE = True
    # What evaluations during training (TEST.EVAL_PERIOD) leave out; the one after the last iteration and --eval-only
    # are whole. Above 0: so many evenly spaced images of each test set instead of all.
    cfg.TEST.GS.PERIODIC_IMAGES = 0
    # False: a single scale also with PYRAMID.
    cfg.TEST.GS.PERIODIC_PYRAMID = True


def load_config(cfg: CN | str | os.PathLike, opts=()) -> CN:
    """A config of its own that may be changed, with this project's keys; reading it runs no code and fetches nothing.

    Args:
        cfg: a YAML file, or a config with :func:`add_gs_config`'s keys, which is copied.
        opts: keys and values in turn, which take precedence.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown key or a value of another type, naming file and key; a tag that would run code,
            more than 1 MiB, also of what aliases (`*name`) stand for when they are written out (each key, value and
            list counts as its characters and one), an alias in what it stands for, a `_BASE_` that is no local file or
            that leads back to its own file; or `cfg` lacks the keys.
    """
    if isinstance(cfg, CN):
        if "GS" not in cfg.MODEL:
            raise ValueError("cfg has no MODEL.GS: call gs_d2.config.add_gs_config(cfg) before reading the file")
        cfg = cfg.clone()
        cfg.defrost()
    else:
        path, cfg = os.fspath(cfg), get_cfg()
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no such config: {path}")
        add_gs_config(cfg)
        cfg = _LocalConfig(cfg)
        try:
            cfg.merge_from_file(path, allow_unsafe=False)
        except RecursionError as error:
            raise ValueError(f"{path}: nested too deeply, or its _BASE_ leads back to it") from error
        except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {_text(error)}") from error
        cfg = CN(cfg)
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"opts {list(opts)}: {_text(error)}") from error
    return cfg


class _LocalConfig(CN):
    """Opens only what :func:`load_config` allows; Detectron2 calls this for a file and for each `_BASE_` of it."""

    @classmethod
    def _open_cfg(cls, filename):
        if not os.path.isfile(filename):  # Detectron2's own opener would download it
            raise ValueError(f"the _BASE_ {filename} is not a file of this machine")
        if os.path.getsize(filename) > _MAX_CONFIG_BYTES:
            raise ValueError(f"{filename} has more than {_MAX_CONFIG_BYTES >> 20} MiB: not a config")
        with open(filename, encoding="utf-8") as file:
            text = io.StringIO(file.read())
        text.name = filename  # YAML's messages name it
        _check_aliases(yaml.parse(text), filename)
        text.seek(0)
        return text


def _check_aliases(events, filename):
    """Refuses a few lines that stand for gigabytes; Detectron2's own dumps have aliases, so they cannot all be refused.

    Sizes are added up as the events of the parser come, so that nothing is expanded.
    """
    sizes = {}  # of what an alias of that name stands for; None while that is still open
    open_nodes = [[None, 0]]  # [name, size so far], from the outermost in
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            name, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            name, size = None, sizes.get(event.anchor, 1)  # of a name that is not defined YAML itself complains
            if size is None:
                raise ValueError(f"{filename} has an alias *{event.anchor} in what it stands for")
        elif isinstance(event, yaml.ScalarEvent):
            name, size = event.anchor, len(event.value) + 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
            name, size = event.anchor, None
        else:
            continue
        if name is not None:
            sizes[name] = size
        if size is not None:
            open_nodes[-1][1] += size
            if open_nodes[-1][1] > _MAX_CONFIG_BYTES:
                raise ValueError(
                    f"{filename} stands for more than {_MAX_CONFIG_BYTES >> 20} MiB when its aliases (*name) are "
                    "written out: not a config"
                )


def _text(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)  # its own text is in quotes
    return text if len(text) < 600 else f"{text[:300]} ... {text[-300:]}"  # yacs prints whole configs


# (key, what Detectron2 sets, why that breaks the method)
_BREAKING_DEFAULTS = [
    ("TEST.DETECTIONS_PER_IMAGE", 100, "a WIDER FACE image has up to 1,968 faces; use 1000 or more"),
    (
        "MODEL.RPN.PRE_NMS_TOPK_TEST",
        6000,
        "over all scales together it starves small faces; the paper keeps 50000",
    ),
    ("MODEL.RPN.POST_NMS_TOPK_TEST", 1000, "it caps detections before TEST.DETECTIONS_PER_IMAGE does"),
    ("MODEL.RPN.IOU_THRESHOLDS", [0.3, 0.7], "the paper's two-pass matching uses [0.4, 0.6]"),
    ("MODEL.RPN.POSITIVE_FRACTION", 0.5, "the paper samples positives : negatives = 1 : 3, that is 0.25"),
    ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 256, "this is N, the samples per group; the paper uses 2048"),
]
# What COCO's own protocol or its baselines (FPN, RetinaNet), and the paper with them, take: wrong for faces only.
_RIGHT_FOR_COCO = {
    "TEST.DETECTIONS_PER_IMAGE",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    "MODEL.RPN.NMS_THRESH",
    "MODEL.RPN.POST_NMS_TOPK_TEST",
    "MODEL.ROI_HEADS.NUM_CLASSES",
}
TWO_STAGES = ("GroupedFastRCNN", "GeneralizedRCNN")  # ours, and Detectron2's, which takes our parts too
_GROUPED_HEADS = ("GroupedROIHeads", "PositionSensitiveROIHeads")
_READ_BY_GROUPED_HEADS = {"MODEL.ROI_HEADS.IOU_THRESHOLDS"}
_READ_BY_RETINANET = {"TEST.DETECTIONS_PER_IMAGE", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "MODEL.RPN.POSITIVE_FRACTION"}
_BREAKING_SINGLE_STAGE = [("MODEL.RPN.NMS_THRESH", 0.7, "the paper merges detections at 0.5")]
_BREAKING_TWO_STAGE = [
    (
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
        12000,
        "over all scales together it starves small proposals, and the second stage of samples; use 50000 as at test",
    ),
    ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 2000, "the second stage samples from these; use 4000, 1000 of each scale"),
    ("MODEL.ROI_HEADS.NUM_CLASSES", 80, "these are COCO's; faces are 1 class"),
    ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.5], "two-pass matching needs [low, high]; the paper uses [0.5, 0.6]"),
]


def detection_limits(cfg) -> tuple[float, int]:
    """IoU of the NMS that gives a model's detections, and the most of an image, from whichever keys its stages use."""
    if cfg.MODEL.META_ARCHITECTURE in TWO_STAGES:
        return cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE
    if cfg.MODEL.META_ARCHITECTURE == "GroupSamplingRetinaNet":
        return cfg.MODEL.RETINANET.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE
    return cfg.MODEL.RPN.NMS_THRESH, min(cfg.MODEL.RPN.POST_NMS_TOPK_TEST, cfg.TEST.DETECTIONS_PER_IMAGE)


def check_pyramid(cfg):
    """Refuses settings that contradict TEST.GS.PYRAMID.

    Raises:
        ValueError: naming the key, its value and what to set.
    """
    if cfg.INPUT.MIN_SIZE_TEST != 0:
        raise ValueError(
            "TEST.GS.PYRAMID resizes from the file's own size, and INPUT.MIN_SIZE_TEST "
            f"{cfg.INPUT.MIN_SIZE_TEST} would resize before: set INPUT.MIN_SIZE_TEST 0, or TEST.GS.PYRAMID False"
        )
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED asks for Detectron2's test augmentation, which knows R-CNNs only: "
            "set it False and use TEST.GS.PYRAMID, SCALES and FLIP"
        )


FLAT_DECAY = "WarmupFlatDecayLR"


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
    if cfg.MODEL.GS.AUTOCAST_DTYPE and cfg.MODEL.META_ARCHITECTURE == "GroupSamplingRetinaNet":
        raise ValueError(
            "MODEL.GS.AUTOCAST_DTYPE does nothing in GroupSamplingRetinaNet: "
            'set it "" and, on a GPU, SOLVER.AMP.ENABLED True'
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise ValueError(
            "SOLVER.AMP.ENABLED needs a GPU, and MODEL.DEVICE is cpu: "
            "set SOLVER.AMP.ENABLED False and, if wanted, MODEL.GS.AUTOCAST_DTYPE bfloat16"
        )


def _check_proposals(cfg):
    """Refuses counts of proposals by which the second stage's group sampling would come to nothing.

    Raises:
        ValueError: naming the keys, their values and what to set.
    """
    gs, num_samples = cfg.MODEL.GS, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    num_scales = len(gs.ROI.GROUP_SCALES)
    for phase in ("TRAIN", "TEST"):
        per_scale, limit = gs[f"GROUP_POST_NMS_TOPK_{phase}"], cfg.MODEL.RPN[f"POST_NMS_TOPK_{phase}"]
        if per_scale * num_scales > limit:
            raise ValueError(
                f"MODEL.GS.GROUP_POST_NMS_TOPK_{phase} {per_scale} of each of {num_scales} reference scales is more "
                f"than MODEL.RPN.POST_NMS_TOPK_{phase} {limit}, which keeps those of the highest scores, seldom small "
                f"ones: set it to {per_scale * num_scales}"
            )
    grouped = cfg.MODEL.ROI_HEADS.NAME in _GROUPED_HEADS and gs.ROI.GROUP_SAMPLING and gs.ROI.SAMPLER != "none"
    if grouped and 0 < gs.GROUP_POST_NMS_TOPK_TRAIN <= num_samples:
        raise ValueError(
            f"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE {num_samples} samples of each reference scale are all of its "
            f"MODEL.GS.GROUP_POST_NMS_TOPK_TRAIN {gs.GROUP_POST_NMS_TOPK_TRAIN} proposals, so that every sampler takes "
            "the same: lower the first (the configs have 128), or raise the second (1000)"
        )


def _trains_on_coco(cfg) -> bool:
    return any(name.startswith("coco") for name in cfg.DATASETS.TRAIN)


def check_config(cfg):
    """Refuses Detectron2 defaults that silently break group sampling, and contradictory test settings.

    Raises:
        ValueError: naming every such key, its value and what to set. MODEL.GS.CHECK_DEFAULTS False allows the defaults.
    """
    if cfg.TEST.GS.PYRAMID:
        check_pyramid(cfg)
    if not cfg.MODEL.GS.CHECK_DEFAULTS:
        return
    broken = []
    two_stage = cfg.MODEL.META_ARCHITECTURE in TWO_STAGES
    if two_stage:
        _check_proposals(cfg)
    of_stages = _BREAKING_TWO_STAGE if two_stage else _BREAKING_SINGLE_STAGE
    for key, default, reason in _BREAKING_DEFAULTS + of_stages:
        if key in _RIGHT_FOR_COCO and _trains_on_coco(cfg):
            continue
        if key in _READ_BY_GROUPED_HEADS and cfg.MODEL.ROI_HEADS.NAME not in _GROUPED_HEADS:
            continue
        if key not in _READ_BY_RETINANET and cfg.MODEL.META_ARCHITECTURE == "GroupSamplingRetinaNet":
            continue
        value = cfg
        for name in key.split("."):
            value = value[name]
        if (list(value) if isinstance(value, (list, tuple)) else value) == default:
            broken.append(f"  {key} is Detectron2's default {default}: {reason}")
    if broken:
        raise ValueError(
            "This config keeps Detectron2 defaults that break group sampling:\n"
            + "\n".join(broken)
            + "\nStart from configs/Base-WIDER.yaml, for COCO from configs/Base-COCO.yaml, or set "
            "MODEL.GS.CHECK_DEFAULTS False to keep them on purpose."
        )
