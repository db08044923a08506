"""The FDDB protocol: discrete and continuous ROC of rectangles or ellipses against the annotated ellipses.

Shape shorthand in this module:
    n: regions of one image, T: distinct scores of all detections, plus one
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import fddb_ellipse_fit
from .fddb_regions import ellipse_spans, estimate_image_size, rectangle_spans
from .prediction_files import FileTree, parse_count, parse_rows
from .progress import track

FALSE_POSITIVES = (100, 200, 500, 1000, 2000)

_IOU_THRESH = 0.5  # strict


def read_annotations(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the `FDDB-fold-*-ellipseList.txt` of a folder or a zip, or one such file.

    Returns:
        image name -> ndarray[n, 5]: float64 (major radius, minor radius, angle in radians, centre x, centre
        y).

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: for a malformed file, or if there is no list of ellipses.
    """
    with FileTree(path) as tree:
        names = [n for n in tree.names if "ellipselist" in n.rsplit("/", 1)[-1].lower() and n.endswith(".txt")]
        if not names and tree.is_file:  # named by the user, whatever it is called
            names = tree.names
        if not names:
            raise ValueError(f"{path}: no FDDB-fold-*-ellipseList.txt below it; they are in FDDB-folds.tgz")
        return {image: rows[:, :5] for image, rows in _read_lists(tree, names, (6,)).items()}


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
        names = [n for n in tree.names if n.endswith(".txt")] if len(tree.names) > 1 else tree.names
        if not names:
            raise ValueError(f"{path}: no .txt file below it; need detections in FDDB's format")
        return _read_lists(tree, names, (5, 6))


def _read_lists(tree: FileTree, names: list[str], allowed_columns: tuple[int, ...]) -> dict[str, np.ndarray]:
    images: dict[str, np.ndarray] = {}
    num_columns = None
    for name in track(names, "reading lists"):
        where, lines, at = tree.where(name), tree.read_text(name).splitlines(), 0
        while at < len(lines):
            if not lines[at].strip():
                at += 1
                continue
            image = lines[at].strip().removesuffix(".jpg")
            if image in images:
                raise ValueError(f"{where}, line {at + 1}: image {image[:80]} for the second time")
            if at + 1 >= len(lines):
                raise ValueError(f"{where}, line {at + 2}: missing: need the number of regions of {image[:80]}")
            count = parse_count(lines[at + 1], where, at + 2)
            rows = lines[at + 2 : at + 2 + count]
            if len(rows) < count:
                raise ValueError(f"{where}, line {at + 2}: says {count} but {len(rows)} follow: cut short?")
            if num_columns is None and count:
                num_columns = len(rows[0].split())
                if num_columns not in allowed_columns:
                    needed = " or ".join(map(str, allowed_columns))
                    raise ValueError(f"{where}, line {at + 3}: need {needed} numbers, got {num_columns}")
            images[image] = parse_rows(rows, at + 3, num_columns or allowed_columns[0], where)
            if len(images[image]) != count:
                raise ValueError(f"{where}, line {at + 2}: says {count} but some of these lines are blank")
            at += 2 + count
    return images


@dataclass(frozen=True)
class FddbResult:
    """Points of the ROC, from no detection to all of them.

    Attributes:
        false_positives (ndarray[T]): int64, counted by the discrete score for both curves.
        discrete, continuous (ndarray[T]): float64, true positive rates in [0, 1].
        thresholds (ndarray[T]): score from which detections are taken; inf first.
        num_faces: annotated faces.
        num_detections: detections on annotated images.
        missing: annotated images for which there is no entry; their faces are missed.
        num_unknown: images with detections that are not annotated; not evaluated.
    """

    false_positives: np.ndarray
    discrete: np.ndarray
    continuous: np.ndarray
    thresholds: np.ndarray
    num_faces: int
    num_detections: int
    missing: list[str]
    num_unknown: int

    def rate_at(self, false_positives: int, *, continuous: bool = False) -> float:
        """The highest true positive rate that has at most so many false positives (the paper uses 200)."""
        rates = self.continuous if continuous else self.discrete
        return float(rates[self.false_positives <= false_positives].max())


