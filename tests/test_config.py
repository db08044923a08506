"""Every YAML builds what it says, and the check that refuses Detectron2's defaults names each of them."""

import ast
import functools
import math
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import gs_d2.data
import gs_d2.modeling  # noqa: F401
from gs_d2.config import add_gs_config, check_config, load_config
from gs_d2.engine import Trainer
from gs_d2.engine.checks import leaves

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
YAML_FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def default_cfg():
    cfg = get_cfg()
    add_gs_config(cfg)
    return cfg


def load(name):
    cfg = default_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def is_coco(name) -> bool:
    return name.startswith(("coco/", "Base-COCO"))


def quick_cfg(*opts):
    cfg = load("quick/demo.yaml")
    cfg.merge_from_list(list(opts))
    return cfg


def own_keys(name) -> dict:
    return yaml.safe_load((CONFIGS / name).read_text())


def get(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def test_there_are_configs_to_test():
    assert {"Base-WIDER.yaml", "wider/fpn_finest_sampling.yaml", "quick/demo.yaml"} <= set(YAML_FILES)


@pytest.mark.parametrize("name", YAML_FILES)
def test_loads_from_configs_alone(name):
    base, seen = name, []
    while base is not None:
        assert base not in seen, "a circle of _BASE_"
        seen.append(base)
        parent = own_keys(base).get("_BASE_")
        if parent is not None:
            parent = (CONFIGS / base).parent.joinpath(parent).resolve()
            assert parent.is_relative_to(CONFIGS), "the chain of _BASE_ leaves configs/"
            parent = parent.relative_to(CONFIGS).as_posix()
        base = parent
    assert seen[-1].split("/")[-1].startswith("Base-")
    load(name)


@pytest.mark.parametrize("name", [name for name in YAML_FILES if "_BASE_" in own_keys(name)])
def test_holds_differences_only(name):
    """What a file inherits it does not repeat. The first of a chain states the paper's values whole."""
    keys = own_keys(name)
    base = (CONFIGS / name).parent.joinpath(keys.pop("_BASE_")).resolve().relative_to(CONFIGS).as_posix()
    inherited, own = load(base), load(name)
    repeated = [key for key, _ in leaves(keys) if get(inherited, key) == get(own, key)]
    assert repeated == []


@pytest.mark.parametrize("name", YAML_FILES)
def test_keeps_no_breaking_default(name):
    cfg = load(name)
    assert cfg.MODEL.GS.KEEP_DEFAULTS == [], "no config of ours needs to opt out"
    check_config(cfg)


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("TEST.DETECTIONS_PER_IMAGE", 100),
        ("MODEL.RPN.NMS_THRESH", 0.7),
        ("MODEL.RPN.PRE_NMS_TOPK_TEST", 6000),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", 1000),
        ("MODEL.RPN.IOU_THRESHOLDS", [0.3, 0.7]),
        ("MODEL.RPN.POSITIVE_FRACTION", 0.5),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 256),
    ],
)
def test_a_breaking_default_is_named(key, default):
    assert get(get_cfg(), key) == default, "Detectron2 has another default: does it still break the method?"
    cfg = load("Base-WIDER.yaml")
    check_config(cfg)
    cfg.merge_from_list([key, default])
    with pytest.raises(ValueError, match=f"{key} is Detectron2's default ") as error:
        check_config(cfg)
    assert str(error.value).count("is Detectron2's default") == 1
    assert "configs/Base-WIDER.yaml" in str(error.value)
    command = shlex.split(str(error.value).rpartition("on purpose: ")[2])
    assert command == ["MODEL.GS.KEEP_DEFAULTS", f"['{key}']"]
    cfg.merge_from_list(command)
    check_config(cfg)
    cfg.merge_from_list(["TEST.DETECTIONS_PER_IMAGE", 100, "MODEL.RPN.PRE_NMS_TOPK_TEST", 6000])
    with pytest.raises(ValueError) as error:
        check_config(cfg)
    assert f"{key} is Detectron2's" not in str(error.value), "the others are refused all the same"
    cfg.merge_from_list(shlex.split(str(error.value).rpartition("on purpose: ")[2]))
    check_config(cfg)


