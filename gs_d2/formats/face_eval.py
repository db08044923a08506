"""AFW and PASCAL faces: the files of "face-eval" (Mathias et al., ECCV 2014), annotations and detections."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gs_d2.formats.files import BOX_FORMAT, SCORE_FORMAT, FileTree, parse_rows
from gs_d2.formats.mat import load_mat
from gs_d2.formats.progress import track
from gs_d2.formats.text import lines_of

TITLES = {"afw": "AFW", "pascal_face": "PASCAL faces"}  # of the benchmarks, as a person calls them
MIN_FACE = 30  # pixels; smaller annotated faces are ignored
_MAX_NUMBER = 1e6  # pixels
_FILE_NAMES = {
    "afw": "new_annotations_AFW.mat",
    "pascal_face": "Annotations_Face_PASCALLayout_large_fixed.mat",
}


@dataclass(frozen=True)
class FaceEvalAnnotations:
    """Annotated faces of AFW or PASCAL.

    Attributes:
        boxes: image name, without folder and ending -> ndarray[n, 4]: float64 `x1 y1 x2 y2`.
        ignore: image name -> bool ndarray[n]: flagged in the file, or narrower or lower than 30 pixels.
        benchmark: `afw` or `pascal_face`; for faces of one's own any name.
    """

    boxes: dict[str, np.ndarray]
    ignore: dict[str, np.ndarray]
    benchmark: str

    @property
    def num_faces(self) -> int:
        """Faces that are to be found: 473 in AFW, 1,341 in PASCAL."""
        return int(sum((~ignore).sum() for ignore in self.ignore.values()))


def read_annotations(path: str | os.PathLike, benchmark: str) -> FaceEvalAnnotations:
    """Reads face-eval's MATLAB file of a benchmark.

    Args:
        path: the file, or a folder or a zip that holds it under its own name.
        benchmark: `afw` or `pascal_face`.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: for an unknown benchmark, a file of another layout, an image that comes twice, or a box with NaN,
            infinity or numbers of a million and more.
    """
    if benchmark not in _FILE_NAMES:
        raise ValueError(f"benchmark must be one of {', '.join(_FILE_NAMES)}, got {benchmark!r}")
    with FileTree(path) as tree:
        names = [n for n in tree.names if n.rsplit("/", 1)[-1].lower() == _FILE_NAMES[benchmark].lower()]
        if not names and tree.is_file:  # named by the user, whatever it is called
            names = tree.names
        if not names:
            raise FileNotFoundError(f"{path}: no {_FILE_NAMES[benchmark]}; it is in face-eval's annotations")
        where = tree.where(names[0])
        try:
            images = load_mat(tree.read_bytes(names[0]), where)["Annotations"].reshape(-1)
            boxes, ignore = {}, {}
            for image in images:
                name = image_name(image["imgname"][0])
                objects = np.asarray(image["objects"], dtype=np.float64)
                objects = objects.reshape(-1, objects.shape[-1]) if objects.size else np.zeros((0, 6))
                if not name or name in boxes:
                    raise ValueError(f"image {name!r} has no name, or comes a second time")
                boxes[name] = objects[:, :4]
                if not (np.abs(boxes[name]) < _MAX_NUMBER).all():  # NaN and infinity are not either
                    raise ValueError(f"a box of image {name!r} is not of numbers below {_MAX_NUMBER:g}")
                flagged = objects[:, 5] != 0 if objects.shape[1] > 5 else np.zeros(len(objects), dtype=bool)
                small = (np.abs(objects[:, 2:4] - objects[:, :2]) < MIN_FACE).any(axis=1)
                ignore[name] = flagged | small
        except Exception as error:  # of variables of any other kind
            raise ValueError(f"{where}: cannot be read as face-eval's annotations ({error!r})") from error
    return FaceEvalAnnotations(boxes, ignore, benchmark)


def read_detections(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads lines `image score x1 y1 x2 y2`.

    Args:
        path: one file, or a folder or a zip whose `.txt` files are all read; an image may be in one only.

    Returns:
        image name -> ndarray[n, 5]: float64 `x1 y1 x2 y2 score`, in the order of the file.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: for a malformed line, or an image that is in two files (results of two detectors?).
    """
    images: dict[str, np.ndarray] = {}
    with FileTree(path) as tree:
        names = tree.distinct(tree.named(".txt")) if len(tree.names) > 1 else tree.names
        if not names:
            raise ValueError(f"{path}: no .txt file below it; need lines `image score x1 y1 x2 y2`")
        for name in track(names, "reading detections"):
            where, image_of_row, rows = tree.where(name), [], []
            for number, line in enumerate(lines_of(tree.read_text(name)), 1):
                image, *numbers = line.split(None, 1) or [""]
                rows += numbers or [""]
                if image:
                    image_of_row.append(image_name(image))
                    if not numbers:
                        raise ValueError(f"{where}, line {number}: need `image score x1 y1 x2 y2`")
            values = parse_rows(rows, 1, 5, where)[:, [1, 2, 3, 4, 0]]
            by_image: dict[str, list[int]] = {}
            for i, image in enumerate(image_of_row):
                by_image.setdefault(image, []).append(i)
            for image, indices in by_image.items():
                if image in images:
                    raise ValueError(f"{where}: {image} is in another file too; give the results of one detector")
                images[image] = values[indices]
    return images


def write_detections(detections: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes lines `image score x1 y1 x2 y2`, images and detections in the order given.

    Args:
        detections: image name -> ndarray[n, 5]: `x1 y1 x2 y2 score`.
        path: the file.
    """
    with open(path, "w", encoding="utf-8") as file:
        for image, rows in detections.items():
            file.writelines(f"{image} {SCORE_FORMAT % row[4]} {BOX_FORMAT % tuple(row[:4])}\n" for row in rows)


def image_name(path: str) -> str:
    """As the tool: without folders, and up to the first dot."""
    return path.split("/")[-1].split(".")[0]
