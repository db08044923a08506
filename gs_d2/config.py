"""This project's config keys, the only reader of config files, and a check that needs no detector.

`check_config` and `check_training` of :mod:`gs_d2.engine.checks` can be imported from here, too.
"""

import io
import os
import re

import yaml

from gs_d2 import compat  # noqa: F401
from gs_d2.formats.text import decoded

from detectron2.config import CfgNode as CN  # isort: skip
from detectron2.config import get_cfg  # isort: skip

# What is added to yacs's message on a value of another type, by the type that is wanted.
_TYPES = {
    "bool": "; it must be True or False",
    "float": "; it must be a number with a point, such as 1.0 or 1e-3",
    "int": "; it must be a whole number",
    "list": "; it must be a list, such as [1,2], in quotes in a shell",
    "str": "; it must be text",
    "tuple": "; it must be a list, such as (1, 2) or, of names, ('my_faces',), in quotes in a shell",
}
_MAX_CONFIG_BYTES = 2**20  # of a file, and of what it stands for when all aliases are written out


def add_gs_config(cfg):
    """Adds MODEL.GS, INPUT.GS, DATASETS.GS, SOLVER.GS and TEST.GS to a Detectron2 config, in place, and registers what
    a config can name with Detectron2: the parts of gs_d2.modeling and the data sets of gs_d2.data.

    Where a Detectron2 key fits it is used instead: MODEL.RPN.BATCH_SIZE_PER_IMAGE is N, the samples per group (per
    image without groups); POSITIVE_FRACTION, IOU_THRESHOLDS [low, high], NMS_THRESH, PRE_NMS_TOPK_* and
    POST_NMS_TOPK_* keep their meaning, over all feature maps together; BBOX_REG_LOSS_TYPE is one of "smooth_l1",
    "iou" (-ln IoU) and "least_square_iou"; LOSS_WEIGHT scales both terms, BBOX_REG_LOSS_WEIGHT is eta of eq. 2.
    GroupSamplingRetinaNet reads the first two, and MODEL.RETINANET.* for the rest.
    """
    # Not at the top of the file, so that importing it stays quick.
    import gs_d2.data
    import gs_d2.modeling  # noqa: F401

    cfg.MODEL.GS = CN()
    # False: all anchors form one group, the paper's baselines.
    cfg.MODEL.GS.GROUP_SAMPLING = True
    # Scales (pixels) that define the groups; an anchor belongs to the nearest in log2. [] = one group per anchor scale.
    cfg.MODEL.GS.GROUP_SCALES = []
    # Which boxes of a group are sampled: "random", "wrs" (weighted reservoir sampling by loss), "ohem" (the highest
    # losses of each label), "ohem_all" (the highest losses whatever the label, POSITIVE_FRACTION without effect: the
    # paper's OHEM without groups), "none" (all of them).
    cfg.MODEL.GS.SAMPLER = "random"
    # With "ohem" and "ohem_all", at both stages: of boxes of one group (and with "ohem" of one label) whose IoU is
    # above this, only the one of highest loss can be sampled; in (0, 1], 1 is no such pruning. It costs an NMS for
    # every group and image.
    cfg.MODEL.GS.OHEM_NMS_THRESH = 1.0
    # How samples weigh in their group's loss: "softmax" (alike), "focal" (focal loss over the number of positives) or
    # "focal_normalized" (focal weights over their own sum, the paper's Focal*). Alpha and gamma are
    # MODEL.RETINANET.FOCAL_LOSS_ALPHA and FOCAL_LOSS_GAMMA.
    cfg.MODEL.GS.CLS_LOSS_TYPE = "softmax"
    # IoU-aware scores: [low, high], 0 <= low < high <= 1. The target of a positive's score rises from 0 to 1 as the IoU
    # of its predicted box with its face rises from low to high, so that boxes that do not fit score low. For the last
    # part of a training: of boxes that do not fit yet it makes negatives. Needs "softmax". [] = 1, as in the paper.
    cfg.MODEL.GS.IOU_AWARE = []
    # Second pass of matching: "best" (one anchor for each unmatched face), "all", or "none".
    cfg.MODEL.GS.SECOND_PASS = "best"
    # A negative anchor (or proposal) of which at least this share lies in one region to ignore is ignored; in (0, 1].
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
    # either of the two brings on a CPU: docs/measurements.md.
    cfg.MODEL.GS.AUTOCAST_DTYPE = ""
    # torch.compile for the backbone and the RPN's, RetinaNet's or CenterNet's head, with open sizes: the same result up
    # to rounding. It needs a C++ compiler, and the first images take minutes. docs/measurements.md has what it brings.
    cfg.MODEL.GS.COMPILE = False
    # Keys whose Detectron2 default is kept on purpose, though it breaks the method for faces: check_config then allows
    # it. For N = 256 this is ["MODEL.RPN.BATCH_SIZE_PER_IMAGE"].
    cfg.MODEL.GS.KEEP_DEFAULTS = []
    # Levels of gs_d2.modeling.Context on the coarsest map of the top-down path, for anchors that are larger than what
    # the backbone sees; 0 is none, as in the paper.
    cfg.MODEL.GS.CONTEXT_LEVELS = 0
    _register_renamed(cfg)

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

    # CenterNet (docs/pipelines.md), on the one map that MODEL.RPN.IN_FEATURES names. MODEL.RPN.PRE_NMS_TOPK_TEST,
    # POST_NMS_TOPK_TEST and NMS_THRESH keep their meaning; what else is of anchors and samples does nothing.
    cfg.MODEL.GS.CENTERNET = CN()
    # Channels of the 3x3 convolution of each of the three heads.
    cfg.MODEL.GS.CENTERNET.CONV_DIM = 64
    # In (0, 1]. The heat of a face reaches as far from its centre as moving each side of its box so far leaves this
    # IoU with it: 0.3 of a square face 0.23 of its side.
    cfg.MODEL.GS.CENTERNET.MIN_OVERLAP = 0.3
    # Factors of the losses of heat map, size (in cells of the map) and offset.
    cfg.MODEL.GS.CENTERNET.LOSS_WEIGHTS = [1.0, 0.1, 1.0]

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
    # Training images are resized by one of these factors, sampled uniformly...
    cfg.INPUT.GS.SCALES = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    # ...and cropped at random so that no side exceeds this many pixels. COCO's images are resized to a short side of
    # INPUT.MIN_SIZE_TRAIN before, or with 0 here as Detectron2 does, without a crop.
    cfg.INPUT.GS.MAX_CROP_SIZE = 1200
    # Faces with sqrt(w * h) below this many pixels after resizing become regions to ignore: no anchor of the smallest
    # scale near them is a negative.
    cfg.INPUT.GS.MIN_FACE_SIZE = 8.0
    # Probability in [0, 1] that a training view is instead made around a face, so that small scales get faces too
    # (gs_d2.data.FaceCrop): a face and one of FACE_CROP_SCALES are sampled uniformly, the image is resized so that
    # sqrt(w * h) of the face comes within a factor of sqrt(2) of that scale, and cropped around it. 0 = the paper's
    # views only. Images without a face to train on keep those.
    cfg.INPUT.GS.FACE_CROP_PROB = 0.0
    # Pixels; these are the anchors of configs/Base-WIDER.yaml.
    cfg.INPUT.GS.FACE_CROP_SCALES = [16, 32, 64, 128]
    # Sides of such a view in pixels; smaller where the image ends.
    cfg.INPUT.GS.FACE_CROP_SIZE = 640
    # Largest factor by which an image is enlarged for it; with 2.0 faces go to the next larger scale at most.
    cfg.INPUT.GS.FACE_CROP_MAX_UPSCALE = 2.0
    # Strength s in [0, 1]: brightness, contrast and saturation of training views change by factors sampled uniformly
    # from [1 - s, 1 + s], each its own (Detectron2's RandomBrightness, RandomContrast, RandomSaturation). 0 = as they
    # are.
    cfg.INPUT.GS.COLOR_JITTER = 0.0

    cfg.DATASETS.GS = CN()
    # Training is refused where a larger share of a training set's images is missing. Those that are missing are counted
    # when it begins, and others take their places.
    cfg.DATASETS.GS.MAX_MISSING = 0.01

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
    # (in all processes; training stops at the 21st in a row).
    cfg.SOLVER.GS.NONFINITE_LOSS = "stop"
    # Above 0, say 0.999: evaluations and checkpoints have an exponential moving average of the weights; every optimizer
    # step keeps this share of it (at first less: docs/training.md). Not scaled to the number of processes. 0 = none.
    cfg.SOLVER.GS.EMA_DECAY = 0.0
    # Above 0: of the checkpoints that SOLVER.CHECKPOINT_PERIOD writes only so many stay, the last. 0 = all.
    cfg.SOLVER.GS.KEEP_LAST = 0
    # A metric by its name in TensorBoard, without "periodic/", say "wider_face/hard": model_best.pth has the weights
    # for which an evaluation (TEST.EVAL_PERIOD) found it highest. "" = no such file.
    cfg.SOLVER.GS.KEEP_BEST = ""
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