@pytest.mark.parametrize("name", ["Base-WIDER.yaml", "wider_gs.yaml"])
def test_what_has_no_meaning_at_test_is_refused_in_training_only(name):
    keys = {
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256,
        "MODEL.RPN.POSITIVE_FRACTION": 0.5,
        "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 12000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
    }
    for key, default in keys.items():
        cfg = load(name)
        cfg.merge_from_list([key, default])
        check_config(cfg, training=False)
        if name == "wider_gs.yaml" or "_TRAIN" not in key:
            with pytest.raises(ValueError, match=key):
                check_config(cfg)
    cfg.TEST.DETECTIONS_PER_IMAGE = 100
    with pytest.raises(ValueError, match=r"TEST\.DETECTIONS_PER_IMAGE is Detectron2's default 100"):
        check_config(cfg, training=False)


def test_kept_keys_exist():
    cfg = load("Base-WIDER.yaml")
    cfg.MODEL.GS.KEEP_DEFAULTS = ["MODEL.RPN.BATCH_SIZE"]
    with pytest.raises(ValueError, match=r"KEEP_DEFAULTS names 'MODEL\.RPN\.BATCH_SIZE', which is no key"):
        check_config(cfg)


@pytest.mark.parametrize("value", [True, False])
def test_the_old_switch_of_this_check_says_what_to_write(tmp_path, value):
    message = r"CHECK_DEFAULTS was renamed to MODEL\.GS\.KEEP_DEFAULTS.*instead of False list the keys"
    (tmp_path / "old.yaml").write_text(f"VERSION: 2\nMODEL:\n  GS:\n    CHECK_DEFAULTS: {value}\n")
    with pytest.raises(ValueError, match=rf"old\.yaml: .*{message}"):
        load_config(tmp_path / "old.yaml")
    for cfg in (default_cfg(), load_config(CONFIGS / "Base-WIDER.yaml"), load_config(load("Base-WIDER.yaml"))):
        with pytest.raises(KeyError, match=message):
            cfg.merge_from_list(["MODEL.GS.CHECK_DEFAULTS", value])


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 12000),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 2000),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 80),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.5]),
    ],
)
def test_a_breaking_default_of_the_second_stage_is_named(key, default):
    assert get(get_cfg(), key) == default, "Detectron2 has another default: does it still break the method?"
    cfg = load("quick/two_stage.yaml")
    assert cfg.MODEL.RPN.NMS_THRESH == 0.7, "Detectron2's default is what proposals take"
    check_config(cfg)
    cfg.merge_from_list([key, default])
    with pytest.raises(ValueError, match=f"{key} is Detectron2's default ") as error:
        check_config(cfg)
    assert str(error.value).count("is Detectron2's default") == 1
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RPN.NMS_THRESH = "RPNDetector", 0.5
    check_config(cfg)  # a single stage does not read it


def test_what_is_right_for_coco_is_wrong_for_faces():
    """COCO's 100 detections, 80 classes, 256 samples, 1,000 proposals and NMS at 0.7; the rest breaks there too."""
    for name, num_broken in (("Base-COCO", 3), ("Base-COCO-FastRCNN", 4), ("Base-COCO-RetinaNet", 2)):
        cfg = load(f"{name}.yaml")
        check_config(cfg)
        cfg.DATASETS.TRAIN = ("wider_face_train",)
        with pytest.raises(ValueError) as error:
            check_config(cfg)
        assert str(error.value).count("is Detectron2's default") == num_broken, str(error.value)
        cfg.DATASETS.TRAIN = ("coco_2017_train",)
        cfg.MODEL.RPN.POSITIVE_FRACTION = 0.5
        with pytest.raises(ValueError, match=r"MODEL\.RPN\.POSITIVE_FRACTION is Detectron2's default 0\.5"):
            check_config(cfg)


@pytest.mark.parametrize(
    ("name", "stage", "size", "groups"),
    [
        ("wider/fpn_ohem", "RPN", 1024, False),
        ("wider/fpn_finest_ohem", "RPN", 1024, False),
        ("coco/retinanet_ohem", "RPN", 256, False),
        ("coco/retinanet_p3_dc_ohem", "RPN", 256, False),
        ("wider/fast_rcnn_lsiou_ohem", "ROI_HEADS", 512, False),
        ("coco/fast_rcnn_lsiou_ohem", "ROI_HEADS", 640, False),
        ("wider/fpn_sampling_ohem", "RPN", 2048, True),
        ("wider/fpn_finest_sampling_ohem", "RPN", 2048, True),
        ("coco/retinanet_sampling_ohem", "RPN", 256, True),
        ("coco/retinanet_p3_dc_sampling_ohem", "RPN", 256, True),
    ],
)
def test_labels_compete_in_ohem_without_groups_only(name, stage, size, groups):
    """Section 6.2: B samples "with highest loss among all samples"; section 4.2 for groups: 1 : 3."""
    cfg = load(f"{name}.yaml")
    gs = cfg.MODEL.GS if stage == "RPN" else cfg.MODEL.GS.ROI
    assert (gs.GROUP_SAMPLING, gs.SAMPLER) == (groups, "ohem" if groups else "ohem_all")
    assert cfg.MODEL[stage].BATCH_SIZE_PER_IMAGE == size


