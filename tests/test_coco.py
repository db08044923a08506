"""COCO from its files to its metrics: a toy data set trains and is evaluated by the official API, and by its mapper."""

import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import gs_d2.modeling  # noqa: F401  (registers the detectors)
from gs_d2 import engine
from gs_d2.config import add_gs_config, check_config
from gs_d2.data import CocoDatasetMapper, FaceDatasetMapper, dataset_mapper_of
from gs_d2.engine import Trainer
from gs_d2.evaluation import CocoEvaluator, CocoRecallEvaluator
from gs_d2.inference import FaceDetector, PyramidDetector

TOY = """
    MODEL.WEIGHTS '' MODEL.DEVICE cpu MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.NORM GN
    MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 32 MODEL.FPN.NORM GN MODEL.ROI_BOX_HEAD.FC_DIM 32
    MODEL.RETINANET.NUM_CLASSES 3 MODEL.ROI_HEADS.NUM_CLASSES 3 MODEL.RETINANET.SCORE_THRESH_TEST 0.0
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 200 MODEL.RPN.PRE_NMS_TOPK_TEST 500
    INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 INPUT.MAX_SIZE_TEST 160 DATALOADER.NUM_WORKERS 0
    SOLVER.IMS_PER_BATCH 2 SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) TEST.EVAL_PERIOD 0
    DATASETS.TRAIN ('coco_toy_train',) DATASETS.TEST ('coco_toy_val',)
""".split()


def toy_cfg(name, *opts):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(f"configs/coco/{name}.yaml")
    cfg.merge_from_list([*TOY, *opts])
    check_config(cfg)
    return cfg


@pytest.mark.parametrize(
    ("name", "task", "metrics", "evaluator"),
    [
        ("fpn", "box_proposals", {"AR@100", "ARs@100", "ARm@100", "AR@1000"}, CocoRecallEvaluator),
        ("retinanet_sampling_wrs", "bbox", {"AP", "AP50", "APs", "APm"}, CocoEvaluator),
        ("fast_rcnn_lsiou_sampling", "bbox", {"AP", "AP50", "APs", "APm"}, CocoEvaluator),
    ],
)
def test_trains_and_is_evaluated_by_the_official_api(name, task, metrics, evaluator, coco_toy, tmp_path):
    cfg = toy_cfg(name, "OUTPUT_DIR", str(tmp_path))
    trainer = Trainer(cfg)
    trainer.train()
    assert type(trainer.build_evaluator(cfg, "coco_toy_val")) is evaluator
    results = trainer.test(cfg, trainer.model)
    assert metrics <= set(results[task])
    assert all(0 <= results[task][metric] <= 100 for metric in metrics)


