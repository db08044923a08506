"""SIGTERM, which Slurm and containers send before they kill: all processes save, and end with a code of its own."""

import contextlib
import logging
import signal
import threading

from detectron2.engine import HookBase
from detectron2.utils import comm

EXIT_CODE = 75  # of sysexits.h, "temporary failure: try again later"
_logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Ends the program with :data:`EXIT_CODE`; what has been trained is in a checkpoint."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class StopSignal:
    """As a context, takes SIGTERM for this process: between two iterations `received` says that it has come.

    Outside the main thread Python takes no signals, and it does nothing.
    """

    def __init__(self):
        self.received = False
        self._at_once = False
        self._before = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @contextlib.contextmanager
    def at_once(self):
        """Within it the signal raises :class:`Stopped`: for what takes long and leaves nothing half done."""
        if self.received:
            raise Stopped
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _take(self, *_):
        self.received = True  # a second one, say torchrun's after Slurm's, changes nothing
        if self._at_once:
            self._at_once = False
            raise Stopped


class StopHook(HookBase):
    """Saves and raises :class:`Stopped` after the iteration in which the processes agreed to stop.

    After the last iteration there is nothing to save. To come after the scheduler's hook and before evaluations.
    """

    def after_step(self):
        if self.trainer._trainer.stop_agreed and self.trainer.iter + 1 < self.trainer.max_iter:
            save_before_stopping(self.trainer)
            comm.synchronize()  # a process that ended before would have torchrun end the one that still writes
            raise Stopped


def save_before_stopping(trainer):
    """Writes the checkpoint of an iteration that is done, in the main process."""
    _logger.warning(
        f"SIGTERM: saving after iteration {trainer.iter} and ending with exit code {EXIT_CODE}; --resume continues"
    )
    if comm.is_main_process():
        trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