def test_every_config_of_ohem_is_in_the_list_above():
    (mark,) = test_labels_compete_in_ohem_without_groups_only.pytestmark
    assert {f"{row[0]}.yaml" for row in mark.args[1]} == {name for name in YAML_FILES if "ohem" in name}


def test_table_14_changes_the_second_stage_alone():
    """But for the IoU loss, which the table's note gives to the first."""
    steps = {
        ("fast_rcnn", "fast_rcnn_lsiou"): {"MODEL.RPN.BBOX_REG_LOSS_TYPE": "least_square_iou"},
        ("fast_rcnn_lsiou", "fast_rcnn_lsiou_ohem"): {"MODEL.GS.ROI.SAMPLER": "ohem_all"},
        ("fast_rcnn_lsiou", "fast_rcnn_lsiou_wrs"): {"MODEL.GS.ROI.SAMPLER": "wrs"},
        ("fast_rcnn_lsiou", "fast_rcnn_lsiou_sampling"): {
            "MODEL.GS.ROI.GROUP_SAMPLING": True,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128,
            "MODEL.GS.GROUP_POST_NMS_TOPK_TRAIN": 1000,
            "MODEL.GS.GROUP_POST_NMS_TOPK_TEST": 200,
        },
        ("fast_rcnn_lsiou_sampling", "fast_rcnn_lsiou_sampling_wrs"): {"MODEL.GS.ROI.SAMPLER": "wrs"},
    }
    for (name, other), expected in steps.items():
        assert changes(f"coco/{name}.yaml", f"coco/{other}.yaml") == expected
    cfg = load("coco/fast_rcnn_lsiou_sampling_wrs.yaml")
    assert cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE == "smooth_l1"
    assert cfg.MODEL.GS.ROI.GROUP_SCALES == [32, 64, 128, 256, 512] and cfg.MODEL.ROI_HEADS.IN_FEATURES == ["p3"]


def test_proposals_come_from_as_many_boxes_as_the_paper_keeps():
    for name in YAML_FILES:
        cfg = load(name)
        if cfg.MODEL.META_ARCHITECTURE != "GroupedFastRCNN" or name.startswith("quick/"):
            continue
        rpn = cfg.MODEL.RPN
        before = (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST)
        assert before == ((50000, 200000) if is_coco(name) else (50000, 50000)), name
        num_scales = len(cfg.MODEL.GS.ROI.GROUP_SCALES)
        assert rpn.POST_NMS_TOPK_TRAIN == 1000 * num_scales, name
        assert rpn.POST_NMS_TOPK_TEST == (200 if is_coco(name) else 1000) * num_scales, name


@pytest.mark.parametrize(
    ("without", "with_groups"),
    [
        ("wider/fast_rcnn_lsiou.yaml", "wider_gs.yaml"),
        ("coco/fast_rcnn_lsiou.yaml", "coco/fast_rcnn_lsiou_sampling.yaml"),
    ],
)
def test_group_sampling_of_the_second_stage_takes_no_more_samples(without, with_groups):
    """So that rows differ in which samples they take; and there are many more proposals to take them from."""
    without, with_groups = load(without), load(with_groups)
    num_scales = len(with_groups.MODEL.GS.ROI.GROUP_SCALES)
    assert without.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == num_scales * with_groups.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    assert with_groups.MODEL.GS.GROUP_POST_NMS_TOPK_TRAIN > 7 * with_groups.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    assert without.MODEL.RPN.POST_NMS_TOPK_TRAIN == num_scales * with_groups.MODEL.GS.GROUP_POST_NMS_TOPK_TRAIN


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "MODEL.RPN.POST_NMS_TOPK_TRAIN",
            3999,
            r"1000 of each of 4 .*RPN\.POST_NMS_TOPK_TRAIN 3999, .*: set it to 4000",
        ),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", 2500, r"1000 of each of 4 .*RPN\.POST_NMS_TOPK_TEST 2500, .*: set it to 4000"),
        (
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
            1000,
            "BATCH_SIZE_PER_IMAGE 1000 samples .*TOPK_TRAIN 1000 proposals",
        ),
    ],
)
def test_counts_by_which_the_second_stage_has_nothing_to_sample_from(key, value, message):
    cfg = load("wider_gs.yaml")
    check_config(cfg)
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        check_config(cfg)
    cfg.merge_from_list(["MODEL.GS.GROUP_POST_NMS_TOPK_TRAIN", 0, "MODEL.GS.GROUP_POST_NMS_TOPK_TEST", 0])
    check_config(cfg)  # without counts of each scale there is nothing to contradict


