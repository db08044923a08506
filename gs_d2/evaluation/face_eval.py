"""The "face-eval" protocol of AFW and PASCAL faces (Mathias et al., ECCV 2014): AP after box refinement.

Shape shorthand in this module:
    N: detections of all images, sorted by score
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gs_d2.formats.face_eval import MIN_FACE, FaceEvalAnnotations, image_name
from gs_d2.formats.files import FileTree, parse_rows

from .precision_recall import PrecisionRecallCurve, pixel_iou
from .prediction_files import BOX_FORMAT, SCORE_FORMAT
from .progress import track

_MIN_DETECTION = int(np.sqrt(0.5 * MIN_FACE * MIN_FACE))  # 21; detections with both sides this small are dropped
_IOU_THRESH = 0.5  # strict
_NUM_REFINEMENTS = 5


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
        names = [n for n in tree.names if n.endswith(".txt")] if len(tree.names) > 1 else tree.names
        if not names:
            raise ValueError(f"{path}: no .txt file below it; need lines `image score x1 y1 x2 y2`")
        for name in track(names, "reading detections"):
            where, image_of_row, rows = tree.where(name), [], []
            for number, line in enumerate(tree.read_text(name).split("\n"), 1):
                image, _, numbers = line.strip().partition(" ")
                rows.append(numbers)
                if image:
                    image_of_row.append(image_name(image))
                    if not numbers.strip():
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


@dataclass(frozen=True)
class FaceEvalResult:
    """What the evaluation gives.

    Attributes:
        curve: a point for each detection, from the highest score.
        num_faces: faces to be found.
        num_detections: detections that are evaluated; `num_small` more were dropped.
        refinement: (tx, ty, sx, sy), the whole of what was applied to the boxes: shift in box sizes, and
            scale.
        missing: annotated images without detections.
        num_unknown: images with detections that are not annotated: all of these are false alarms.
    """

    curve: PrecisionRecallCurve
    num_faces: int
    num_detections: int
    num_small: int
    refinement: tuple[float, float, float, float]
    missing: list[str]
    num_unknown: int


def evaluate_face_eval(
    annotations: FaceEvalAnnotations, detections: Mapping[str, np.ndarray], *, y_shift: float = 0.0
) -> FaceEvalResult:
    """Evaluates detections on AFW or PASCAL faces (PROTOCOLS D.4).

    A detection belongs to the face of highest IoU (boxes with "+1"; the last on ties, as in the tool) and
    needs an IoU above 0.5. One on an ignored face is dropped; a second one on a face is a false alarm. Five
    times, the boxes are matched, and then all are moved and scaled by the mean offset and size ratio of the
    hits, which fits the detector's notion of a face to the annotators'. The figure is that of the fifth
    matching.

    Args:
        annotations: from `gs_d2.formats.face_eval.read_annotations`.
        detections: image -> ndarray[n, 5] `x1 y1 x2 y2 score`, in any order.
        y_shift: lowers the top of each box by this fraction of its height first. 0.2 is what some detectors
            of WIDER FACE do, whose boxes reach higher. It changes the figure: say so beside it.

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
        on_ignored = matched & annotations.ignored[image][best]
        dropped[indices[on_ignored]] = True
        candidates = np.flatnonzero(matched & ~on_ignored)
        found, first = np.unique(best[candidates], return_index=True)
        hits[indices[candidates[first]]] = True
        faces[indices[candidates[first]]] = gt_boxes[found]
    return hits, dropped, faces
