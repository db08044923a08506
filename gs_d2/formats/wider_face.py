"""WIDER FACE: the official lists and MATLAB files of annotated faces.

Shape shorthand in this module:
    I: number of images, M: annotated boxes of all images, n: of one image
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from gs_d2.formats.files import FileTree, is_inside, numbers_of
from gs_d2.formats.mat import load_mat
from gs_d2.formats.text import decoded, end_of, lines_of

OFFICIAL_SUBSETS = ("easy", "medium", "hard")
GROUND_TRUTH_FILES = ("wider_face_val.mat", *(f"wider_{name}_val.mat" for name in OFFICIAL_SUBSETS))

# Names of the label values, from the readme of the annotations.
ATTRIBUTES = {
    "blur": ("clear", "normal", "heavy"),
    "expression": ("typical", "exaggerate"),
    "illumination": ("normal", "extreme"),
    "occlusion": ("none", "partial", "heavy"),
    "pose": ("typical", "atypical"),
}
LABELS = tuple(sorted([*ATTRIBUTES, "invalid"]))  # the columns of a list after the box, in this order

_BOX_COLUMNS = 4
_COLUMNS = (_BOX_COLUMNS, _BOX_COLUMNS + len(LABELS))
_MAX_DIGITS = 20  # of a number of faces
_MAX_NUMBER = 1e6  # pixels; also keeps NaN and infinity out


@dataclass
class ListedImage:
    """One image of a list.

    Attributes:
        path: `<event>/<image>.jpg`, as listed.
        boxes (ndarray[n, 4]): float64 (x, y, x + w, y + h) as listed, with the degenerate ones.
        ignore (ndarray[n]): bool; flagged invalid, or w or h <= 0.
        labels: name of `LABELS` -> uint8 ndarray[n]; zeros where the list has only boxes.
    """

    path: str
    boxes: np.ndarray
    ignore: np.ndarray
    labels: dict[str, np.ndarray]

    @property
    def image_id(self) -> str:
        """`<event>/<image>`, without ending."""
        return str(PurePosixPath(self.path).with_suffix(""))


def read_list(list_file: str | os.PathLike) -> list[ListedImage]:
    """Reads `wider_face_{train,val}_bbx_gt.txt`, or a file list with one image path a line, which gives no boxes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line cannot be what it should be, or an image comes twice; names file and line.
    """
    lines = lines_of(decoded(Path(list_file).read_bytes(), str(list_file)))
    images = []
    line_of = {}  # image_id -> line of its name
    lines_of_names = {True: [], False: []}  # of images with and without a number of faces
    at = 0
    while at < len(lines):
        name = lines[at]
        at += 1
        if not name:
            continue
        _check_image_name(name, list_file, at)
        name_line = at
        while at < len(lines) and not lines[at]:
            at += 1
        has_count = at < len(lines) and not _is_image_name(lines[at])
        lines_of_names[has_count].append(name_line)
        rows = np.zeros((0, _BOX_COLUMNS))
        if has_count:
            rows, at = _read_rows(lines, at, list_file)
        image = _listed_image(name, rows)
        first_line = line_of.setdefault(image.image_id, name_line)
        if first_line != name_line:
            raise ValueError(
                f"{list_file}:{name_line}: image {image.image_id!r} for the second time, after line {first_line}"
            )
        images.append(image)
    if lines_of_names[True] and lines_of_names[False]:
        raise ValueError(
            f"{list_file}:{lines_of_names[False][0]}: this image has no number of faces, and others of the list have"
        )
    return images


def _is_image_name(line: str) -> bool:
    return "/" in line


def _check_image_name(name, list_file, line_number):
    if len(PurePosixPath(name).parts) != 2 or not is_inside(name):
        raise ValueError(f"{list_file}:{line_number}: expected an image path like event/name.jpg, got {name[:80]!r}")


def _read_rows(lines, at, list_file):
    """The face count at line index `at` and its rows; returns them [n, 4 or 10] and the index after them."""
    text = lines[at]
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise ValueError(f"{list_file}:{at + 1}: expected a number of faces, got {text[:80]!r}")
    count = int(text)
    at += 1
    # Four images of the train list count 0 faces and yet have one row, of zeros.
    after = "".join(lines[at : end_of(lines, at, 1)])
    dummy = count == 0 and after and not _is_image_name(after)
    expected = 1 if dummy else count
    stop = end_of(lines, at, expected)
    filled = [i for i in range(at, stop) if lines[i]]
    rows = _numbers([lines[i] for i in filled])
    if rows is None or len(rows) != expected or (dummy and rows.any()):
        right = 0 if dummy else _num_right_rows([lines[i] for i in filled])
        wrong = filled[right] if right < len(filled) else (filled[-1] + 1 if filled else at)
        got = repr(lines[wrong][:80]) if right < len(filled) else "the end of the file"
        raise ValueError(
            f"{list_file}:{wrong + 1}: expected {text} rows of numbers below {_MAX_NUMBER:g} "
            f"'x y w h {' '.join(LABELS)}', and after {right} of them got {got}"
        )
    return rows[:count] if count else np.zeros((0, _BOX_COLUMNS)), stop


def _numbers(lines) -> np.ndarray | None:
    """The rows [n, 4 or 10], or None where they are anything else."""
    return numbers_of(lines, _COLUMNS, _MAX_NUMBER) if lines else np.zeros((0, _BOX_COLUMNS))


def _num_right_rows(lines) -> int:
    """How many lines from the first on go on the rows."""
    return next((i for i, line in enumerate(lines) if _numbers([lines[0], line]) is None), len(lines))


def _listed_image(name, rows) -> ListedImage:
    x, y, w, h = rows[:, :_BOX_COLUMNS].T
    flags = rows[:, _BOX_COLUMNS:] if rows.shape[1] > _BOX_COLUMNS else np.zeros((len(rows), len(LABELS)))
    labels = {label: flags[:, k].astype(np.uint8) for k, label in enumerate(LABELS)}
    ignore = (w <= 0) | (h <= 0) | (labels["invalid"] > 0)
    return ListedImage(name, np.stack([x, y, x + w, y + h], axis=1), ignore, labels)


def add_labels(images: list[ListedImage], mat_file: str | os.PathLike) -> None:
    """Fills in the labels of a list that has only boxes from `wider_face_{train,val}.mat`; leaves other lists alone.

    Raises:
        ValueError: the file is damaged, or of another layout.
    """
    if any(values.any() for image in images for values in image.labels.values()):
        return
    where = str(mat_file)
    mat = load_mat(Path(mat_file).read_bytes(), where)
    with _official_layout(where):
        lists = [_per_image(mat[f"{label}_label_list"]) for label in LABELS]
        labels_of = {
            image_id: {label: v.reshape(-1).astype(np.uint8) for label, v in zip(LABELS, values, strict=True)}
            for image_id, *values in zip(_image_ids(mat), *lists, strict=True)
        }
    for image in images:
        for label, values in labels_of.get(image.image_id, {}).items():
            if len(values) == len(image.boxes):  # the train .mat has four faces more than the list
                image.labels[label] = values
        image.ignore = image.ignore | (image.labels["invalid"] > 0)


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
        for name in LABELS:
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
            with _official_layout(where):
                image_ids = _image_ids(face)
                boxes = [b.astype(np.float64).reshape(-1, 4) for b in _per_image(face["face_bbx_list"])]
                boxes = [np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1) for b in boxes]
                labels = {
                    label: _per_image(face[f"{label}_label_list"]) for label in LABELS if f"{label}_label_list" in face
                }
                attributes = [{label: labels[label][i] for label in labels} for i in range(len(boxes))]
            ground_truth = cls.from_boxes(image_ids, boxes, attributes)
            subsets = {}
            for name in OFFICIAL_SUBSETS:
                subset = _load_mat(tree, f"wider_{name}_val.mat")
                if subset is not None:
                    subsets[name] = _subset_mask(*subset, ground_truth)
        return cls(image_ids, ground_truth.boxes, ground_truth.offsets, subsets | ground_truth.subsets)


def _load_mat(tree: FileTree, file_name: str) -> tuple[str, dict] | None:
    """Where a MATLAB file of the tree is, and its variables; None if there is none of that name."""
    found = tree.distinct(name for name in tree.names if name.rsplit("/", 1)[-1].lower() == file_name)
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{tree.path}: both {found[0]} and {found[1]}; give the folder of one of them")
    where = tree.where(found[0])
    return where, load_mat(tree.read_bytes(found[0]), where)


@contextlib.contextmanager
def _official_layout(where: str):
    """What the variables of a file of another layout raise becomes a ValueError that names it."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: not of the layout of WIDER FACE's own file ({error!r})") from error


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
    with _official_layout(where):
        image_ids, kept = _image_ids(mat), _per_image(mat["gt_list"])
    if image_ids != ground_truth.image_ids:
        raise ValueError(f"{where}: lists other images than wider_face_val.mat; take all four from one source")
    for i, indices in enumerate(kept):
        first, end = ground_truth.offsets[i : i + 2]
        indices = indices.reshape(-1).astype(np.int64)
        if len(indices) and not (1 <= indices.min() and indices.max() <= end - first):
            raise ValueError(f"{where}: {image_ids[i]} has no box {indices.max()}; take all four from one source")
        mask[first + indices - 1] = True
    return mask
