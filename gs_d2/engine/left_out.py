"""Counts the training images that could not be used, in the log and in TensorBoard."""

import logging

from detectron2.engine import HookBase
from detectron2.utils import comm

_PERIOD = 20  # iterations, in the last of which Detectron2 writes
_logger = logging.getLogger(__name__)


class LeftOutHook(HookBase):
    """Writes `left_out_images`, which any of the processes could not use, and `read_errors`, how often a drive did not
    answer them; once there are any. To come in all processes, before the hook that writes.

    Args:
        views: with `left_out` and `num_read_errors` as :class:`gs_d2.data.loaders.TrainingViews` has them.
    """

    def __init__(self, views):
        self._views = views
        self._said = (0, 0)

    def after_step(self):
        if (self.trainer.iter + 1) % _PERIOD and self.trainer.iter + 1 != self.trainer.max_iter:
            return
        parts = comm.gather((self._views.left_out, self._views.num_read_errors), dst=0)
        if not comm.is_main_process():
            return
        counts = (len(set().union(*(left_out for left_out, _ in parts))), sum(errors for _, errors in parts))
        if counts == (0, 0):
            return
        self.trainer.storage.put_scalars(left_out_images=counts[0], read_errors=counts[1], smoothing_hint=False)
        if counts != self._said:
            self._said = counts
            _logger.warning(
                f"So far {counts[0]:,} of {len(self._views):,} images cannot be trained on, and {counts[1]:,} times "
                "a drive did not answer, so that another image was taken"
            )
