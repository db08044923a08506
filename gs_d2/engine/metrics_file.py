"""metrics.json without the bare words NaN and Infinity, which strict readers refuse."""

import json

from detectron2.utils.events import EventWriter, JSONWriter

from gs_d2.formats.json_text import json_text


def with_strict_json(writers: list[EventWriter]) -> list[EventWriter]:
    """The writers, of which Detectron2's of metrics.json now writes null for NaN and infinity."""
    for writer in writers:
        if isinstance(writer, JSONWriter):
            writer._file_handle = _StrictLines(writer._file_handle)
    return writers


class _StrictLines:
    """A file for lines of Python's JSON, which has NaN; the rest is the file's own."""

    def __init__(self, file):
        self._file = file

    def write(self, line: str) -> int:
        return self._file.write(json_text(json.loads(line), sort_keys=True) + "\n")

    def __getattr__(self, name):
        return getattr(self._file, name)
