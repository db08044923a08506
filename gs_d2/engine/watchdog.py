"""Names a detector that has died while its loss looks fine: its scores are all equal, or a scale finds nothing."""

import logging
from collections import defaultdict

import numpy as np
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

_IN_A_ROW = 5  # times that statistics are written: 100 iterations
_MAX_DISTINCT = 1 / 16  # a share of the samples; a dead head has one score for each anchor of a cell
_MIN_GAP = 0.05  # of mean scores; a detector sure of everything has few different scores too, but tells faces apart
_MIN_DETECTIONS = 10  # before their scores can be said to be equal
_MIN_RANGE = 1e-4
_WHAT_TO_DO = (
    "Most often every ReLU of the head is off, which no further training repairs. Start again with a norm in the "
    "lateral convolutions (MODEL.FPN.NORM GN), a lower SOLVER.BASE_LR or longer SOLVER.WARMUP_ITERS, or "
    "SOLVER.CLIP_GRADIENTS.ENABLED True"
)
_logger = logging.getLogger(__name__)


class TrainingWatch(HookBase):
    """Warns when a scale gave all its samples the same score five times in a row: once, or again if it recovers first.

    Reads what :func:`gs_d2.modeling.criterion.log_group_statistics` writes. Times without both faces and background
    among the samples of a scale say nothing of it.
    """

    def __init__(self):
        self._since: dict[str, int] = {}
        self._count: dict[str, int] = defaultdict(int)

    def after_step(self):
        latest = self.trainer.storage.latest()
        now = {name: value for name, (value, iteration) in latest.items() if iteration == self.trainer.iter}
        dead = []
        for name, distinct in now.items():
            stage, found, scale = name.partition("/distinct_scores@")
            scores = [now.get(f"{stage}/{label}_score@{scale}") for label in ("pos", "neg")]
            if found and None not in scores and self._is_dead_since(name, distinct, *scores) == _IN_A_ROW:
                dead.append((f"{stage}@{scale}", self._since[name], *scores))
        if dead:
            which = "; ".join(
                f"{scale} since iteration {since} (mean score of faces {pos:.3g}, of background {neg:.3g})"
                for scale, since, pos, neg in dead
            )
            _logger.warning(
                f"All samples of a scale have the same score, so that it finds nothing: {which}. {_WHAT_TO_DO}"
            )

    def _is_dead_since(self, name: str, distinct: float, pos_score: float, neg_score: float) -> int:
        """How many times in a row the scale has looked dead."""
        if distinct > _MAX_DISTINCT or pos_score - neg_score > _MIN_GAP:
            self._count[name] = 0
            return 0
        if self._count[name] == 0:
            self._since[name] = self.trainer.iter
        self._count[name] += 1
        return self._count[name]


class DetectionWatch(DatasetEvaluator):
    """Warns after an evaluation of scales without any detection, and of those whose detections have one score.

    It gives no results. Detections without `anchor_scales` are looked at together.

    Args:
        dataset_name: named in the warning.
        scales: the detector's anchor scales in pixels; [] where they are not known.
    """

    def __init__(self, dataset_name: str, scales: list[float]):
        self._dataset_name, self._scales = dataset_name, [round(scale) for scale in scales]
        self.reset()

    def reset(self):
        self._num_images = 0
        self._ranges: dict[int, list] = {}  # scale, or 0 without -> [number of detections, lowest and highest score]
        self._have_scales = True

    def process(self, inputs, outputs):
        for output in outputs:
            instances = output["instances"]
            scores = instances.scores.detach().cpu().numpy()
            scales = np.zeros(len(scores), dtype=np.int64)
            self._have_scales = instances.has("anchor_scales")
            if self._have_scales:
                scales = np.rint(instances.anchor_scales.detach().cpu().numpy()).astype(np.int64)
            self._num_images += 1
            for scale in np.unique(scales).tolist():
                of_scale = scores[scales == scale]
                self._add(scale, len(of_scale), float(of_scale.min()), float(of_scale.max()))

    def evaluate(self):
        comm.synchronize()
        parts = comm.gather((self._num_images, self._have_scales, self._ranges), dst=0)
        if not comm.is_main_process():
            return {}
        self.reset()
        for num_images, have_scales, ranges in parts:
            self._num_images += num_images
            self._have_scales &= have_scales
            for scale, values in ranges.items():
                self._add(scale, *values)
        wrong = self._what_is_wrong()
        if wrong and self._num_images:
            _logger.warning(f"{self._dataset_name}{_after_iteration()}: {'; '.join(wrong)}. {_WHAT_TO_DO}")
        return {}

    def _add(self, scale, count, low, high):
        before = self._ranges.get(scale, [0, low, high])
        self._ranges[scale] = [before[0] + count, min(before[1], low), max(before[2], high)]

    def _what_is_wrong(self) -> list[str]:
        total = sum(count for count, _, _ in self._ranges.values())
        if total == 0:
            return [f"the detector finds nothing on {self._num_images} images"]
        silent = [scale for scale in self._scales if scale not in self._ranges] if self._have_scales else []
        wrong = [f"scale {scale} finds nothing, of {total} detections on {self._num_images} images" for scale in silent]
        for scale, (count, low, high) in sorted(self._ranges.items()):
            if count >= _MIN_DETECTIONS and high - low < _MIN_RANGE:
                of_scale = f" of scale {scale}" if self._have_scales else ""
                wrong.append(f"all {count} detections{of_scale} have the same score, {high:.4g}")
        return wrong


def _after_iteration() -> str:
    try:
        return f" after iteration {get_event_storage().iter}"
    except AssertionError:  # not in training
        return ""
