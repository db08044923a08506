"""Our registered data sets in Detectron2's own trainer, loader and evaluator, without a class of this project."""

import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.engine import DefaultTrainer

from gs_d2.data import register_wider_face

NAME = "detectron2s_own_test"


@pytest.fixture(autouse=True)
def registered(drawn_datasets):
    base = drawn_datasets / "widerface"
    register_wider_face(NAME, base / "wider_face_split/wider_face_train_bbx_gt.txt", base / "WIDER_train/images")
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.BACKBONE.FREEZE_AT", 0),
            *("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path)),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,), "INPUT.MIN_SIZE_TRAIN", (96,)),
        ]
    )
    return cfg


def test_the_default_trainer_trains(tmp_path):
    trainer = DefaultTrainer(config(tmp_path))
    trainer.train()
    losses = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert losses["loss_rpn_cls"] > 0 and losses["loss_rpn_loc"] > 0, "it has found the boxes"


def test_its_loader_has_the_faces(tmp_path):
    batch = next(iter(build_detection_train_loader(config(tmp_path))))
    faces = {record["file_name"]: int((~record["gt_ignore"]).sum()) for record in DatasetCatalog.get(NAME)}
    assert [len(image["instances"]) for image in batch] == [faces[image["file_name"]] for image in batch]
    assert all((image["height"], image["width"]) == (96, 128) for image in batch)


def test_its_conversion_to_cocos_format():
    content, records = convert_to_coco_dict(NAME), DatasetCatalog.get(NAME)
    assert [(x["id"], x["width"], x["height"]) for x in content["images"]] == [
        (x["image_id"], 128, 96) for x in records
    ]
    boxes = [box for record in records for box in record["gt_boxes"].tolist()]
    converted = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in content["annotations"])]
    np.testing.assert_allclose(converted, boxes, atol=0.002)
