"""Loader workers that cannot hand over what they loaded, or have died: training ends with the reason, and never waits.

A worker's images travel through shared memory, /dev/shm on Linux, of which a container has 64 MB unless told
otherwise. Where there is no room, Python's queue drops the image in a thread of the worker and prints a traceback;
torch would wait for that image for ever. A worker that the system kills is noticed by torch, but not explained.
"""

import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from multiprocessing import resource_sharer
from multiprocessing.queues import Queue

from torch._utils import ExceptionWrapper
from torch.utils.data import Dataset, get_worker_info

_SHARED_MEMORY = "/dev/shm"
# What torch says of workers that died, and of a file descriptor that did not arrive.
_OF_WORKERS = ("DataLoader worker", "received 0 items of ancdata")
_SECONDS_AFTER_SIGTERM = 60
_SECONDS_TO_BE_HEARD = 5
_OF_A_WORKER = "in DataLoader worker process"  # of what a worker has raised
_ADVICE_ON_FILES = "Raise the limit of open files (ulimit -n), or set DATALOADER.NUM_WORKERS 0"


class InWorkers(Dataset):
    """Another data set, which loader workers hand over or say why they cannot."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        prepare_worker()
        return self._dataset[index]


def prepare_worker() -> None:
    """In a loader worker, before its first item is handed over; does nothing elsewhere.

    What cannot be handed over becomes a RuntimeError of the process that waits for it. And when workers end is for the
    training process to decide, which first finishes its iteration: the worker leaves the process group, to all of which
    torchrun sends SIGTERM, and a SIGTERM of its own, which Slurm sends to every process, ends it later.
    """
    if get_worker_info() is not None:
        Queue._on_queue_feeder_error = _send_error
        sys.excepthook = _end_without_files
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
            if hasattr(signal, "sigwaitinfo"):  # not on macOS
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
                threading.Thread(target=_await_sigterm, daemon=True).start()


def _end_without_files(kind, error, trace):
    """Called where Python's thread that hands over file descriptors fails. It would try again without end, and the
    process that waits for one would wait: that is told by a closed connection, before this worker ends."""
    sys.__excepthook__(kind, error, trace)
    if isinstance(error, OSError) and error.errno == errno.EMFILE and _is_of_handing_over(error):
        resource_sharer._resource_sharer._listener.close()
        time.sleep(_SECONDS_TO_BE_HEARD)
        os._exit(0)  # any other code would be an error of its own, wherever the process then is


def _await_sigterm():
    """Ends the worker at once if the process that it works for wants it to, else later."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        signal.alarm(_SECONDS_AFTER_SIGTERM)
    os._exit(0)  # as torch's own handler does


class _Unsent(ExceptionWrapper):
    """What torch raises in place of an item; only text, which needs no shared memory."""

    def __init__(self, message: str):
        self.message = message

    def reraise(self):
        raise RuntimeError(self.message)


def _send_error(queue: Queue, error: Exception, item) -> None:
    """Python's hook for an item of a queue that could not be sent; a worker's are (number of the batch, batch)."""
    message = f"A loader worker cannot hand over what it has loaded: {error}. {_advice(error)}"
    if isinstance(item, tuple) and len(item) == 2:
        queue.put((item[0], _Unsent(message)))
        return
    print(message, flush=True)
    os._exit(1)  # torch notices that


@contextlib.contextmanager
def explained():
    """Within it what torch raises of a worker that has died, which may be at any time, also says what to do; and what a
    worker raises says what it said there, without the traceback that torch puts into its text."""
    try:
        yield
    except Exception as error:
        if isinstance(error, EOFError | OSError) and _is_of_handing_over(error):
            # Of a worker that lives: torch itself names one that has died.
            message = f"A loader worker cannot hand over what it has loaded: it has closed the connection ({error!r})."
            raise RuntimeError(f"{message} {_ADVICE_ON_FILES}") from error
        said, name = str(error), f"{type(error).__name__}: "
        if _OF_A_WORKER in said and name in said:
            raise type(error)(said.rsplit(name, 1)[1].strip()) from error
        if not isinstance(error, RuntimeError) or not any(text in said for text in _OF_WORKERS):
            raise
        raise RuntimeError(f"{said} {_advice(error)}") from error


def _is_of_handing_over(error: Exception) -> bool:
    """Whether it was raised where Python asks a worker for a file descriptor."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename == resource_sharer.__file__ for frame, _ in frames)


def _advice(error: Exception) -> str:
    said = str(error)
    if "Too many open files" in said or "ancdata" in said:
        return _ADVICE_ON_FILES
    if not any(text in said for text in ("shared memory", "/torch_", "No space left", *_OF_WORKERS)):
        return "Correct what the data set's mapper returns; with DATALOADER.NUM_WORKERS 0 it need not be handed over"
    room = ""
    if os.path.isdir(_SHARED_MEMORY):
        total, _, free = shutil.disk_usage(_SHARED_MEMORY)
        room = f", which has {total / 2**20:.0f} MB, {free / 2**20:.0f} MB of them free"
    return (
        f"Workers hand images over in {_SHARED_MEMORY}{room}: make it larger (docker run --shm-size=8g), or lower "
        "DATALOADER.NUM_WORKERS (0 loads in the training process itself). A worker that was 'Killed' had too little "
        "memory"
    )
