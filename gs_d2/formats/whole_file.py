"""The one writer of files that others rely on: a file appears whole or not at all, and outlives a power cut."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_PARTIAL = ".part"  # ends the name of a file that is being written


def write_whole(path: str | os.PathLike, write: Callable) -> None:
    """Writes a file beside `path`, in a folder that exists, which then takes its place at once.

    Args:
        write: is called with the file, which has `write` for bytes, and `flush`.

    Raises:
        OSError: it cannot be written, naming the path and the free space; what was there is kept.
    """
    path = os.fspath(path)
    partial, folder, sink = path + _PARTIAL, os.path.dirname(path) or ".", None
    try:
        with open(partial, "wb") as file:
            sink = _Sink(file)
            write(sink)
            if sink.error is not None:
                raise sink.error
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        if not isinstance(error, OSError):
            raise
        needed = f"it needs {sink.size / 1e6:.1f} MB, and " if sink is not None else ""
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free" if os.path.isdir(folder) else "there is none"
        raise OSError(
            error.errno,
            f"cannot write {path} ({error.strerror or error}): {needed}{free} in its folder; what was there is kept",
        ) from error
    _sync_folder(folder)


def write_text(path: str | os.PathLike, text: str) -> None:
    """:func:`write_whole` of a text as UTF-8, into a folder that is made where missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(text.encode()))


class _Sink:
    """A file for torch.save, which takes errors of writing badly: keeps the first, and then only counts bytes."""

    def __init__(self, file):
        self._file, self.size, self.error = file, 0, None

    def write(self, data):
        size = memoryview(data).nbytes
        self.size += size
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return size

    def flush(self):
        pass


def _sync_folder(folder):
    """So that the new name outlives a power cut, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