def test_all_breaking_defaults_are_named_at_once():
    with pytest.raises(ValueError) as error:
        check_config(default_cfg())
    assert str(error.value).count("is Detectron2's default") == 9  # those of GeneralizedRCNN with its own ROI heads


def test_every_own_key_is_read():
    """Keys that nothing reads are promises that nothing keeps."""
    without = dict(leaves(get_cfg()))
    own = [key for key, _ in leaves(default_cfg()) if key not in without]
    assert "MODEL.GS.SAMPLER" in own and "TEST.GS.SCORE_THRESH" in own
    assert all(".GS." in key for key in own)
    read = set()
    for path in [ROOT / "train_net.py", *ROOT.glob("gs_d2/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    assert [key for key in own if key.split(".")[-1] not in read] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL:\n  GS:\n    SAMPLERS: 'wrs'\n", "Non-existent config key: MODEL.GS.SAMPLERS"),
        ("INPUT:\n  GS:\n    MIN_FACE: 8\n", "Non-existent config key: INPUT.GS.MIN_FACE"),
        ("MODEL:\n  GS:\n    GROUP_SCALES: 16\n", "Type mismatch"),
    ],
)
def test_unknown_yaml_is_refused(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises((KeyError, ValueError), match=message):
        default_cfg().merge_from_file(str(path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.GS.SAMPLER", "weighted", "method must be one of random, wrs, ohem, ohem_all, none, got 'weighted'"),
        ("MODEL.GS.SECOND_PASS", "first", "second_pass must be best, all or none, got 'first'"),
        ("MODEL.GS.ANCHOR_STRIDES", [[4, 8]], "anchor_strides must rise, one for each of sizes"),
        ("MODEL.GS.ANCHOR_STRIDES", [[2, 4, 4, 4]], "anchor_strides must be multiples of the map's stride 4"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou", "BBOX_REG_LOSS_TYPE must be one of smooth_l1, least_square_iou, iou"),
        ("MODEL.RPN.IOU_THRESHOLDS", [0.6, 0.4], r"thresholds must be \[low, high\] with 0 < low <= high <= 1"),
        ("MODEL.RPN.IOU_LABELS", [0, 0, 1], r"labels must be \[0, -1, 1\], got \[0, 0, 1\]"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 1.0, r"offset must be in \[0, 1\), got 1.0"),
        ("MODEL.FPN.IN_FEATURES", ["res2", "res4"], "in_features must double in stride"),
        ("MODEL.RPN.HEAD_NAME", "SoftmaxHead", "SoftmaxHead"),
        ("MODEL.META_ARCHITECTURE", "RpnDetector", "RpnDetector"),
    ],
)
def test_a_wrong_value_builds_nothing(key, value, message):
    cfg = quick_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises((ValueError, KeyError), match=message):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.GS.CLS_LOSS_TYPE", "sigmoid", "CLS_LOSS_TYPE must be one of softmax, focal, focal_normalized"),
        ("MODEL.GS.IOU_AWARE", [0.6, 0.4], r"IOU_AWARE must be empty or two rising IoUs in \[0, 1\], got \[0.6, 0.4\]"),
        ("MODEL.GS.ROI.CLS_LOSS_TYPE", "sigmoid", "CLS_LOSS_TYPE must be one of softmax, focal, focal_normalized"),
        ("MODEL.GS.ROI.SAMPLER", "hard", "method must be one of random, wrs, ohem, ohem_all, none, got 'hard'"),
        ("MODEL.GS.ROI.SCORE_ENSEMBLE", "max", "SCORE_ENSEMBLE must be one of arithmetic, geometric, none"),
        ("MODEL.GS.OHEM_NMS_THRESH", 1.5, r"OHEM_NMS_THRESH must be in \(0, 1\], got 1.5"),
        ("MODEL.GS.AUTOCAST_DTYPE", "half", "AUTOCAST_DTYPE must be bfloat16, float16 or empty, got 'half'"),
        ("MODEL.GS.ROI.GROUP_SCALES", [], "GROUP_POST_NMS_TOPK needs the reference scales of proposals"),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.6, 0.5], r"thresholds must be \[low, high\] with 0 < low <= high <= 1"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou", "BBOX_REG_LOSS_TYPE must be one of smooth_l1"),
        ("MODEL.ROI_HEADS.NAME", "GroupedHeads", "GroupedHeads"),
    ],
)
def test_a_wrong_value_builds_no_second_stage(key, value, message):
    cfg = load("quick/two_stage.yaml")
    cfg.merge_from_list([key, value])
    with pytest.raises((ValueError, KeyError), match=message):
        build_model(cfg)


