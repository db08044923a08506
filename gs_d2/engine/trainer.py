"""`Trainer`: Detectron2's DefaultTrainer for this project's models, data and evaluators."""

import contextlib
import logging
import os
import weakref
from dataclasses import replace

from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluators
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import TensorboardXWriter
from detectron2.utils.logger import setup_logger
from torch.nn.parallel import DistributedDataParallel

from gs_d2.checkpoint import Checkpointer
from gs_d2.data import build_test_loader, build_training_views, register_subset
from gs_d2.data.workers import explained
from gs_d2.engine.checks import check_classes, check_training
from gs_d2.engine.keeping import KeepBest, KeepLast
from gs_d2.engine.left_out import LeftOutHook
from gs_d2.engine.optimizer import build_optimizer
from gs_d2.engine.resuming import (
    RunSettings,
    check_optimizer,
    iterations_done,
    report_changes,
    resume_rate,
    settings_of,
    state_of,
)
from gs_d2.engine.schedule import FLAT_DECAY, FlatThenDecay
from gs_d2.engine.step import AccumulatingTrainer
from gs_d2.engine.stopping import StopHook, Stopped, StopSignal, save_before_stopping
from gs_d2.engine.train_data import TrainLoader
from gs_d2.engine.watchdog import DetectionWatch, TrainingWatch
from gs_d2.engine.writers import Console, MetricsFile
from gs_d2.evaluation import (
    CocoEvaluator,
    CocoRecallEvaluator,
    FaceEvalEvaluator,
    FDDBEvaluator,
    WiderFaceEvaluator,
)
from gs_d2.inference import PyramidDetector
from gs_d2.modeling import description_of

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
            ValueError: settings of the solver that contradict each other (:func:`gs_d2.engine.checks.check_training`);
                or a data set cannot be trained on or tested on, which is said now and not after training.
        """
        TrainerBase.__init__(self)  # DefaultTrainer's own gives DDP a GPU and takes no other trainer of steps
        for name in ("detectron2", "gs_d2"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):  # nobody has called default_setup
                setup_logger(distributed_rank=comm.get_rank(), name=name)
        check_training(cfg)
        reference_world_size = cfg.SOLVER.REFERENCE_WORLD_SIZE
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self._seed_is_random = cfg.SEED < 0
        if self._seed_is_random:
            cfg = _with_seed(cfg, comm.shared_random_seed())
            _logger.info(f"SEED is not set: data and samples are chosen with {cfg.SEED}")
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self.check_evaluation(cfg)
        check_classes(cfg)
        on_gpu = next(model.parameters()).is_cuda
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if on_gpu else None)
        self._stop_signal = stop_signal = StopSignal()
        self._trainer = AccumulatingTrainer(
            model,
            data_loader,
            optimizer,
            output_dir=cfg.OUTPUT_DIR,
            seed=cfg.SEED,
            accumulation_steps=cfg.SOLVER.GS.ACCUMULATION_STEPS,
            amp=cfg.SOLVER.AMP.ENABLED,
            nonfinite_loss=cfg.SOLVER.GS.NONFINITE_LOSS,
            ema_decay=cfg.SOLVER.GS.EMA_DECAY,
            should_stop=lambda: stop_signal.received,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        average = self._trainer.weight_average
        options = {} if average is None else {"weights": average.averaged_state_dict}
        self.checkpointer = self.build_checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **options)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._run_settings = RunSettings.of(cfg, reference_world_size)
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg, num_workers):
        """Detectron2's, and SOLVER.GS.DECAY_ITERS as it scales MAX_ITER; periods stay at least 1."""
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            frozen = scaled.is_frozen()
            scaled.defrost()
            if cfg.SOLVER.GS.DECAY_ITERS > 0:
                decay_iters = cfg.SOLVER.GS.DECAY_ITERS * cfg.SOLVER.REFERENCE_WORLD_SIZE / num_workers
                scaled.SOLVER.GS.DECAY_ITERS = max(1, round(decay_iters))
            scaled.SOLVER.CHECKPOINT_PERIOD = max(1, scaled.SOLVER.CHECKPOINT_PERIOD)
            if cfg.TEST.EVAL_PERIOD > 0:
                scaled.TEST.EVAL_PERIOD = max(1, scaled.TEST.EVAL_PERIOD)
            if frozen:
                scaled.freeze()
        return scaled

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        if cfg.SOLVER.LR_SCHEDULER_NAME != FLAT_DECAY:
            return super().build_lr_scheduler(cfg, optimizer)
        multiplier = FlatThenDecay(
            max_iter=cfg.SOLVER.MAX_ITER,
            decay_iters=cfg.SOLVER.GS.DECAY_ITERS,
            warmup_iters=cfg.SOLVER.WARMUP_ITERS,
            warmup_factor=cfg.SOLVER.WARMUP_FACTOR,
            warmup_method=cfg.SOLVER.WARMUP_METHOD,
        )
        return LRMultiplier(optimizer, multiplier=multiplier, max_iter=cfg.SOLVER.MAX_ITER)

    def build_writers(self):
        """Detectron2's, but for what :mod:`gs_d2.engine.writers` has."""
        folder = self.cfg.OUTPUT_DIR
        os.makedirs(folder, exist_ok=True)
        metrics_file = MetricsFile(os.path.join(folder, "metrics.json"))
        return [Console(self.max_iter), metrics_file, TensorboardXWriter(folder)]

    def build_hooks(self):
        """Detectron2's, with evaluations of the averaged weights where there are any, and a watch over the scores."""
        evaluation = hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        around = [StopHook(), evaluation]
        if self.cfg.SOLVER.GS.KEEP_LAST:
            solver = self.cfg.SOLVER
            around.insert(0, KeepLast(self.cfg.OUTPUT_DIR, solver.CHECKPOINT_PERIOD, solver.GS.KEEP_LAST))
        if self.cfg.SOLVER.GS.KEEP_BEST:
            around.append(KeepBest(self.cfg.OUTPUT_DIR, self.cfg.SOLVER.GS.KEEP_BEST))
        views = getattr(self.data_loader, "views", None)
        if hasattr(views, "left_out"):
            around.append(LeftOutHook(views))
        built = []
        for hook in super().build_hooks():
            built += around if isinstance(hook, hooks.EvalHook) else [hook]
        return [*built, TrainingWatch()] if comm.is_main_process() else built

    def _evaluate(self):
        cfg, short_cut = self.cfg, ""
        if self.iter < self.max_iter:  # not at the end, when all iterations have been counted
            cfg, short_cut = periodic_config(cfg)
        if short_cut:
            _logger.info(
                f"Evaluation after iteration {self.iter}: {short_cut}. These results, periodic/... in TensorBoard, are "
                "not those of the whole test, which comes after the last iteration"
            )
        average = self._trainer.weight_average
        try:
            with contextlib.nullcontext() if average is None else average.swapped_in(), self._stop_signal.at_once():
                results = self.test(cfg, self.model)
        except Stopped:
            if self.iter < self.max_iter:
                save_before_stopping(self)
            else:
                _logger.warning("SIGTERM: training has ended, but not its evaluation; --resume does that")
            raise
        self._last_eval_results = {"periodic": results} if results and short_cut else results
        return self._last_eval_results

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
        if evaluators is None:
            scales = _anchor_scales(model)
            evaluators = [
                DatasetEvaluators([cls.build_evaluator(cfg, name), DetectionWatch(name, scales)])
                for name in cfg.DATASETS.TEST
            ]
        with explained(), _detections_by_scale(cfg, model):
            return super().test(cfg, PyramidDetector(cfg, model) if cfg.TEST.GS.PYRAMID else model, evaluators)

    @classmethod
    def check_evaluation(cls, cfg):
        """Builds what :meth:`test` uses, so that a data set that cannot be evaluated is refused before training; to be
        overridden where `test` is."""
        for name in cfg.DATASETS.TEST:
            cls.build_test_loader(cfg, name)
            with contextlib.suppress(NotImplementedError):  # as Detectron2's `test` does
                cls.build_evaluator(cfg, name)

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

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
        metadata = MetadataCatalog.get(dataset_name)
        evaluator_type, subset_of = metadata.get("evaluator_type"), metadata.get("subset_of")
        setting = {**({"images": subset_of} if subset_of else {}), **test_setting(cfg)}
        if evaluator_type in EVALUATORS:
            return EVALUATORS[evaluator_type](dataset_name, output_folder, setting=setting)
        if evaluator_type == "coco" and description_of(cfg.MODEL.META_ARCHITECTURE).class_agnostic:
            return CocoRecallEvaluator(dataset_name, output_folder, setting=setting)
        if evaluator_type == "coco":
            return CocoEvaluator(dataset_name, ("bbox",), output_dir=output_folder, use_fast_impl=False)
        raise ValueError(f"There is no evaluator for {dataset_name}, of evaluator_type {evaluator_type!r}")

    # Detectron2 0.5 leaves the optimizer out of its checkpoints, so that a resumed run would begin without momentum and
    # at the first rate of the warm-up; main saves it under this very name.
    def state_dict(self):
        return {
            **super().state_dict(),
            "_trainer": self._trainer.state_dict(),
            "run": state_of(self._run_settings, self.iter + 1),
        }

    def load_state_dict(self, state_dict):
        """
        Raises:
            ValueError: the checkpoint's run had another optimizer; or another batch, and it cannot be converted to this
                run's (:func:`gs_d2.engine.resuming.iterations_done`).
        """
        before = settings_of(state_dict.get("run"))
        if before is not None:
            check_optimizer(before, self._run_settings)
        if before is not None and self._seed_is_random:
            self._take_seed(before.seed)
        done = state_dict["iteration"] + 1
        converted = done if before is None else iterations_done(before, self._run_settings, done)
        base_lrs = list(getattr(self.scheduler, "base_lrs", []))
        TrainerBase.load_state_dict(self, state_dict)
        self.iter = converted - 1
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            _logger.warning(
                "The checkpoint has no state of the optimizer (Detectron2 0.5 saves none): momentum starts from zero"
            )
        if before is not None:
            report_changes(before, self._run_settings, self.scheduler)
        is_same_run = "_trainer" in state_dict and converted == done
        resume_rate(self.cfg, self.scheduler, base_lrs, converted, compare=is_same_run)

    def train(self):
        """Detectron2's. Where nothing is left to train, there still are a final model and an evaluation.

        Raises:
            Stopped: SIGTERM came, in any of the processes; there is a checkpoint.
        """
        if self.start_iter >= self.max_iter and self.start_iter > 0:
            _logger.info(f"All {self.max_iter} iterations have been trained")
            # The run may have ended between its last periodic checkpoint and its final model.
            if comm.is_main_process() and not self.checkpointer.get_checkpoint_file().endswith("model_final.pth"):
                self.checkpointer.save("model_final", iteration=self.iter)
        with self._stop_signal:
            return super().train()

    def _take_seed(self, seed: int):
        """Goes on with the seed that the checkpoint's run chose."""
        self.cfg = _with_seed(self.cfg, seed)
        self._run_settings = replace(self._run_settings, seed=seed)
        self._trainer.seed = seed
        if hasattr(self.data_loader, "reseed"):
            self.data_loader.reseed(seed)
        _logger.info(f"SEED is not set: data and samples continue with {seed}, which the checkpoint's run chose")


