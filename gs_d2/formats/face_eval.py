"""AFW and PASCAL faces: the annotation files of "face-eval" (Mathias et al., ECCV 2014)."""

import os
from dataclasses import dataclass

import numpy as np

from .files import FileTree
from .mat import load_mat

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
        ignored: image name -> bool ndarray[n]: flagged in the file, or narrower or lower than 30 pixels.
    """

    boxes: dict[str, np.ndarray]
    ignored: dict[str, np.ndarray]

    @property
    def num_faces(self) -> int:
        """Faces that are to be found: 473 in AFW, 1,341 in PASCAL."""
        return int(sum((~ignored).sum() for ignored in self.ignored.values()))


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
        names = [n for n in tree.names if n.rsplit("/", 1)[-1] == _FILE_NAMES[benchmark]]
        if not names and tree.is_file:  # named by the user, whatever it is called
            names = tree.names
        if not names:
            raise FileNotFoundError(f"{path}: no {_FILE_NAMES[benchmark]}; it is in face-eval's annotations")
        where = tree.where(names[0])
        try:
            records = load_mat(tree.read_bytes(names[0]), where)["Annotations"].reshape(-1)
            boxes, ignored = {}, {}
            for record in records:
                name = image_name(record["imgname"][0])
                objects = np.asarray(record["objects"], dtype=np.float64)
                objects = objects.reshape(-1, objects.shape[-1]) if objects.size else np.zeros((0, 6))
                if not name or name in boxes:
                    raise ValueError(f"image {name!r} has no name, or comes a second time")
                boxes[name] = objects[:, :4]
                if not (np.abs(boxes[name]) < _MAX_NUMBER).all():  # NaN and infinity are not either
                    raise ValueError(f"a box of image {name!r} is not of numbers below {_MAX_NUMBER:g}")
                flagged = objects[:, 5] != 0 if objects.shape[1] > 5 else np.zeros(len(objects), dtype=bool)
                small = (np.abs(objects[:, 2:4] - objects[:, :2]) < MIN_FACE).any(axis=1)
                ignored[name] = flagged | small
        except Exception as error:  # scipy raises many kinds for a damaged file
            raise ValueError(f"{where}: cannot be read as face-eval's annotations ({error!r})") from error
    return FaceEvalAnnotations(boxes, ignored)


def image_name(path: str) -> str:
    """As the tool: without folders, and up to the first dot."""
    return path.split("/")[-1].split(".")[0]