def changes(name, other) -> dict:
    """Keys that the second of two files sets otherwise, and to what."""
    first, second = dict(leaves(load(name))), dict(leaves(load(other)))
    return {key: value for key, value in second.items() if value != first[key] and key != "OUTPUT_DIR"}


def test_the_papers_final_model_is_fast_rcnn_with_group_sampling():
    assert changes("wider/fast_rcnn_lsiou.yaml", "wider_gs.yaml") == {
        "MODEL.GS.ROI.GROUP_SAMPLING": True,
        "MODEL.GS.GROUP_POST_NMS_TOPK_TRAIN": 1000,
        "MODEL.GS.GROUP_POST_NMS_TOPK_TEST": 1000,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128,
    }
    cfg = load("wider_gs.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "GroupedFastRCNN" and cfg.MODEL.GS.GROUP_SAMPLING
    assert cfg.MODEL.RPN.BBOX_REG_LOSS_TYPE == cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE == "least_square_iou"
    assert (cfg.MODEL.RPN.IOU_THRESHOLDS, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS) == ([0.4, 0.6], [0.5, 0.6])
    assert cfg.MODEL.ROI_HEADS.IN_FEATURES == ["p2"] and cfg.MODEL.GS.ROI.GROUP_SCALES == [16, 32, 64, 128]


def adds_group_sampling(name) -> bool:
    if name.startswith("coco/"):
        return "_sampling" in name and "fast_rcnn" not in name
    return name.startswith(("wider/", "pipelines/")) and name.endswith("_sampling.yaml")


@pytest.mark.parametrize("name", [name for name in YAML_FILES if adds_group_sampling(name)])
def test_sampling_is_what_its_name_adds(name):
    baseline = name.replace("_sampling", "")
    added = {"MODEL.GS.GROUP_SAMPLING": True}
    if name.endswith("_ohem.yaml"):  # 1 : 3 in each group, where without groups labels compete
        added["MODEL.GS.SAMPLER"] = "ohem"
    if baseline in YAML_FILES:
        assert changes(baseline, name) == added
    assert load(name).MODEL.GS.GROUP_SAMPLING


@pytest.mark.parametrize("name", [name for name in YAML_FILES if load(name).SOLVER.REFERENCE_WORLD_SIZE])
@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
def test_any_number_of_gpus_trains_equally_long(name, num_gpus):
    cfg = load(name)
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_gpus)
    images_per_gpu = cfg.SOLVER.IMS_PER_BATCH / cfg.SOLVER.REFERENCE_WORLD_SIZE
    assert scaled.SOLVER.IMS_PER_BATCH == images_per_gpu * num_gpus
    for key in ("MAX_ITER", "CHECKPOINT_PERIOD"):
        seen = cfg.SOLVER[key] * cfg.SOLVER.IMS_PER_BATCH
        assert scaled.SOLVER[key] * scaled.SOLVER.IMS_PER_BATCH == pytest.approx(seen, abs=num_gpus)
    rate = cfg.SOLVER.BASE_LR / cfg.SOLVER.IMS_PER_BATCH
    assert scaled.SOLVER.BASE_LR / scaled.SOLVER.IMS_PER_BATCH == pytest.approx(rate)


