"""Which checkpoints stay on the disk: the last few, and the one that an evaluation found best."""

import logging
import math
import os
import re

from detectron2.engine import HookBase
from detectron2.utils import comm

from gs_d2.weights import read_weights

BEST = "model_best"
_PERIODIC = re.compile(r"model_\d{7}\.pth")
_logger = logging.getLogger(__name__)


class KeepLast(HookBase):
    """Removes periodic checkpoints but for the last `count`, after each; to come after the hook that writes them.

    Only those of this run, or of the one that it has resumed; files of any other name stay.

    Args:
        period: iterations between two checkpoints.
    """

    def __init__(self, folder: str, period: int, count: int):
        self._folder, self._period, self._count = folder, period, count
        self._others: set[tuple[float, str]] = set()

    def before_train(self):
        if self.trainer.start_iter == 0:
            self._others = set(self._checkpoints())

    def after_step(self):
        if (self.trainer.iter + 1) % self._period == 0 and comm.is_main_process():
            own = [checkpoint for checkpoint in self._checkpoints() if checkpoint not in self._others]
            for _, name in own[: -self._count]:
                os.remove(os.path.join(self._folder, name))

    def _checkpoints(self) -> list[tuple[float, str]]:
        """When each was written, and its name; the oldest first."""
        if not os.path.isdir(self._folder):
            return []
        names = [name for name in os.listdir(self._folder) if _PERIODIC.fullmatch(name)]
        return sorted((os.path.getmtime(os.path.join(self._folder, name)), name) for name in names)


class KeepBest(HookBase):
    """Saves `model_best.pth`, weights alone, whenever an evaluation gives a higher value than any before.

    To come after the hook that evaluates. A resumed run continues with the value that the file holds.

    Args:
        metric: name in TensorBoard without "periodic/", such as "wider_face/hard". The evaluation after the last
            iteration counts only where those while training leave nothing out, since others are not comparable.
    """

    def __init__(self, folder: str, metric: str):
        self._path, self._metric = os.path.join(folder, f"{BEST}.pth"), metric
        self._name, self._best, self._seen = "", -math.inf, None

    def before_train(self):
        if self.trainer.start_iter > 0 and os.path.isfile(self._path):
            saved = read_weights(self._path, mmap=True)
            if saved.get("metric", "").removeprefix("periodic/") == self._metric:
                self._name, self._best = saved["metric"], saved["value"]

    def after_step(self):
        self._save_if_best(self.trainer.iter)

    def after_train(self):
        self._save_if_best(self.trainer.iter)
        has_ended = self.trainer.iter >= self.trainer.max_iter
        if has_ended and self._name == "" and comm.is_main_process():
            _logger.warning(f"No evaluation gave SOLVER.GS.KEEP_BEST {self._metric}: there is no {self._path}")

    def _save_if_best(self, iteration: int):
        latest = self.trainer.storage.latest()
        for name in (f"periodic/{self._metric}", self._metric):
            value, when = latest.get(name, (math.nan, None))
            if when != iteration or (name, when) == self._seen:
                continue
            self._seen = (name, when)
            if self._name not in ("", name):
                return
            if value > self._best:  # not where it is NaN
                done = min(iteration, self.trainer.max_iter - 1)
                _logger.info(f"{name} {value:.4f} after iteration {done} is the best yet: saved as {self._path}")
                self._name, self._best = name, value
                self.trainer.checkpointer.save_weights(BEST, iteration=done, metric=name, value=value)
            return
