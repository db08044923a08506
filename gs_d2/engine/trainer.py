"""`Trainer`: Detectron2's DefaultTrainer for this project's models, data and evaluators."""

import logging
import os
import weakref

from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import gs_d2.modeling  # noqa: F401  (registers the detectors)
from gs_d2.checkpoint import Checkpointer
from gs_d2.config import TWO_STAGES, check_training, detection_limits
from gs_d2.data import build_test_loader, build_training_views
from gs_d2.engine.step import AccumulatingTrainer
from gs_d2.engine.train_data import TrainLoader
from gs_d2.evaluation import CocoRecallEvaluator, FaceEvalEvaluator, FDDBEvaluator, WiderFaceEvaluator
from gs_d2.inference import PyramidDetector

EVALUATORS = {"face_eval": FaceEvalEvaluator, "fddb": FDDBEvaluator, "wider_face": WiderFaceEvaluator}

_logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains what a config describes; used and extended as Detectron2's DefaultTrainer.

    In addition: the keys of SOLVER.GS; processes on the CPU; with SEED >= 0 runs that repeat, and that are the same
    whether they were interrupted and resumed or not (bit by bit on the CPU). `build_train_loader` may return any
    iterable; resuming in the middle of the data needs one with `seek` (:class:`gs_d2.engine.TrainLoader`).
    """

    def __init__(self, cfg):
        """
        Raises:
            ValueError: settings of the solver that contradict each other (:func:`gs_d2.config.check_training`).
        """
        TrainerBase.__init__(self)  # DefaultTrainer's own gives DDP a GPU and takes no other trainer of steps
        for name in ("detectron2", "gs_d2"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):  # nobody has called default_setup
                setup_logger(distributed_rank=comm.get_rank(), name=name)
        check_training(cfg)
        cfg = _with_seed(self.auto_scale_workers(cfg, comm.get_world_size()))
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        on_gpu = next(model.parameters()).is_cuda
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if on_gpu else None)
        self._trainer = AccumulatingTrainer(
            model,
            data_loader,
            optimizer,
            output_dir=cfg.OUTPUT_DIR,
            seed=cfg.SEED,
            accumulation_steps=cfg.SOLVER.GS.ACCUMULATION_STEPS,
            amp=cfg.SOLVER.AMP.ENABLED,
            nonfinite_loss=cfg.SOLVER.GS.NONFINITE_LOSS,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = self.build_checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_checkpointer(cls, model, save_dir, **options):
        """What reads and writes the model's weights and, in training, the trainer's state."""
        return Checkpointer(model, save_dir, **options)

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
        if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
            raise ValueError(
                f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}, which face data sets do not have: "
                "set it to TrainingSampler, or override Trainer.build_train_loader"
            )
        return TrainLoader(
            build_training_views(cfg),
            seed=cfg.SEED,
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            batches_per_iteration=cfg.SOLVER.GS.ACCUMULATION_STEPS,
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if evaluator_type in EVALUATORS:
            return EVALUATORS[evaluator_type](dataset_name, output_folder, setting=test_setting(cfg))
        if evaluator_type == "coco" and cfg.MODEL.META_ARCHITECTURE == "RPNDetector":  # it knows no classes
            return CocoRecallEvaluator(dataset_name, output_folder, setting=test_setting(cfg))
        if evaluator_type == "coco":
            return COCOEvaluator(dataset_name, ("bbox",), output_dir=output_folder, use_fast_impl=False)
        raise ValueError(f"There is no evaluator for {dataset_name}, of evaluator_type {evaluator_type!r}")

    # Detectron2 0.5 leaves the optimizer out of its checkpoints, so that a resumed run would begin without momentum and
    # at the first rate of the warm-up; main saves it under this very name.
    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            _logger.warning(
                "The checkpoint has no state of the optimizer (Detectron2 0.5 saves none): momentum begins anew"
            )


def _with_seed(cfg):
    """The config with a SEED >= 0: where it asks for none, one that the processes agree on, new with every start."""
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.shared_random_seed()
    cfg.freeze()
    _logger.info(f"SEED is not set: data and samples are drawn with {cfg.SEED}")
    return cfg


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
    score_thresh, before_nms = gs.SCORE_THRESH, cfg.MODEL.RPN.PRE_NMS_TOPK_TEST
    if cfg.MODEL.META_ARCHITECTURE == "GroupSamplingRetinaNet":
        score_thresh = cfg.MODEL.RETINANET.SCORE_THRESH_TEST
        before_nms = f"{cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST} of each feature map"
    if cfg.MODEL.META_ARCHITECTURE in TWO_STAGES:  # its RPN's own NMS is of proposals
        per_scale = cfg.MODEL.GS.GROUP_POST_NMS_TOPK_TEST
        before_nms = f"{cfg.MODEL.RPN.POST_NMS_TOPK_TEST} proposals"
        before_nms += f", {per_scale} per reference scale" if per_scale else ""
    return {
        "test size": size,
        **pyramid,
        "score threshold": score_thresh,
        "boxes before NMS" + (" per level" if gs.PYRAMID else ""): before_nms,
        "NMS IoU": nms_thresh,
        "boxes per image": max_detections,
    }