def test_wider_trains_as_the_paper_does():
    cfg = load("Base-WIDER.yaml")
    epoch = 12880 / cfg.SOLVER.IMS_PER_BATCH
    assert cfg.SOLVER.MAX_ITER == 100 * epoch
    assert tuple(cfg.SOLVER.STEPS) == (60 * epoch, 80 * epoch)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == (0.01, 0.9, 5e-5)
    assert cfg.INPUT.GS.SCALES == [0.25 * n for n in range(1, 9)] and cfg.INPUT.GS.MAX_CROP_SIZE == 1200


def batch(num_images, scales=()):
    """Random images with two faces each and one more of each scale, the last one with none; regions to ignore."""
    height, width = (math.ceil(max(side, *scales, 0)) + 8 for side in (64, 96))
    generator = torch.Generator().manual_seed(0)
    faces = torch.tensor([[10.0, 10, 30, 34], [50, 5, 90, 60], *([4, 4, 4 + s, 4 + s] for s in scales)])
    inputs = []
    for i in range(num_images):
        boxes = faces if i < num_images - 1 or num_images == 1 else faces[:0]
        instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.zeros(len(boxes)).long())
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        ignore_boxes = Boxes(torch.tensor([[0.0, 40, 20, 60]])[: 1 - i % 2])
        inputs.append({"image": image, "instances": instances, "ignore_boxes": ignore_boxes})
    return inputs


@pytest.mark.parametrize("name", YAML_FILES)
def test_evaluations_while_training_are_cheap_where_the_whole_one_is_not(name):
    """The pyramid on all images takes as long as a good part of the training."""
    test = load_config(CONFIGS / name).TEST
    if test.GS.PYRAMID and test.EVAL_PERIOD:
        assert not test.GS.PERIODIC_PYRAMID and 0 < test.GS.PERIODIC_IMAGES <= 500


def test_the_papers_baseline_differs_in_anchors_and_sampling_alone():
    baseline, ours = dict(leaves(load("wider/fpn.yaml"))), dict(leaves(load("wider/fpn_finest_sampling.yaml")))
    changed = {key: value for key, value in baseline.items() if value != ours[key]}
    assert changed == {
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.GS.GROUP_SAMPLING": False,
        "OUTPUT_DIR": "./output/fpn",
    }


def test_resnet_152_differs_in_what_section_7_names():
    """P3, the rate and its warm-up, flip at test; the box loss, which it does not name, stays."""
    assert changes("wider/fpn_finest_sampling_lsiou.yaml", "wider/fpn_finest_sampling_r152.yaml") == {
        "MODEL.WEIGHTS": "weights/resnet152.pth",
        "MODEL.RESNETS.DEPTH": 152,
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.RPN.IN_FEATURES": ["p3"],
        "SOLVER.BASE_LR": 0.02,
        "SOLVER.WARMUP_ITERS": 20 * 12880 // 8,
        "TEST.GS.FLIP": True,
    }
    assert load("wider/fpn_finest_sampling_r152.yaml").MODEL.RPN.BBOX_REG_LOSS_TYPE == "least_square_iou"


SMALL_NET = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 16".split()
SMALL = """
    MODEL.ROI_BOX_HEAD.FC_DIM 16
    MODEL.RETINANET.NUM_CLASSES 3 MODEL.RETINANET.SCORE_THRESH_TEST 0.0 MODEL.ROI_HEADS.NUM_CLASSES 3
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 200 MODEL.RPN.PRE_NMS_TOPK_TEST 2000 MODEL.RPN.BATCH_SIZE_PER_IMAGE 8192
    MODEL.RETINANET.PRIOR_PROB 0.1 SOLVER.WARMUP_FACTOR 0.03 SOLVER.WEIGHT_DECAY 0.0 SOLVER.WEIGHT_DECAY_BIAS 0.0
""".split()


@pytest.mark.parametrize("name", YAML_FILES)
def test_trains_and_detects(name):
    cfg = load(name)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    if is_coco(name):  # its objects have up to 512 pixels, its heads many channels, P7 few of the samples
        cfg.merge_from_list([*SMALL_NET, *SMALL])
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size / 4 for size in sizes] for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
        cfg.MODEL.GS.GROUP_SCALES = [scale / 4 for scale in cfg.MODEL.GS.GROUP_SCALES]
    elif max(size for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES for size in sizes) > 256:  # images have room for it
        cfg.merge_from_list(SMALL_NET if cfg.MODEL.FPN.NORM == "" else SMALL_NET[:-2])  # GroupNorm needs 32 channels
    # Random weights give faces no higher losses than anything else: OHEM of both labels finds them among all.
    for sampler, stage in ((cfg.MODEL.GS.SAMPLER, cfg.MODEL.RPN), (cfg.MODEL.GS.ROI.SAMPLER, cfg.MODEL.ROI_HEADS)):
        if sampler == "ohem_all":
            stage.BATCH_SIZE_PER_IMAGE = 10**6
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads wait for each other more than they compute on images as small as these
    try:
        train_and_detect(CfgNode({key: cfg[key] for key in ("MODEL", "SOLVER", "TEST")}).dump())
    finally:
        torch.set_num_threads(num_threads)


