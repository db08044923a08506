"""FDDB: the lists of annotated ellipses, and of detections in the same layout."""

import os
from collections.abc import Iterable, Mapping

import numpy as np

from gs_d2.formats.files import BOX_FORMAT, SCORE_FORMAT, FileTree, is_inside, parse_count, parse_rows
from gs_d2.formats.progress import track
from gs_d2.formats.text import end_of, lines_of

_MAX_NUMBER = 1e6  # pixels


def read_annotations(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the `FDDB-fold-*-ellipseList.txt` of a folder or a zip, or one such file.

    Returns:
        image name -> ndarray[n, 5]: float64 (major radius, minor radius, angle in radians, centre x, centre
        y).

    Raises:
        FileNotFoundError: if `path` does not exist or holds no list of ellipses.
        ValueError: for a malformed list.
    """
    with FileTree(path) as tree:
        names = tree.distinct(n for n in tree.named(".txt") if "ellipselist" in n.rsplit("/", 1)[-1].lower())
        if not names and tree.is_file:  # named by the user, whatever it is called
            names = tree.names
        if not names:
            raise FileNotFoundError(f"{path}: no FDDB-fold-*-ellipseList.txt below it; they are in FDDB-folds.tgz")
        regions = read_region_lists(tree, names, (6,), annotated=True)
        return {image: rows[:, :5] for image, rows in regions.items()}


def read_detections(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads detections in FDDB's format: image name, number of detections, one detection a line.

    Args:
        path: one file, or a folder or a zip whose `.txt` files are all read (one a fold, or one an image).

    Returns:
        image name -> ndarray[n, 5], rectangles `x y w h score`, or ndarray[n, 6], ellipses `major_radius
        minor_radius angle cx cy score`; all images alike.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: for a malformed file, an image given twice, or rectangles mixed with ellipses.
    """
    with FileTree(path) as tree:
        names = tree.distinct(tree.named(".txt")) if len(tree.names) > 1 else tree.names
        if not names:
            raise ValueError(f"{path}: no .txt file below it; need detections in FDDB's format")
        return read_region_lists(tree, track(names, "reading lists"), (5, 6))


def write_detections(detections: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes one file in FDDB's format, images and detections in the order given.

    Args:
        detections: image name -> ndarray[n, 5]: rectangles `x y w h score`.
        path: the file.
    """
    with open(path, "w", encoding="utf-8") as file:
        for image, rows in detections.items():
            lines = [image, str(len(rows)), *(f"{BOX_FORMAT} {SCORE_FORMAT}" % tuple(row) for row in rows)]
            file.write("\n".join(lines) + "\n")


def read_region_lists(
    tree: FileTree, names: Iterable[str], allowed_columns: tuple[int, ...], *, annotated: bool = False
) -> dict[str, np.ndarray]:
    """Reads lists of FDDB's layout: image name, number of regions, one region a line.

    Args:
        tree: holds the lists.
        names: of the lists in it.
        allowed_columns: how many numbers a region may have; all regions must have the same.
        annotated: whether these are annotated ellipses: radii must be above 0, and all numbers below a million.

    Returns:
        image name, without `.jpg` -> float64 ndarray[n, columns].

    Raises:
        ValueError: for a malformed list, an image given twice, or one whose path would leave the folder of the images;
            names file and line.
    """
    images: dict[str, np.ndarray] = {}
    num_columns = None
    for name in names:
        where, lines, at = tree.where(name), lines_of(tree.read_text(name)), 0
        while at < len(lines):
            if not lines[at]:
                at += 1
                continue
            image = lines[at][:-4] if lines[at].lower().endswith(".jpg") else lines[at]
            if not is_inside(image):
                raise ValueError(
                    f"{where}, line {at + 1}: expected an image path like 2002/07/19/big/img_130, got {image[:80]!r}"
                )
            if image in images:
                raise ValueError(f"{where}, line {at + 1}: image {image[:80]} for the second time")
            start = end_of(lines, at + 1, 1)  # of the rows, after the line of their number
            if not lines[start - 1] or start == at + 1:
                raise ValueError(f"{where}, line {at + 2}: missing: need the number of regions of {image[:80]}")
            count = parse_count(lines[start - 1], where, start)
            end = end_of(lines, start, count)
            rows = [(number, line) for number, line in enumerate(lines[start:end], start + 1) if line]
            if len(rows) < count:
                raise ValueError(f"{where}, line {start}: says {count} but {len(rows)} follow: cut short?")
            if num_columns is None and count:
                num_columns = len(rows[0][1].split())
                if num_columns not in allowed_columns:
                    needed = " or ".join(map(str, allowed_columns))
                    raise ValueError(f"{where}, line {rows[0][0]}: need {needed} numbers, got {num_columns}")
            images[image] = parse_rows(lines[start:end], start + 1, num_columns or allowed_columns[0], where)
            if annotated:
                _check_ellipses(images[image], rows, where)
            at = end
    return images


def _check_ellipses(values, rows, where):
    valid = (values[:, :2] > 0).all(axis=1) & (np.abs(values) < _MAX_NUMBER).all(axis=1)
    if not valid.all():
        number, line = rows[int(valid.argmin())]
        raise ValueError(
            f"{where}, line {number}: need radii above 0 and numbers below {_MAX_NUMBER:g}, got {line[:80]!r}"
        )


def bounding_boxes(ellipses: np.ndarray) -> np.ndarray:
    """The upright rectangles (n, 4) `x1 y1 x2 y2` around ellipses (n, 5), without rounding."""
    major, minor, angle, cx, cy = np.asarray(ellipses, dtype=np.float64).reshape(-1, 5).T
    half_width = np.hypot(major * np.cos(angle), minor * np.sin(angle))
    half_height = np.hypot(major * np.sin(angle), minor * np.cos(angle))
    return np.stack([cx - half_width, cy - half_height, cx + half_width, cy + half_height], axis=1)
