"""The "face-eval" protocol of AFW and PASCAL faces (Mathias et al., ECCV 2014): AP after box refinement.

Shape shorthand in this module:
    N: detections of all images, sorted by score
"""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .precision_recall import PrecisionRecallCurve, pixel_iou
from .prediction_files import FileTree, parse_rows
from .progress import track

_MIN_FACE = 30  # pixels; smaller annotated faces are ignored
_MIN_DETECTION = int(np.sqrt(0.5 * _MIN_FACE * _MIN_FACE))  # 21; detections with both sides this small are dropped
_IOU_THRESH = 0.5  # strict
_NUM_REFINEMENTS = 5
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
        ValueError: for an unknown benchmark or a file of another layout.
    """
    if benchmark not in _FILE_NAMES:
        raise ValueError(f"benchmark must be one of {', '.join(_FILE_NAMES)}, got {benchmark!r}")
    from scipy.io import loadmat

    with FileTree(path) as tree:
        names = [n for n in tree.names if n.rsplit("/", 1)[-1] == _FILE_NAMES[benchmark]]
        if not names and tree.is_file:  # named by the user, whatever it is called
            names = tree.names
        if not names:
            raise FileNotFoundError(f"{path}: no {_FILE_NAMES[benchmark]}; it is in face-eval's annotations")
        where = tree.where(names[0])
        try:
            records = loadmat(io.BytesIO(tree.read_bytes(names[0])))["Annotations"].reshape(-1)
            boxes, ignored = {}, {}
            for record in records:
                name = _image_name(record["imgname"][0])
                objects = np.asarray(record["objects"], dtype=np.float64)
                objects = objects.reshape(-1, objects.shape[-1]) if objects.size else np.zeros((0, 6))
                boxes[name] = objects[:, :4]
                flagged = objects[:, 5] != 0 if objects.shape[1] > 5 else np.zeros(len(objects), dtype=bool)
                small = (np.abs(objects[:, 2:4] - objects[:, :2]) < _MIN_FACE).any(axis=1)
                ignored[name] = flagged | small
        except Exception as error:  # scipy raises many kinds for a damaged file
            raise ValueError(f"{where}: cannot be read as face-eval's annotations ({error!r})") from error
    return FaceEvalAnnotations(boxes, ignored)


def _image_name(path: str) -> str:
    """As the tool: without folders, and up to the first dot."""
    return path.split("/")[-1].split(".")[0]


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
                    image_of_row.append(_image_name(image))
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
        annotations: from `read_annotations`.
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