LOSSES = {
    "RPNDetector": {"loss_rpn_cls", "loss_rpn_loc"},
    "GroupedFastRCNN": {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"},
    "GroupSamplingRetinaNet": {"loss_cls", "loss_box_reg"},
    "CenterNet": {"loss_heatmap", "loss_size", "loss_offset"},
}
# Heads with layers for each scale or map, which learn from faces of that scale.
HEADS_WITH_LAYERS_OF_SCALES = ("DilatedRPNHead", "PerMapRPNHead", "RetinaFaceHead")


@functools.cache  # files that differ only in their data train the same model
def train_and_detect(settings: str):
    cfg = default_cfg()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(settings))
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):  # never trained it normalises nothing: a ResNet-152 would overflow
            module.weight.fill_(0.5)
    retinanet = "RetinaNet" in cfg.MODEL.META_ARCHITECTURE
    has_layers_of_scales = cfg.MODEL.RPN.HEAD_NAME in HEADS_WITH_LAYERS_OF_SCALES
    if retinanet:
        has_layers_of_scales = cfg.MODEL.GS.RETINANET_DILATED_HEAD
    if retinanet:
        for module in model.head.modules():
            if isinstance(module, torch.nn.Conv2d):  # Detectron2's std of 0.01 is for 256 channels
                torch.nn.init.kaiming_normal_(module.weight)
    optimizer = Trainer.build_optimizer(cfg, model)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)  # its warm-up keeps a net from random weights finite
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    scales = sorted(sizes[0] if len(sizes) == 1 else [min(sizes_of_map) for sizes_of_map in sizes])
    if not has_layers_of_scales:
        scales = scales[:1]
    with EventStorage():
        for _ in range(2):
            losses = model(batch(2, scales))
            assert set(losses) == LOSSES[cfg.MODEL.META_ARCHITECTURE]
            assert all(math.isfinite(loss.item()) and loss > 0 for loss in losses.values()), losses
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            scheduler.step()
    after = dict(model.named_parameters())
    assert before and all(torch.isfinite(after[key]).all() for key in before)
    unmoved = [key for key in before if torch.equal(before[key], after[key])]
    assert unmoved == [], "a trainable parameter that training does not reach"

    model.eval()
    with torch.no_grad():
        (result,) = model([{**batch(1)[0], "height": 128, "width": 192}])
    found = result["instances"]
    assert found.image_size == (128, 192)
    assert 0 < len(found) <= cfg.TEST.DETECTIONS_PER_IMAGE
    boxes = found.pred_boxes.tensor
    assert torch.isfinite(boxes).all() and (boxes >= 0).all()
    assert (boxes <= torch.tensor([192, 128, 192, 128])).all()
    assert (found.scores >= cfg.TEST.GS.SCORE_THRESH).all() and (found.scores <= 1).all()
    assert (found.scores[1:] <= found.scores[:-1]).all()
    if cfg.MODEL.META_ARCHITECTURE in ("RPNDetector", "GroupedFastRCNN"):
        sizes = {round(size, 2) for row in cfg.MODEL.ANCHOR_GENERATOR.SIZES for size in row}
        assert {round(scale, 2) for scale in found.anchor_scales.tolist()} <= sizes


def test_every_row_is_in_the_table():
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    rows = [name for name in YAML_FILES if not Path(name).name.startswith("Base-")]
    assert [name for name in rows if f"`{name}`" not in text and f"`{Path(name).name}`" not in text] == []


def test_config_nodes_are_detectron2s():
    """Other tools (visualisers, exporters) merge and dump the config as any of Detectron2's."""
    cfg = default_cfg()
    assert isinstance(cfg.MODEL.GS, CfgNode)
    assert CfgNode(yaml.safe_load(cfg.dump())).MODEL.GS == cfg.MODEL.GS
