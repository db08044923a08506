"""The WIDER FACE protocol: average precision on easy, medium, hard, All, and per attribute.

Agrees with the official MATLAB toolbox and with its Python port. Where those two differ we do as MATLAB does:
rows are sorted by score, any range of scores is accepted, an image without a file has no detections.
Arithmetic is float64 throughout, as in the port (MATLAB normalises scores in single precision).

Shape shorthand in this module:
    I: number of images, M: ground-truth boxes of all images, N: detections of all images, T: the 1000
        thresholds
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gs_d2.formats.files import FileTree
from gs_d2.formats.mat import load_mat

from .precision_recall import PrecisionRecallCurve, pixel_iou
from .progress import track

OFFICIAL_SUBSETS = ("easy", "medium", "hard")

# Names of the label values, from the readme of the annotations.
ATTRIBUTES = {
    "blur": ("clear", "normal", "heavy"),
    "expression": ("typical", "exaggerate"),
    "illumination": ("normal", "extreme"),
    "occlusion": ("none", "partial", "heavy"),
    "pose": ("typical", "atypical"),
}

_IOU_THRESH = 0.5
_NUM_THRESHOLDS = 1000
_UNMATCHED = -1
_NOT_COUNTED = -2  # on an image without any annotated face, which the official tool skips
_IOU_CHUNK = 2_000_000  # pairs at a time, about 100 MB: the crowds have 709 faces in one image


@dataclass(frozen=True)
class WiderGroundTruth:
    """Annotated faces of a set of images.

    Attributes:
        image_ids (list[str]): I times `<event>/<image>`.
        boxes (ndarray[M, 4]): float64 (x, y, x + w, y + h) as annotated, with the degenerate ones.
        offsets (ndarray[I + 1]): int64; the boxes of image i are `boxes[offsets[i]:offsets[i + 1]]`.
        subsets: name -> bool ndarray[M], the boxes that count in a subset; the others are ignored there: a
            detection on one is neither a hit nor a false alarm. Always has `all` (every box of the list) and
            `all_valid` (not flagged invalid, w > 0 and h > 0); `easy`, `medium`, `hard` where the official
            files are there; `<attribute>.<value>` for the boxes with that label.
    """

    image_ids: list[str]
    boxes: np.ndarray
    offsets: np.ndarray
    subsets: dict[str, np.ndarray]

    @classmethod
    def from_boxes(
        cls,
        image_ids: Iterable[str],
        boxes: Iterable[np.ndarray],
        attributes: Iterable[Mapping[str, np.ndarray]] | None = None,
    ) -> "WiderGroundTruth":
        """Ground truth with `all`, `all_valid` and the attributes, but without the official subsets.

        Args:
            image_ids: I times `<event>/<image>`.
            boxes: an ndarray[n, 4] (x1, y1, x2, y2) an image.
            attributes: a dict of attribute -> integer ndarray[n] an image (`invalid` and keys of
                `ATTRIBUTES`; others are not read). None: no attributes, every box valid.

        Raises:
            ValueError: if an image occurs twice or a dict does not fit its boxes.
        """
        image_ids = list(image_ids)
        boxes = [np.asarray(b, dtype=np.float64).reshape(-1, 4) for b in boxes]
        attributes = [{}] * len(image_ids) if attributes is None else list(attributes)
        if len(set(image_ids)) != len(image_ids):
            raise ValueError("WIDER FACE ground truth: an image occurs twice")
        offsets = np.cumsum([0] + [len(b) for b in boxes])
        all_boxes = np.concatenate([np.zeros((0, 4)), *boxes])
        labels = {}
        for name in ("invalid", *ATTRIBUTES):
            per_image = [a[name] for a in attributes if name in a]
            if per_image and len(per_image) == len(boxes):
                labels[name] = np.concatenate([np.asarray(a).reshape(-1) for a in per_image])
                if len(labels[name]) != len(all_boxes):
                    raise ValueError(f"WIDER FACE ground truth: {name} has not one label for each box")
        valid = (all_boxes[:, 2] > all_boxes[:, 0]) & (all_boxes[:, 3] > all_boxes[:, 1])
        if "invalid" in labels:
            valid &= labels["invalid"] == 0
        subsets = {"all": np.ones(len(all_boxes), dtype=bool), "all_valid": valid}
        for attribute, names in ATTRIBUTES.items():
            if attribute in labels:
                subsets |= {f"{attribute}.{name}": labels[attribute] == i for i, name in enumerate(names)}
        return cls(image_ids, all_boxes, offsets, subsets)

    def of_images(self, image_ids: Iterable[str]) -> "WiderGroundTruth":
        """The ground truth of those of its images that are in `image_ids`, in its own order."""
        wanted = set(image_ids)
        images = np.array([i for i, image_id in enumerate(self.image_ids) if image_id in wanted], dtype=np.int64)
        counts = np.diff(self.offsets)
        rows = np.repeat(np.isin(np.arange(len(counts)), images), counts)
        return WiderGroundTruth(
            [self.image_ids[i] for i in images],
            self.boxes[rows],
            np.cumsum([0, *counts[images]]),
            {name: mask[rows] for name, mask in self.subsets.items()},
        )

    @classmethod
    def from_mat_files(cls, path: str | os.PathLike) -> "WiderGroundTruth":
        """Reads the official `wider_{face,easy,medium,hard}_val.mat` from a folder or a zip, at any depth.

        `wider_face_val.mat` is needed; of the other three, those that are there make a subset each.

        Raises:
            FileNotFoundError: if `path` or `wider_face_val.mat` is missing.
            ValueError: for a file that is not of the official layout, or lists other images.
        """
        with FileTree(path) as tree:
            face = _load_mat(tree, "wider_face_val.mat")
            if face is None:
                raise FileNotFoundError(
                    f"{path}: no wider_face_val.mat; it is in `ground_truth` of the official evaluation tools"
                )
            where, face = face
            try:
                image_ids = _image_ids(face)
                boxes = [b.astype(np.float64).reshape(-1, 4) for b in _per_image(face["face_bbx_list"])]
                boxes = [np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1) for b in boxes]
                labels = {
                    name: _per_image(face[f"{name}_label_list"])
                    for name in ("invalid", *ATTRIBUTES)
                    if f"{name}_label_list" in face
                }
                attributes = [{name: labels[name][i] for name in labels} for i in range(len(boxes))]
                ground_truth = cls.from_boxes(image_ids, boxes, attributes)
            except (KeyError, IndexError, AttributeError, TypeError) as error:
                raise ValueError(f"{where}: not of the layout of WIDER FACE's own file ({error!r})") from error
            subsets = {}
            for name in OFFICIAL_SUBSETS:
                subset = _load_mat(tree, f"wider_{name}_val.mat")
                if subset is not None:
                    subsets[name] = _subset_mask(*subset, ground_truth)
        return cls(image_ids, ground_truth.boxes, ground_truth.offsets, subsets | ground_truth.subsets)


def _load_mat(tree: FileTree, file_name: str) -> tuple[str, dict] | None:
    """Where a MATLAB file of the tree is, and its variables; None if there is none of that name."""
    found = [name for name in tree.names if name.rsplit("/", 1)[-1] == file_name]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{tree.path}: both {found[0]} and {found[1]}; give the folder of one of them")
    where = tree.where(found[0])
    return where, load_mat(tree.read_bytes(found[0]), where)


def _per_image(events: np.ndarray) -> list[np.ndarray]:
    """Flattens the official cell arrays: events (E, 1) of images (n, 1) of an array."""
    return [image[0] for event in events for image in event[0]]


def _image_ids(mat: dict) -> list[str]:
    return [
        f"{event[0][0]}/{image[0][0]}"
        for event, images in zip(mat["event_list"], mat["file_list"], strict=True)
        for image in images[0]
    ]


def _subset_mask(where: str, mat: dict, ground_truth: WiderGroundTruth) -> np.ndarray:
    """The boxes (M,) that an official subset keeps, from its 1-based indices."""
    mask = np.zeros(len(ground_truth.boxes), dtype=bool)
    try:
        image_ids, kept = _image_ids(mat), _per_image(mat["gt_list"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where}: not of the layout of WIDER FACE's own file ({error!r})") from error
    if image_ids != ground_truth.image_ids:
        raise ValueError(f"{where}: lists other images than wider_face_val.mat; take all four from one source")
    for i, indices in enumerate(kept):
        first, end = ground_truth.offsets[i : i + 2]
        indices = indices.reshape(-1).astype(np.int64)
        if len(indices) and not (1 <= indices.min() and indices.max() <= end - first):
            raise ValueError(f"{where}: {image_ids[i]} has no box {indices.max()}; take all four from one source")
        mask[first + indices - 1] = True
    return mask


@dataclass(frozen=True)
class WiderResult:
    """What the evaluation of one set of predictions gives.

    Attributes:
        curves: subset -> `PrecisionRecallCurve` over the T thresholds; `.ap` is the figure, a fraction.
        num_faces: subset -> number of faces that count.
        num_detections: detections read, all images.
        score_range: lowest and highest score; (nan, nan) without detections.
    """

    curves: dict[str, PrecisionRecallCurve]
    num_faces: dict[str, int]
    num_detections: int
    score_range: tuple[float, float]


def evaluate_wider_face(ground_truth: WiderGroundTruth, detections: Mapping[str, np.ndarray]) -> WiderResult:
    """Evaluates one set of predictions on every subset of the ground truth (PROTOCOLS D.1).

    An IoU of 0.5 (boxes with "+1") is needed. A detection belongs to the face of highest IoU, the first on
    ties, among all annotated faces. The first detection of a face in order of score is a hit, the others are
    false alarms; detections whose face the subset ignores are dropped. Equal scores keep the order given.

    Args:
        ground_truth: the annotated faces.
        detections: `<event>/<image>` -> ndarray[n, 5] `x y w h score`, finite, in any order and range of
            scores. Images that are missing have no detections, their faces still count. Ids that are not in
            the ground truth are not evaluated.

    Returns:
        WiderResult: AP is 0 for no detections, and also when all scores are one value: the protocol's
        normalisation is then 0 / 0. It is NaN for a subset without faces.
    """
    matched_gt, is_first, scores = _match(ground_truth, detections)
    score_range = (scores.min(), scores.max()) if len(scores) else (np.nan, np.nan)
    bins = _threshold_bins(scores, *score_range)

    def cumulated(selected: np.ndarray) -> np.ndarray:
        return np.cumsum(np.bincount(bins[selected], minlength=_NUM_THRESHOLDS + 1)[:_NUM_THRESHOLDS])

    countable = matched_gt != _NOT_COUNTED
    unmatched = cumulated(countable & (matched_gt == _UNMATCHED))
    curves, num_faces = {}, {}
    for name, kept in ground_truth.subsets.items():
        on_kept_face = countable & (matched_gt >= 0)
        on_kept_face[on_kept_face] = kept[matched_gt[on_kept_face]]
        num_faces[name] = int(kept.sum())
        num_hits, num_counted = cumulated(on_kept_face & is_first), cumulated(on_kept_face) + unmatched
        curves[name] = PrecisionRecallCurve.from_counts(num_hits, num_counted, num_faces[name])
    return WiderResult(curves, num_faces, len(scores), (float(score_range[0]), float(score_range[1])))


def _match(
    ground_truth: WiderGroundTruth, detections: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps 1, 4 and 5 of the protocol, which do not depend on the subset.

    Returns:
        matched_gt (ndarray[N]): int64 index of the face in `ground_truth.boxes`, or `_UNMATCHED`,
            `_NOT_COUNTED`.
        is_first (ndarray[N]): bool, the first detection of its face.
        scores (ndarray[N]): float64.
    """
    matched, first, scores = [np.zeros(0, np.int64)], [np.zeros(0, bool)], [np.zeros(0)]
    for i, image_id in enumerate(track(ground_truth.image_ids, "matching")):
        rows = np.asarray(detections.get(image_id, ()), dtype=np.float64).reshape(-1, 5)
        if not len(rows):
            continue
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        start, end = ground_truth.offsets[i : i + 2]
        best = np.full(len(rows), _UNMATCHED if end > start else _NOT_COUNTED, dtype=np.int64)
        if end > start:
            boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)
            step = max(1, _IOU_CHUNK // int(end - start))
            for at in range(0, len(boxes), step):
                ious = pixel_iou(ground_truth.boxes[start:end], boxes[at : at + step])
                chunk = ious.argmax(axis=0)
                hit = ious[chunk, np.arange(len(chunk))] >= _IOU_THRESH
                best[at : at + step][hit] = start + chunk[hit]
        is_first = np.zeros(len(rows), dtype=bool)
        faces, first_rows = np.unique(best, return_index=True)
        is_first[first_rows[faces >= 0]] = True
        matched.append(best)
        first.append(is_first)
        scores.append(rows[:, 4])
    return np.concatenate(matched), np.concatenate(first), np.concatenate(scores)


def _threshold_bins(scores: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    """Steps 2 and 6: which of the T thresholds 1 - t / T each score (N,) passes first, from 0; T for none."""
    limits = np.finfo(np.float32)
    lowest = min(lowest, float(limits.max))
    highest = max(highest, float(limits.tiny))  # the tool's running maximum starts there: matters if all are <= 0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        normalized = (scores - lowest) / (highest - lowest)
    thresholds = 1 - np.arange(1, _NUM_THRESHOLDS + 1) / _NUM_THRESHOLDS
    bins = _NUM_THRESHOLDS - np.searchsorted(thresholds[::-1], normalized, side="right")
    return np.where(np.isnan(normalized), _NUM_THRESHOLDS, bins)
