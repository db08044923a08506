"""The "face-eval" protocol of AFW and PASCAL faces (Mathias et al., ECCV 2014): AP after box refinement.

Shape shorthand in this module:
    N: detections of all images, sorted by score
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gs_d2.evaluation.curves import plot_pr_curves, save_curves
from gs_d2.evaluation.precision_recall import PrecisionRecallCurve, pixel_iou
from gs_d2.evaluation.report import Result, Scores, format_table, json_number, percent
from gs_d2.formats.face_eval import MIN_FACE, TITLES, FaceEvalAnnotations

_MIN_DETECTION = int(np.sqrt(0.5 * MIN_FACE * MIN_FACE))  # 21; detections with both sides this small are dropped
_IOU_THRESH = 0.5  # strict
_NUM_REFINEMENTS = 5


@dataclass(frozen=True)
class FaceEvalResult(Result):
    """What the evaluation gives.

    Attributes:
        curve: a point for each detection, from the highest score.
        num_faces: faces to be found.
        num_detections: detections that are evaluated; `num_small` more were dropped.
        refinement: (tx, ty, sx, sy), the whole of what was applied to the boxes: shift in box sizes, and
            scale.
        missing: annotated images without detections.
        num_unknown: images with detections that are not annotated: all of these are false alarms.
        num_images: annotated images.
        benchmark: `afw`, `pascal_face`, or the name of the user's own.
        y_shift: by how much the tops of the boxes were lowered first.
        scores: of all detections, the dropped ones included.
    """

    curve: PrecisionRecallCurve
    num_faces: int
    num_detections: int
    num_small: int
    refinement: tuple[float, float, float, float]
    missing: list[str]
    num_unknown: int
    num_images: int
    benchmark: str
    y_shift: float
    scores: Scores

    @property
    def title(self) -> str:
        """The benchmark as a person calls it."""
        return TITLES.get(self.benchmark, self.benchmark)

    def metrics(self) -> dict[str, float]:
        """AP in percent."""
        return {"ap": 100 * self.curve.ap}

    def table(self) -> str:
        """AP in percent with the number of faces."""
        return format_table([self.title, "AP"], [[f"{self.num_faces} faces", percent(self.curve.ap)]])

    def setting(self) -> dict:
        tx, ty, sx, sy = self.refinement
        return {
            "y-shift": f"{self.y_shift:g}",
            "refinement shift": f"{tx:.4f} {ty:.4f}",
            "refinement scale": f"{sx:.4f} {sy:.4f}",
        }

    def notes(self) -> list[str]:
        dropped = f"{self.num_detections} detections evaluated, {self.num_small} dropped as too small"
        return [self.scores.note(), dropped]

    def summary(self) -> dict:
        """AP as a fraction 0..1, null where nothing is annotated."""
        return {
            "ap": json_number(self.curve.ap),
            "num_faces": self.num_faces,
            "num_detections": self.num_detections,
            "num_images": self.num_images,
            "num_missing": len(self.missing),
            "num_unknown": self.num_unknown,
            "y_shift": self.y_shift,
            "refinement": [json_number(value) for value in self.refinement],
        }

    def write_curves(self, folder: Path, name: str = "gs_d2") -> None:
        """Writes pr_curves.npz and pr_curve.png."""
        save_curves({self.benchmark: self.curve}, folder / "pr_curves.npz")
        plot_pr_curves({name: {self.benchmark: self.curve}}, folder / "pr_curve.png", {self.benchmark: self.title})


def evaluate_face_eval(
    annotations: FaceEvalAnnotations, detections: Mapping[str, np.ndarray], *, y_shift: float = 0.0
) -> FaceEvalResult:
    """Evaluates detections on AFW or PASCAL faces (PROTOCOLS D.4).

    A detection belongs to the face of highest IoU (boxes with "+1"; the last on ties, as in the tool) and
    needs an IoU above 0.5. One on an ignored face is dropped; a second one on a face is a false alarm. Five
    times, the boxes are matched, and then all are moved and scaled by the mean offset and size ratio of the
    hits, which fits the detector's notion of a face to the annotators'. The metric is that of the
    fifth matching.

    Args:
        annotations: from `gs_d2.formats.face_eval.read_annotations`.
        detections: image -> ndarray[n, 5] `x1 y1 x2 y2 score`, in any order.
        y_shift: lowers the top of each box by this fraction of its height first. 0.2 is what some detectors
            of WIDER FACE do, whose boxes reach higher. It changes the metric: say so beside it.

    Returns:
        FaceEvalResult: AP is 0 without detections, NaN if there is no face to be found.
    """
    images = list(detections)
    rows = np.concatenate([np.zeros((0, 5)), *(detections[i] for i in images)]).astype(np.float64)
    image_of = np.repeat(np.arange(len(images)), [len(detections[i]) for i in images])
    rows[:, 1] += y_shift * (rows[:, 3] - rows[:, 1])
    large = ((rows[:, 2:4] - rows[:, :2]) > _MIN_DETECTION).any(axis=1)
    num_small = int((~large).sum())
    rows, image_of = rows[large], image_of[large]
    order = np.argsort(-rows[:, 4], kind="stable")
    boxes, image_of = rows[order, :4], image_of[order]
    by_image = {images[i]: np.flatnonzero(image_of == i) for i in np.unique(image_of)}

    shift, scale = np.zeros(2), np.ones(2)
    hits = dropped = np.zeros(len(boxes), dtype=bool)
    for _ in range(_NUM_REFINEMENTS):
        hits, dropped, faces = _match(annotations, boxes, by_image)
        if not hits.any():
            break
        sizes, face_sizes = boxes[:, 2:] - boxes[:, :2], faces[:, 2:] - faces[:, :2]
        offsets = ((faces[:, :2] + faces[:, 2:]) / 2 - (boxes[:, :2] + boxes[:, 2:]) / 2)[hits] / sizes[hits]
        mean_offset, mean_ratio = offsets.mean(axis=0), (face_sizes[hits] / sizes[hits]).mean(axis=0)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2 + mean_offset * sizes
        boxes = np.concatenate([centers - sizes / 2 * mean_ratio, centers + sizes / 2 * mean_ratio], axis=1)
        shift, scale = shift + mean_offset, scale * mean_ratio
    return FaceEvalResult(
        curve=PrecisionRecallCurve.from_counts(hits.cumsum(), (~dropped).cumsum(), annotations.num_faces),
        num_faces=annotations.num_faces,
        num_detections=len(boxes),
        num_small=num_small,
        refinement=(*map(float, shift), *map(float, scale)),
        missing=[image for image in annotations.boxes if not len(detections.get(image, ()))],
        num_unknown=sum(image not in annotations.boxes for image in images),
        num_images=len(annotations.boxes),
        benchmark=annotations.benchmark,
        y_shift=y_shift,
        scores=Scores.of(detections),
    )


def _match(
    annotations: FaceEvalAnnotations, boxes: np.ndarray, by_image: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One matching of all detections.

    Returns:
        hits, dropped (ndarray[N]): bool; what is neither is a false alarm.
        faces (ndarray[N, 4]): the face of each hit; NaN elsewhere.
    """
    hits, dropped = np.zeros(len(boxes), dtype=bool), np.zeros(len(boxes), dtype=bool)
    faces = np.full((len(boxes), 4), np.nan)
    for image, indices in by_image.items():
        gt_boxes = annotations.boxes.get(image)
        if gt_boxes is None or not len(gt_boxes):
            continue
        ious = pixel_iou(gt_boxes, boxes[indices], touching=False)
        best = len(gt_boxes) - 1 - ious[::-1].argmax(axis=0)
        matched = ious[best, np.arange(len(indices))] > _IOU_THRESH
        on_ignored = matched & annotations.ignore[image][best]
        dropped[indices[on_ignored]] = True
        candidates = np.flatnonzero(matched & ~on_ignored)
        found, first = np.unique(best[candidates], return_index=True)
        hits[indices[candidates[first]]] = True
        faces[indices[candidates[first]]] = gt_boxes[found]
    return hits, dropped, faces