def _register_renamed(cfg):
    """Has merges that meet an old key say what to write; a copy of a config made by its class forgets it."""
    if not cfg.key_is_renamed("MODEL.GS.CHECK_DEFAULTS"):
        cfg.register_renamed_key(
            "MODEL.GS.CHECK_DEFAULTS",
            "MODEL.GS.KEEP_DEFAULTS",
            "instead of True leave it out; instead of False list the keys whose default you keep on purpose, such as "
            '["MODEL.RPN.BATCH_SIZE_PER_IMAGE"]',
        )


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
        _register_renamed(cfg)
        try:
            cfg.merge_from_file(path, allow_unsafe=False)
        except RecursionError as error:
            raise ValueError(f"{path}: nested too deeply, or its _BASE_ leads back to it") from error
        except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {_text(error)}") from error
        cfg = CN(cfg)
        _register_renamed(cfg)
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
        with open(filename, "rb") as file:
            text = io.StringIO(decoded(file.read(), filename))
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
    text = text if len(text) < 600 else f"{text[:300]} ... {text[-300:]}"  # yacs prints whole configs
    expected = re.match(r"Type mismatch \(<class '(\w+)'>", text)
    return text + (_TYPES.get(expected[1], "") if expected else "")


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


def __getattr__(name):  # the engine imports this module
    if name in ("check_config", "check_training"):
        from gs_d2.engine import checks

        return getattr(checks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
