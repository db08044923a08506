#!/usr/bin/env python
"""Trains and evaluates, with Detectron2's own flags.

python train_net.py --config-file configs/wider/fpn_finest_sampling.yaml --num-gpus 8
python train_net.py --config-file ... --resume
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/.../model_final.pth
"""

import os
import sys
import weakref

import torch

from gs_d2 import compat  # noqa: F401  isort: skip  (says how to install Detectron2 where it is missing)

from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import gs_d2.modeling  # noqa: F401  (registers the detectors)
from gs_d2.checkpoint import Checkpointer
from gs_d2.config import check_config, detection_limits, load_config
from gs_d2.data import build_test_loader, build_train_loader
from gs_d2.evaluation import FaceEvalEvaluator, FDDBEvaluator, WiderFaceEvaluator
from gs_d2.inference import PyramidDetector

EVALUATORS = {"face_eval": FaceEvalEvaluator, "fddb": FDDBEvaluator, "wider_face": WiderFaceEvaluator}


class Trainer(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        if cfg.TEST.GS.PYRAMID:
            PyramidDetector(cfg, model)  # what is wrong with its settings is said now, not at the first evaluation
        return model

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return super().test(cfg, PyramidDetector(cfg, model) if cfg.TEST.GS.PYRAMID else model, evaluators)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if evaluator_type in EVALUATORS:
            return EVALUATORS[evaluator_type](dataset_name, output_folder, setting=test_setting(cfg))
        raise ValueError(f"There is no evaluator for {dataset_name}, of evaluator_type {evaluator_type!r}")

    def build_hooks(self):
        # Where both versions of Detectron2 have made their own checkpointer, and nothing uses it yet.
        self.checkpointer = Checkpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        return super().build_hooks()

    # Detectron2 0.5 leaves the optimizer out of its checkpoints, so that a resumed run would begin without momentum and
    # at the first rate of the warm-up; main saves it under this very name.
    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])


def test_setting(cfg):
    """What a figure depends on besides the weights; printed beside it."""
    gs = cfg.TEST.GS
    nms_thresh, max_detections = detection_limits(cfg)
    size = "original"
    pyramid = {}
    if gs.PYRAMID:
        size = f"{', '.join(f'{scale:g}' for scale in sorted(gs.SCALES))} x original, sides <= {gs.MAX_SIZE}"
        pyramid = {"flip": gs.FLIP, "box voting": gs.BOX_VOTING, "level box size": list(gs.LEVEL_BOX_SIZE) or "all"}
    elif cfg.INPUT.MIN_SIZE_TEST > 0:
        size = f"short side {cfg.INPUT.MIN_SIZE_TEST}, long side <= {cfg.INPUT.MAX_SIZE_TEST}"
    before_nms = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST
    if cfg.MODEL.META_ARCHITECTURE == "GroupedFastRCNN":  # its RPN's own NMS is of proposals
        per_scale = cfg.MODEL.GS.GROUP_POST_NMS_TOPK_TEST
        before_nms = f"{cfg.MODEL.RPN.POST_NMS_TOPK_TEST} proposals"
        before_nms += f", {per_scale} per reference scale" if per_scale else ""
    return {
        "test size": size,
        **pyramid,
        "score threshold": gs.SCORE_THRESH,
        "boxes before NMS" + (" per level" if gs.PYRAMID else ""): before_nms,
        "NMS IoU": nms_thresh,
        "boxes per image": max_detections,
    }


def setup(args):
    try:
        cfg = load_config(args.config_file, args.opts)
        check_config(cfg)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    cfg.freeze()
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE} and torch sees no GPU. "
            "Add MODEL.DEVICE cpu to the command, or use a config of configs/quick."
        )
    if args.eval_only and not args.resume and not cfg.MODEL.WEIGHTS:
        sys.exit("--eval-only needs weights: add MODEL.WEIGHTS path/to/model_final.pth to the command")
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gs_d2")
    return cfg


def main(args):
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, allow_pickle=args.allow_pickle, strict=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.checkpointer.allow_pickle = args.allow_pickle
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read weights that are pickles, which can run any code (docs/files.md)",
    )
    args = parser.parse_args()
    if not args.config_file:
        parser.error("--config-file is needed, for example configs/quick/demo.yaml")
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