def test_what_is_annotated_is_all_that_is_to_be_found(coco_toy, tmp_path):
    """The annotations themselves as detections: 100 in every metric. Swapped classes or another size would show."""
    cfg = toy_cfg("fast_rcnn", "OUTPUT_DIR", str(tmp_path))
    evaluator = Trainer.build_evaluator(cfg, "coco_toy_val")
    evaluator.reset()
    records = {record["file_name"]: record for record in DatasetCatalog.get("coco_toy_val")}
    for (image,) in Trainer.build_test_loader(cfg, "coco_toy_val"):
        objects = [x for x in records[image["file_name"]]["annotations"] if not x.get("iscrowd")]
        boxes = torch.tensor([x["bbox"] for x in objects]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((image["height"], image["width"]), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
        found.pred_classes = torch.tensor([x["category_id"] for x in objects], dtype=torch.int64)
        evaluator.process([image], [{"instances": found}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == pytest.approx(100) and results["AP50"] == pytest.approx(100)


@pytest.mark.parametrize("name", ["retinanet", "fast_rcnn"])
def test_detector_of_one_picture_keeps_the_confidence_threshold(name, tmp_path):
    cfg = toy_cfg(name)
    torch.manual_seed(0)
    torch.save(build_model(cfg).state_dict(), tmp_path / "weights.pth")
    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    _, low = FaceDetector(cfg, tmp_path / "weights.pth", confidence_threshold=0.0).detect(picture)
    middle = float(np.median(low))
    assert low.min() < middle < low.max()
    _, high = FaceDetector(cfg, tmp_path / "weights.pth", confidence_threshold=middle).detect(picture)
    assert 0 < len(high) and high.min() >= middle


def test_final_nms_is_within_a_class():
    model = build_model(toy_cfg("fast_rcnn"))
    candidates = Instances((120, 160), pred_boxes=Boxes(torch.tensor([[10.0, 10, 60, 60]]).repeat(4, 1)))
    candidates.scores, candidates.pred_classes = torch.tensor([0.5, 0.9, 0.8, 0.7]), torch.tensor([0, 2, 0, 2])
    kept = model.select_detections(candidates)
    assert kept.scores.tolist() == pytest.approx([0.9, 0.8]) and kept.pred_classes.tolist() == [2, 0]


@pytest.mark.parametrize("training", [False, True])
def test_nothing_found_among_several_classes(training):
    model = build_model(toy_cfg("fast_rcnn", "TEST.GS.SCORE_THRESH", 1.0)).train(training)
    image = {"image": torch.zeros(3, 96, 128, dtype=torch.uint8)}
    if not training:
        (result,) = model([image])
        assert len(result["instances"]) == 0
        return
    nothing = Instances((96, 128), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))
    everywhere = Boxes(torch.tensor([[-500.0, -500, 700, 700]]))
    with EventStorage():
        losses = model([{**image, "instances": nothing, "ignore_boxes": everywhere}])
    assert len(losses) == 4 and all(loss == 0 and loss.requires_grad for loss in losses.values())


def test_box_voting_of_several_classes_is_refused():
    opts = ("TEST.GS.PYRAMID", True, "INPUT.MIN_SIZE_TEST", 0)
    model = build_model(toy_cfg("fast_rcnn"))
    PyramidDetector(toy_cfg("fast_rcnn", *opts), model)
    with pytest.raises(ValueError, match=r"BOX_VOTING knows no classes, and the model tells several apart: set it"):
        PyramidDetector(toy_cfg("fast_rcnn", *opts, "TEST.GS.BOX_VOTING", True), model)


def test_detectron2s_proposal_network_takes_the_rpn(coco_toy):
    """It passes no regions to ignore, which is why the configs have RPNDetector; otherwise it trains and proposes."""
    cfg = toy_cfg("fpn_finest_sampling", "MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.NMS_THRESH", "0.7")
    model = build_model(cfg)
    mapper = CocoDatasetMapper(cfg, is_train=True)
    image = mapper(DatasetCatalog.get("coco_toy_train")[0])
    with EventStorage():
        losses = model([image])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
    (result,) = model.eval()([image])
    assert len(result["proposals"]) > 0 and result["proposals"].has("objectness_logits")


def test_mapper_keeps_classes_and_ignores_crowds(coco_toy):
    cfg = toy_cfg("fpn", "INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (240,))
    mapper = dataset_mapper_of("coco_toy_train")(cfg, is_train=True)
    assert type(mapper) is CocoDatasetMapper and dataset_mapper_of("wider_face_train") is FaceDatasetMapper
    record = DatasetCatalog.get("coco_toy_train")[0]
    annotations = record["annotations"]
    view = mapper(record)
    assert view["image"].shape == (3, 240, 320) and (view["height"], view["width"]) == (120, 160)
    assert [x["iscrowd"] for x in annotations] == [0, 0, 1]
    assert view["instances"].gt_classes.tolist() == [0, 1]  # contiguous, of category ids 2 and 5
    wanted = torch.tensor([[x, y, min(x + w, 160), min(y + h, 120)] for x, y, w, h in (a["bbox"] for a in annotations)])
    torch.testing.assert_close(view["instances"].gt_boxes.tensor, 2.0 * wanted[:2])
    torch.testing.assert_close(view["ignore_boxes"].tensor, 2.0 * wanted[2:])
    assert "annotations" in record and "gt_boxes" not in record, "the data set's dict is left alone"


def test_an_image_without_objects_is_a_negative(coco_toy):
    empty = next(x for x in DatasetCatalog.get("coco_toy_train") if not x["annotations"])
    view = CocoDatasetMapper(toy_cfg("fpn"), is_train=True)(empty)
    assert len(view["instances"]) == len(view["ignore_boxes"]) == 0
    assert view["instances"].gt_boxes.tensor.shape == (0, 4) and view["instances"].gt_classes.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "size"), [("fpn", (100, 130)), ("retinanet", (83, 110))], ids=["cropped", "RetinaNet's: resized"]
)
def test_training_size(name, size, coco_toy):
    """The paper crops what is longer than the limit; RetinaNet's own setting shrinks it."""
    crop = 130 if name == "fpn" else 0
    opts = ("INPUT.MIN_SIZE_TRAIN", (100,), "INPUT.MAX_SIZE_TRAIN", 110, "INPUT.GS.MAX_CROP_SIZE", crop)
    view = CocoDatasetMapper(toy_cfg(name, *opts), is_train=True)(DatasetCatalog.get("coco_toy_train")[0])
    assert tuple(view["image"].shape[1:]) == size


def test_short_side_crop_takes_its_place_at_random():
    from gs_d2.data import ShortSideCrop

    image, seen = np.zeros((400, 1000, 3), np.uint8), set()
    for _ in range(20):
        transforms = ShortSideCrop([800], 1200).get_transform(image)
        assert transforms.apply_image(image).shape == (800, 1200, 3)
        seen.add(float(transforms.apply_box(np.array([[500.0, 0, 510, 10]]))[0, 0]))
    assert len(seen) > 5


@pytest.mark.parametrize(
    ("name", "expected"), [("fpn", (0.7, 1000)), ("retinanet", (0.5, 100)), ("fast_rcnn", (0.5, 100))]
)
def test_limits_of_detections(name, expected):
    cfg = toy_cfg(name)
    setting = engine.test_setting(cfg)
    assert (setting["NMS IoU"], setting["boxes per image"]) == expected
    if name == "retinanet":
        assert setting["boxes before NMS"] == "1000 of each feature map" and setting["score threshold"] == 0


def test_schedule_is_twelve_epochs():
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file("configs/Base-COCO.yaml")
    epoch = 118287 / cfg.SOLVER.IMS_PER_BATCH
    assert cfg.SOLVER.MAX_ITER == math.ceil(12 * epoch)
    assert tuple(cfg.SOLVER.STEPS) == (math.ceil(8 * epoch), math.ceil(10 * epoch))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == (0.005, 0.9, 5e-5)
