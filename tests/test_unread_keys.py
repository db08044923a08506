"""Every key of Detectron2's config, 0.5's and main's, is read by something of this project or refused by the check."""

from fnmatch import fnmatchcase
from types import MappingProxyType

import pytest
import yacs.config
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from runs import small_config

from gs_d2 import unread_keys
from gs_d2.config import add_gs_config, check_config, load_config
from gs_d2.engine import Trainer
from gs_d2.engine.checks import leaves
from gs_d2.modeling import DilatedRPNHead, RPNDetector, description_of
from gs_d2.unread_keys import OF_DETECTORS, OF_ROI_HEADS, OF_RPN, OF_RPN_HEADS, OF_TRAINER

# What main's defaults have beyond those of 0.5 (detectron2/config/defaults.py).
READ_BY_MAIN = {
    "FLOAT32_PRECISION",  # by default_setup
    "SOLVER.BASE_LR_END",  # by its schedules
    "SOLVER.NUM_DECAYS",
    "SOLVER.RESCALE_INTERVAL",
}
UNREAD_OF_MAIN = {
    "DATALOADER.REPEAT_SQRT",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
}
READ_ELSEWHERE = {
    "CUDNN_BENCHMARK",  # by default_setup
    "GLOBAL.HACK",  # Detectron2 has it for code of one's own
    "TEST.PRECISE_BN.NUM_ITER",  # where PRECISE_BN.ENABLED is True
    "VERSION",  # of the config
    "VIS_PERIOD",  # by Detectron2's RetinaNet
}
READ_AND_REFUSED = {
    "MODEL.KEYPOINT_ON",  # by our ROI heads, which refuse it as well
    "MODEL.LOAD_PROPOSALS",  # by Detectron2's test loader, for models that take proposals
    "MODEL.MASK_ON",
    "MODEL.RPN.CONV_DIMS",  # by one of our heads
}
TABLES = {**OF_TRAINER, **OF_DETECTORS, **OF_RPN, **OF_RPN_HEADS, **OF_ROI_HEADS}
MODELS = (
    "wider_gs",
    "coco/retinanet_sampling_wrs",
    "pipelines/ssd",
    "pipelines/rfcn",
    "pipelines/retinaface",
    "pipelines/yolov3",
    "pipelines/centernet",
    "faces/mobilenetv2",
)


def is_refused(key):
    return any(fnmatchcase(key, pattern) for pattern in TABLES)


@pytest.fixture
def read(monkeypatch):
    """Keys that have been read of the configs given to `watch`, which this has, and of their copies."""

    class Read(set):
        def watch(self, node, prefix=""):
            node.__dict__["_keys_begin_with"] = prefix
            for name, value in node.items():
                if isinstance(value, yacs.config.CfgNode):
                    self.watch(value, f"{prefix}{name}.")
            return node

    read, get = Read(), yacs.config.CfgNode.__getattr__

    def get_and_note(node, name):
        value = get(node, name)
        if "_keys_begin_with" in node.__dict__:
            read.add(node.__dict__["_keys_begin_with"] + name)
        return value

    monkeypatch.setattr(yacs.config.CfgNode, "__getattr__", get_and_note)
    return read


def test_every_key_is_read_or_refused(read, drawn_datasets, coco_toy, tmp_path):
    small = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
    for name in MODELS:
        build_model(read.watch(load_config(f"configs/{name}.yaml", small)))
    opts = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "DATALOADER.ASPECT_RATIO_GROUPING", True)
    for names in (("engine_train",), ("coco_toy_train",)):
        cfg = small_config(drawn_datasets, tmp_path, *opts)
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = names
        trainer = Trainer(read.watch(cfg))
        trainer.resume_or_load(resume=False)
        trainer.train()
    keys = dict(leaves(get_cfg())).keys()
    assert [key for key in keys - READ_BY_MAIN - READ_ELSEWHERE if key not in read and not is_refused(key)] == []
    assert [key for key in keys & read if is_refused(key) and key not in READ_AND_REFUSED] == []
    assert "MODEL.RPN.NMS_THRESH" in read and "INPUT.CROP.ENABLED" not in read


def test_every_key_of_main_is_known():
    assert all(map(is_refused, UNREAD_OF_MAIN)) and not any(map(is_refused, READ_BY_MAIN))


def test_every_pattern_fits_a_key():
    keys = {*dict(leaves(get_cfg())), *UNREAD_OF_MAIN}
    assert [pattern for pattern in TABLES if not any(fnmatchcase(key, pattern) for key in keys)] == []
    tables = [table for name, table in vars(unread_keys).items() if name.startswith("OF_")]
    assert all(pattern in TABLES for table in tables for pattern in table)


RPN, TWO_STAGE, RETINANET, CENTERNET = "quick/demo", "quick/two_stage", "coco/retinanet", "pipelines/centernet"


