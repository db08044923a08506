"""What training writes to the console and to metrics.json."""

import json

from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter, get_event_storage
from fvcore.common.history_buffer import HistoryBuffer

from gs_d2.formats.json_text import json_text


class Console(CommonMetricPrinter):
    """Detectron2's, with values that ask for no smoothing, such as the groups' losses, as they are.

    They come once in 20 iterations, so that a median over 20 values would be one over 400 iterations.
    """

    def write(self):
        with _Unsmoothed(get_event_storage()):
            super().write()


class _Unsmoothed(EventStorage):
    """Another storage, whose histories of values that ask for no smoothing hold the last value alone."""

    def __init__(self, storage: EventStorage):
        self.__dict__ = storage.__dict__

    def histories(self):
        smoothed = self.smoothing_hints()
        return {name: old if smoothed[name] else _last_of(old) for name, old in super().histories().items()}


def _last_of(history: HistoryBuffer) -> HistoryBuffer:
    last = HistoryBuffer(max_length=1)
    last.update(history.latest())
    return last


class MetricsFile(JSONWriter):
    """Detectron2's, in strict JSON: null for NaN and infinity, the bare words for which strict readers refuse."""

    def __init__(self, path: str):
        super().__init__(path)
        self._file_handle = _StrictLines(self._file_handle)


class _StrictLines:
    """A file for lines of Python's JSON, which has NaN; the rest is the file's own."""

    def __init__(self, file):
        self._file = file

    def write(self, line: str) -> int:
        return self._file.write(json_text(json.loads(line), sort_keys=True) + "\n")

    def __getattr__(self, name):
        return getattr(self._file, name)
