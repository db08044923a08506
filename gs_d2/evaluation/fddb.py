"""The FDDB protocol: discrete and continuous ROC of rectangles or ellipses against the annotated ellipses.

Shape shorthand in this module:
    n: regions of one image, T: distinct scores of all detections, plus one
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gs_d2.evaluation import fddb_ellipse_fit
from gs_d2.evaluation.curves import plot_roc_curves
from gs_d2.evaluation.fddb_regions import ellipse_spans, estimate_image_size, rectangle_spans
from gs_d2.evaluation.report import Result, Scores, format_table, json_number, percent
from gs_d2.formats.progress import track

FALSE_POSITIVES = (100, 200, 500, 1000, 2000)

_IOU_THRESH = 0.5  # strict


@dataclass(frozen=True)
class FddbResult(Result):
    """Points of the ROC, from no detection to all of them.

    Attributes:
        false_positives (ndarray[T]): int64, counted by the discrete score for both curves.
        discrete, continuous (ndarray[T]): float64, true positive rates in [0, 1].
        thresholds (ndarray[T]): score from which detections are taken; inf first.
        num_faces: annotated faces.
        num_detections: detections on annotated images.
        missing: annotated images for which there is no entry; their faces are missed.
        num_unknown: images with detections that are not annotated; not evaluated.
        num_images: annotated images; of `num_sizes` of them the size is known.
        fit_ellipses: whether the regions are ellipses fitted to rectangles.
        scores: of all detections, those on images that are not annotated included.
    """

    false_positives: np.ndarray
    discrete: np.ndarray
    continuous: np.ndarray
    thresholds: np.ndarray
    num_faces: int
    num_detections: int
    missing: list[str]
    num_unknown: int
    num_images: int
    num_sizes: int
    fit_ellipses: bool
    scores: Scores

    def rate_at(self, false_positives: int, *, continuous: bool = False) -> float:
        """The highest true positive rate that has at most so many false positives (the paper uses 200)."""
        rates = self.continuous if continuous else self.discrete
        return float(rates[self.false_positives <= false_positives].max())

    def metrics(self) -> dict[str, float]:
        """Rates in percent, "disc_tpr@<n>" and "cont_tpr@<n>" for each n of `FALSE_POSITIVES`."""
        metrics = {f"disc_tpr@{count}": 100 * self.rate_at(count) for count in FALSE_POSITIVES}
        return metrics | {f"cont_tpr@{count}": 100 * self.rate_at(count, continuous=True) for count in FALSE_POSITIVES}

    def table(self) -> str:
        """True positive rates in percent at each number of false positives."""
        rows = [
            [str(count), percent(self.rate_at(count)), percent(self.rate_at(count, continuous=True))]
            for count in FALSE_POSITIVES
        ]
        return format_table(["FP at most", "discrete TPR", "continuous TPR"], rows)

    def setting(self) -> dict:
        sizes = f"of {self.num_sizes} of {self.num_images} images known"
        return {
            "regions": "fitted ellipses" if self.fit_ellipses else "as given",
            "sizes": sizes if self.num_sizes == self.num_images else sizes + " and the others estimated",
        }

    def notes(self) -> list[str]:
        return [self.scores.note(), f"{self.num_faces} faces"]

    def summary(self) -> dict:
        """Rates as fractions 0..1 by number of false positives, null where nothing is annotated."""
        return {
            "disc_tpr": {str(count): json_number(self.rate_at(count)) for count in FALSE_POSITIVES},
            "cont_tpr": {str(count): json_number(self.rate_at(count, continuous=True)) for count in FALSE_POSITIVES},
            "num_faces": self.num_faces,
            "num_detections": self.num_detections,
            "num_images": self.num_images,
            "num_missing": len(self.missing),
            "num_unknown": self.num_unknown,
        }

    def write_curves(self, folder: Path, name: str = "gs_d2") -> None:
        """Writes roc_curves.npz and roc_curve.png."""
        names = ("false_positives", "discrete", "continuous", "thresholds")
        np.savez_compressed(folder / "roc_curves.npz", **{key: getattr(self, key) for key in names})
        curves = {
            "Discrete": (self.false_positives, self.discrete),
            "Continuous": (self.false_positives, self.continuous),
        }
        plot_roc_curves({name: curves}, folder / "roc_curve.png")


def evaluate_fddb(
    annotations: Mapping[str, np.ndarray],
    detections: Mapping[str, np.ndarray],
    image_sizes: Mapping[str, tuple[int, int]] | None = None,
    *,
    fit_ellipses: bool = False,
) -> FddbResult:
    """Evaluates detections on FDDB (PROTOCOLS D.3).

    For each image and each distinct score, the detections of at least this score are assigned to the faces so
    that the sum of IoU is largest. An assigned pair adds its IoU to the continuous score, and 1 to the
    discrete one if the IoU is above 0.5; every detection without such a pair is a false positive.

    Args:
        annotations: image -> ndarray[n, 5], see `gs_d2.formats.fddb.read_annotations`.
        detections: image -> ndarray[n, 5] rectangles or ndarray[n, 6] ellipses, see
            `gs_d2.formats.fddb.read_detections`.
        image_sizes: image -> (width, height), see `image_sizes_of`; regions are clipped to the image. Where
            an image's size is not given it is estimated (`estimate_image_size`), which moves the rates by
            less than 0.001 on published results.
        fit_ellipses: evaluate ellipses fitted to the detected rectangles (`ellipses_from_rectangles`), which raises
            the continuous rates.

    Returns:
        FddbResult: rates are NaN if nothing is annotated.

    Raises:
        ValueError: if ellipses are to be fitted to ellipses.
    """
    image_sizes = image_sizes or {}
    if fit_ellipses:
        detections = {image: ellipses_from_rectangles(rows) for image, rows in detections.items()}
    steps = [np.zeros((0, 4))]
    missing = [image for image in annotations if image not in detections]
    for image, ellipses in track(annotations.items(), "FDDB"):
        rows = detections.get(image)
        if rows is None or not len(rows):
            continue
        size = image_sizes.get(image) or estimate_image_size(ellipses, rows[:, :-1])
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
        num_images=len(annotations),
        num_sizes=sum(image in image_sizes for image in annotations),
        fit_ellipses=fit_ellipses,
        scores=Scores.of(detections),
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
    (dev/fit_fddb_ellipse.py).

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