@pytest.mark.parametrize("name", [RPN, TWO_STAGE, RETINANET, CENTERNET])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.2),
        ("MODEL.MASK_ON", True),
        ("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True),
        ("MODEL.RPN.BOUNDARY_THRESH", 0),
        ("MODEL.ROI_HEADS.IOU_LABELS", [0, -1, 1]),
        ("MODEL.SEM_SEG_HEAD.NAME", "Other"),
        ("TEST.AUG.ENABLED", True),
        ("INPUT.CROP.ENABLED", True),
    ],
)
def test_a_key_that_does_nothing_is_refused(name, key, value):
    cfg = load_config(f"configs/{name}.yaml")
    for training in (True, False):
        check_config(cfg, training)
        with pytest.raises(ValueError, match="sets keys that do nothing in") as error:
            check_config(load_config(cfg, [key, value]), training)
        (line,) = [line for line in str(error.value).splitlines() if line.startswith("  ")]
        assert line.startswith(f"  {key} {value!r}: ") and len(line) > len(f"  {key} {value!r}: ") + 10


@pytest.mark.parametrize(
    ("name", "head"),
    [
        (RPN, "DilatedRPNHead"),
        (RPN, "PerMapRPNHead"),
        ("pipelines/retinaface", None),
        (RETINANET, None),
        (CENTERNET, None),
    ],
)
def test_widths_of_a_head_without_them_are_refused(name, head):
    wide = ["MODEL.RPN.CONV_DIMS", [64]] + (["MODEL.RPN.HEAD_NAME", head] if head else [])
    with pytest.raises(ValueError, match=r"MODEL\.RPN\.CONV_DIMS \[64\]: the head has the channels"):
        check_config(load_config(f"configs/{name}.yaml", wide))


def test_all_are_named_at_once_with_what_to_use():
    cfg = load_config(f"configs/{RETINANET}.yaml", ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.2, "TEST.AUG.FLIP", False])
    cfg.MODEL.GS.CHANNELS_LAST = True
    with pytest.raises(ValueError) as error:
        check_config(cfg)
    assert "use MODEL.RETINANET.SCORE_THRESH_TEST" in str(error.value) and "use TEST.GS.PYRAMID" in str(error.value)
    for name in (RPN, TWO_STAGE):
        with pytest.raises(ValueError, match=r"SCORE_THRESH_TEST 0\.2: use TEST\.GS\.SCORE_THRESH"):
            check_config(load_config(f"configs/{name}.yaml", ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.2]))


def test_parts_of_others_may_read_what_ours_do_not():
    """Detectron2's ROI heads masks, a head of one's own its widths."""
    rcnn = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3]
    with pytest.raises(ValueError, match=r"SCORE_THRESH_TEST 0\.3: use TEST\.GS"):
        check_config(load_config(f"configs/{TWO_STAGE}.yaml", rcnn))
    theirs = ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 4]
    check_config(load_config(f"configs/{TWO_STAGE}.yaml", rcnn + theirs))

    class WideHead(DilatedRPNHead):
        unread_keys = MappingProxyType({})

    RPN_HEAD_REGISTRY._do_register("WideHead", WideHead)
    try:
        check_config(
            load_config("configs/quick/demo.yaml", ["MODEL.RPN.CONV_DIMS", [64], "MODEL.RPN.HEAD_NAME", "WideHead"])
        )
    finally:
        del RPN_HEAD_REGISTRY._obj_map["WideHead"]


def test_a_detector_of_ones_own_says_what_it_does_not_read():
    class Quiet(RPNDetector):
        @classmethod
        def unread_keys(cls, cfg):
            return {**super().unread_keys(cfg), "MODEL.GS.AUTOCAST_*": "it has one number format"}

    META_ARCH_REGISTRY._do_register("Quiet", Quiet)
    try:
        cfg = load_config("configs/quick/demo.yaml", ["MODEL.META_ARCHITECTURE", "Quiet"])
        check_config(cfg)
        cfg.MODEL.GS.AUTOCAST_DTYPE = "bfloat16"
        with pytest.raises(ValueError, match=r"do nothing in Quiet.*\n.*'bfloat16': it has one number format"):
            check_config(cfg)
        assert description_of("Quiet").unread_keys(cfg).keys() > RPNDetector.unread_keys(cfg).keys()
    finally:
        del META_ARCH_REGISTRY._obj_map["Quiet"]


def test_a_key_at_its_default_is_no_setting():
    """As in the config.yaml that a run writes, where all keys stand."""
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file("configs/quick/two_stage.yaml")
    cfg.TEST.AUG.MIN_SIZES = list(cfg.TEST.AUG.MIN_SIZES)
    check_config(cfg)
