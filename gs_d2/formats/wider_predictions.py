"""WIDER FACE: files of predictions, read and written.

A prediction set is one `<event>/<image>.txt` an image: line 1 the image's name, line 2 the number of detections, then
`x y w h score` a line, with w = x2 - x1 (no +1).
"""

import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from gs_d2.formats.files import BOX_FORMAT, SCORE_FORMAT, FileTree, is_inside, parse_count, parse_rows
from gs_d2.formats.progress import track
from gs_d2.formats.text import lines_of


def parse_wider_file(text: str, where: str) -> np.ndarray:
    """One image's predictions.

    Args:
        text: content of the file; none but blanks means no detections.
        where: the file, for messages.

    Returns:
        ndarray[n, 5]: float64 `x y w h score` in the file's order. The name on line 1 is not read: the file's
        own name decides, as in the official tool.

    Raises:
        ValueError: for a malformed line, or if the count is not the number of rows (the official tool and its
            Python port read such a file differently, and it is mostly a file cut short).
    """
    lines = lines_of(text)
    filled = [number for number, line in enumerate(lines, 1) if line]
    if not filled:
        return np.zeros((0, 5))
    if _has_no_name(lines, filled):
        filled.insert(0, 1)
    if len(filled) < 2:
        raise ValueError(f"{where}, line {filled[0] + 1}: missing: need the number of detections")
    at = filled[1]
    count = parse_count(lines[at - 1], where, at)
    rows = parse_rows(lines[at:], at + 1, 5, where)
    if len(rows) != count:
        raise ValueError(f"{where}, line {at}: says {count} detections but {len(rows)} follow: was the file cut short?")
    return rows


def _has_no_name(lines: list[str], filled: list[int]) -> bool:
    """Whether the blank first line is the image's name, which nobody reads, and the number comes next."""
    return (
        not lines[0] and lines[filled[0] - 1].isdecimal() and not (len(filled) > 1 and lines[filled[1] - 1].isdecimal())
    )


@dataclass
class WiderPredictions:
    """Predictions of a set of images.

    Attributes:
        detections: image id `<event>/<image>` -> ndarray[n, 5] float64 `x y w h score`, in any order.
        missing: ids that were asked for and have no file.
        empty: ids whose file has no detection.
        num_unknown: files that belong to no image asked for; they are not read.
    """

    detections: dict[str, np.ndarray] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    num_unknown: int = 0


def read_wider_predictions(path: str | os.PathLike, image_ids: Iterable[str]) -> WiderPredictions:
    """Reads official prediction files from a folder or a zip, at any depth.

    Args:
        path: a folder or a zip with `<event>/<image>.txt`, possibly inside other folders.
        image_ids: the `<event>/<image>` to read; of one's own images any that can be written.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: for a malformed file, two files of one image, or when no file belongs to any image.
    """
    image_ids = list(image_ids)
    predictions = WiderPredictions()
    with FileTree(path) as tree:
        files = {}
        wanted = {str(image_id): image_id for image_id in image_ids}
        for name in tree.names:
            parts = PurePosixPath(name).parts
            if not name.lower().endswith(".txt"):
                continue
            ends = ("/".join(parts[i:])[: -len(".txt")] for i in range(len(parts)))
            image_id = next((wanted[end] for end in ends if end in wanted), None)
            if image_id is None:
                predictions.num_unknown += 1
            elif image_id in files:
                if len(tree.distinct([files[image_id], name])) == 1:  # the same file, linked
                    continue
                raise ValueError(f"{path}: both {files[image_id]} and {name} are for {image_id}; remove one")
            else:
                files[image_id] = name
        if not files:
            example = image_ids[0] if image_ids else "<event>/<image>"
            raise ValueError(
                f"{path}: no prediction of any image of the ground truth among its {len(tree.names)} files; "
                f"need files like {example}.txt"
            )
        for image_id in track(image_ids, "reading predictions"):
            if image_id not in files:
                predictions.missing.append(image_id)
                continue
            name = files[image_id]
            rows = parse_wider_file(tree.read_text(name, any_names=True), tree.where(name))
            predictions.detections[image_id] = rows
            if not len(rows):
                predictions.empty.append(image_id)
    return predictions


def write_wider_predictions(detections: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes official prediction files, highest score first; also the format of a submission for the test set.

    Args:
        detections: `<event>/<image>` -> ndarray[n, 5] `x y w h score`, w = x2 - x1. n = 0 writes a count of
            0. Images of one's own may have any relative path, or a number; the official tool reads no others.
        path: a folder, made where missing, or a name that ends in `.zip` for one zip of the same tree.

    Raises:
        ValueError: for an id that is no relative path, or a NaN or an infinity.
    """
    path = Path(path)
    archive = None
    if path.suffix.lower() == ".zip":
        path.parent.mkdir(parents=True, exist_ok=True)
        archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    try:
        for image_id in sorted(detections, key=str):
            if not is_inside(str(image_id)):
                raise ValueError(f"image id must be a relative path, '<event>/<image>' in WIDER FACE, got {image_id!r}")
            rows = np.asarray(detections[image_id], dtype=np.float64).reshape(-1, 5)
            if not np.isfinite(rows).all():
                raise ValueError(f"{image_id}: a detection with NaN or infinity")
            rows = rows[np.argsort(-rows[:, 4], kind="stable")]
            name = PurePosixPath(str(image_id)).name
            lines = [name, str(len(rows)), *(f"{BOX_FORMAT} {SCORE_FORMAT}" % tuple(row) for row in rows)]
            text = "\n".join(lines) + "\n"
            if archive is not None:
                archive.writestr(f"{image_id}.txt", text)
            else:
                file = path / f"{image_id}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    finally:
        if archive is not None:
            archive.close()