def evaluate_fddb(
    annotations: Mapping[str, np.ndarray],
    detections: Mapping[str, np.ndarray],
    image_sizes: Mapping[str, tuple[int, int]] | None = None,
) -> FddbResult:
    """Evaluates detections on FDDB (PROTOCOLS D.3).

    For each image and each distinct score, the detections of at least this score are assigned to the faces so
    that the sum of IoU is largest. An assigned pair adds its IoU to the continuous score, and 1 to the
    discrete one if the IoU is above 0.5; every detection without such a pair is a false positive.

    Args:
        annotations: image -> ndarray[n, 5], see `read_annotations`.
        detections: image -> ndarray[n, 5] rectangles or ndarray[n, 6] ellipses, see `read_detections`.
        image_sizes: image -> (width, height), see `image_sizes_of`; regions are clipped to the image. Where
            an image's size is not given it is estimated (`estimate_image_size`), which moves the rates by
            less than 0.001 on published results.

    Returns:
        FddbResult: rates are NaN if nothing is annotated.
    """
    steps = [np.zeros((0, 4))]
    missing = [image for image in annotations if image not in detections]
    for image, ellipses in track(annotations.items(), "FDDB"):
        rows = detections.get(image)
        if rows is None or not len(rows):
            continue
        size = (image_sizes or {}).get(image) or estimate_image_size(ellipses, rows[:, :-1])
        regions = rectangle_spans if rows.shape[1] == 5 else ellipse_spans
        ious = ellipse_spans(ellipses, size).iou(regions(rows[:, :-1], size))
        steps.append(_score_steps(ious, rows[:, -1]))
    steps = np.concatenate(steps)
    steps = steps[np.argsort(-steps[:, 0], kind="stable")]
    totals = np.cumsum(np.concatenate([np.zeros((1, 3)), steps[:, 1:]]), axis=0)
    thresholds = np.concatenate([[np.inf], steps[:, 0]])
    last = np.flatnonzero(np.append(thresholds[1:] != thresholds[:-1], True))
    num_faces = sum(map(len, annotations.values()))
    with np.errstate(invalid="ignore"):
        continuous, discrete = (
            totals[last, 0] / np.float64(num_faces),
            totals[last, 1] / np.float64(num_faces),
        )
    return FddbResult(
        false_positives=np.rint(totals[last, 2]).astype(np.int64),
        discrete=discrete,
        continuous=continuous,
        thresholds=thresholds[last],
        num_faces=num_faces,
        num_detections=sum(len(detections[image]) for image in annotations if image in detections),
        missing=missing,
        num_unknown=sum(image not in annotations for image in detections),
    )


def _score_steps(ious: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """What each distinct score of an image adds: rows (score, continuous, discrete, false positives)."""
    from scipy.optimize import linear_sum_assignment

    order = np.argsort(-scores, kind="stable")
    ious, scores = ious[:, order], scores[order]
    overlapping = (ious > 0).any(axis=0)
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) + 1
    totals = np.zeros((len(ends) + 1, 4))
    start, pairs = 0, np.zeros(0)
    for i, end in enumerate(ends, 1):
        if overlapping[start:end].any():  # other detections change no assignment
            candidates = ious[:, :end][:, overlapping[:end]]
            pairs = candidates[linear_sum_assignment(candidates, maximize=True)]
        hits = np.count_nonzero(pairs > _IOU_THRESH)
        totals[i] = scores[end - 1], pairs.sum(), hits, end - hits
        start = end
    totals[1:, 1:] = np.diff(totals[:, 1:], axis=0)
    return totals[1:]


def ellipses_from_rectangles(rectangles: np.ndarray) -> np.ndarray:
    """Turns detected rectangles into ellipses by our own fit to FDDB's annotations
    (tools/fit_fddb_ellipse.py).

    Args:
        rectangles (ndarray[n, 5]): `x y w h score`.

    Returns:
        ndarray[n, 6]: `major_radius minor_radius angle cx cy score`.

    Raises:
        ValueError: if they are not rectangles.
    """
    if rectangles.shape[1] != 5:
        raise ValueError("the detections are ellipses already; only rectangles can be turned into ellipses")
    radii = rectangles[:, 2:4] @ np.array(fddb_ellipse_fit.RADII).T
    angles = np.full((len(rectangles), 1), fddb_ellipse_fit.ANGLE)
    centers = rectangles[:, :2] + rectangles[:, 2:4] / 2
    return np.concatenate([radii, angles, centers, rectangles[:, 4:]], axis=1)
