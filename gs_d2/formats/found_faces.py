"""Faces found in pictures or frames, as files: one JSON of all, and a crop of each with a table."""

import csv
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from gs_d2.formats.images import save_picture
from gs_d2.formats.json_text import json_text
from gs_d2.formats.whole_file import write_text

TABLE = "faces.csv"  # in the folder of the crops

_MARGIN = 0.2  # of a box's width and height, on each side of a crop


def free_path(folder: str | os.PathLike, stem: str, suffix: str, taken: set) -> Path:
    """The path of `stem + suffix` in a folder, or of the first of `stem_2`, `stem_3`, ... that is not taken yet.

    Args:
        taken: keys of :func:`path_key`; the path's is added.
    """
    i, path = 1, Path(folder, stem + suffix)
    while path_key(path) in taken:
        i += 1
        path = Path(folder, f"{stem}_{i}{suffix}")
    taken.add(path_key(path))
    return path


def path_key(path: str | os.PathLike) -> str:
    """The same for two paths that are one file on some system; some take `A.jpg` for `a.jpg`."""
    return os.path.realpath(path).lower()


def record(file: str, image: Image.Image, boxes, scores, frame: int | None = None) -> dict:
    """What the JSON says of a picture or frame; arguments as of :meth:`FoundFaces.add`."""
    return {
        **({"file": file} if frame is None else {"file": file, "frame": frame}),
        **{"width": image.width, "height": image.height},
        "boxes": [[_short(x) for x in box] for box in np.reshape(boxes, (-1, 4))],
        "scores": [_short(x) for x in scores],
    }


class FoundFaces:
    """Collects the faces of pictures or frames, and writes them.

    The JSON is a list with an object for each picture, in order: "file", for a video "frame" (from 0), "width" and
    "height", "boxes" (XYXY, in pixels of the upright picture) and "scores".

    A crop is a face with a margin of a fifth of its box on each side, as far as the picture goes, upright, as a PNG of
    pixels only. Its name is that of the picture (and frame) and a number, and no two are the same. `faces.csv` beside
    them names for each crop the picture, the frame, the box and the score. A box outside of the picture has no crop.
    """

    def __init__(self, json: str | os.PathLike | None = None, crops: str | os.PathLike | None = None, keep=()):
        """
        Args:
            json: the file, in a folder that exists; None writes none.
            crops: the folder, which exists; None writes none.
            keep: paths that no crop may overwrite, such as the pictures.
        """
        self._json, self._crops = json, crops
        self._taken = {path_key(path) for path in keep}
        self._pictures = []
        self._table = [("crop", "file", "frame", "x1", "y1", "x2", "y2", "score")]

    def add(self, file: str, image: Image.Image, boxes, scores, frame: int | None = None) -> None:
        """Takes the faces of the next picture or frame; crops are written at once.

        Args:
            image: RGB, upright.
            boxes (array [n, 4]), scores (array [n]): float32.

        Raises:
            OSError: a crop cannot be written.
        """
        picture = record(file, image, boxes, scores, frame)
        if self._json is not None:
            self._pictures.append(picture)
        if self._crops is None:
            return
        stem = Path(file).stem + ("" if frame is None else f"_{frame:06d}")
        for i, (box, score) in enumerate(zip(picture["boxes"], picture["scores"], strict=True), 1):
            crop = _crop(image, box)
            if crop is not None:
                path = free_path(self._crops, f"{stem}_{i}", ".png", self._taken)
                save_picture(crop, path)
                self._table.append((path.name, file, "" if frame is None else frame, *box, score))

    def write(self) -> None:
        """Writes the JSON and the table of the crops, each whole or not at all.

        Raises:
            OSError: one cannot be written.
        """
        if self._json is not None:
            lines = ",\n".join(json_text(picture) for picture in self._pictures)
            write_text(self._json, f"[\n{lines}\n]\n" if lines else "[]\n")
        if self._crops is not None:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(self._table)
            # File names need not be text.
            write_text(Path(self._crops, TABLE), text.getvalue().encode("utf-8", "backslashreplace").decode())


def _short(x) -> float:
    """The shortest number that is the same in float32."""
    return float(str(np.float32(x)))


def _crop(image: Image.Image, box: list[float]) -> Image.Image | None:
    if not all(math.isfinite(x) for x in box):
        return None
    x1, y1, x2, y2 = box
    dx, dy = _MARGIN * (x2 - x1), _MARGIN * (y2 - y1)
    left, top = max(math.floor(x1 - dx), 0), max(math.floor(y1 - dy), 0)
    right, bottom = min(math.ceil(x2 + dx), image.width), min(math.ceil(y2 + dy), image.height)
    return image.crop((left, top, right, bottom)) if left < right and top < bottom else None