@contextlib.contextmanager
def _detections_by_scale(cfg, model):
    """Has the model return what WiderFaceEvaluator needs for AP by anchor scale, where that is asked for."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    types = {MetadataCatalog.get(name).get("evaluator_type") for name in cfg.DATASETS.TEST}
    if not (cfg.TEST.GS.AP_BY_SCALE and "wider_face" in types and hasattr(model, "by_scale")):
        yield
        return
    before, model.by_scale = model.by_scale, True
    try:
        yield
    finally:
        model.by_scale = before


def _with_seed(cfg, seed: int):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg


def _anchor_scales(model) -> list[float]:
    """In pixels; [] of a detector that has no proposal generator of this project."""
    generator = getattr(getattr(model, "module", model), "proposal_generator", None)
    return list(getattr(getattr(generator, "anchor_generator", None), "scales", []))


def periodic_config(cfg):
    """The config that periodic evaluations use, and in words what they leave out: "" for nothing, with `cfg` itself.

    TEST.GS.PERIODIC_IMAGES and PERIODIC_PYRAMID say what. With either, files go to OUTPUT_DIR/periodic.
    """
    num_images, single_scale = cfg.TEST.GS.PERIODIC_IMAGES, cfg.TEST.GS.PYRAMID and not cfg.TEST.GS.PERIODIC_PYRAMID
    if not num_images and not single_scale:
        return cfg, ""
    left_out = [f"subset of {num_images} images of each test set" if num_images else "all images"]
    left_out += ["single scale"] if single_scale else []
    cfg = cfg.clone()
    cfg.defrost()
    if single_scale:
        cfg.TEST.GS.PYRAMID = False
    if num_images:
        cfg.DATASETS.TEST = tuple(register_subset(name, num_images) for name in cfg.DATASETS.TEST)
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "periodic")
    cfg.freeze()
    return cfg, ", ".join(left_out)


def test_setting(cfg):
    """The settings that results depend on besides the weights; printed beneath them."""
    gs, detector = cfg.TEST.GS, description_of(cfg.MODEL.META_ARCHITECTURE).test_settings(cfg)
    size = "original"
    pyramid = {}
    if gs.PYRAMID:
        size = f"{', '.join(f'{scale:g}' for scale in sorted(gs.SCALES))} x original, sides <= {gs.MAX_SIZE}"
        pyramid = {"flip": gs.FLIP, "box voting": gs.BOX_VOTING, "level box size": list(gs.LEVEL_BOX_SIZE) or "all"}
    elif cfg.INPUT.MIN_SIZE_TEST > 0:
        size = f"short side {cfg.INPUT.MIN_SIZE_TEST}, long side <= {cfg.INPUT.MAX_SIZE_TEST}"
    return {
        "test size": size,
        **pyramid,
        "score threshold": detector.score_thresh,
        "boxes before NMS" + (" per level" if gs.PYRAMID else ""): detector.before_nms,
        "NMS IoU": detector.nms_thresh,
        "boxes per image": detector.max_detections,
    }
