"""WIDER FACE: reads the official lists and registers wider_face_train, wider_face_val and wider_face_test.

Layout under $DETECTRON2_DATASETS (default ./datasets), with the official folder names::

    widerface/
      WIDER_{train,val,test}/images/<event>/*.jpg
      wider_face_split/wider_face_{train,val}_bbx_gt.txt, wider_face_test_filelist.txt
      ground_truth/wider_{face,easy,medium,hard}_val.mat    (from the official evaluation tools)
"""

import os
from pathlib import Path, PurePosixPath

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data.missing_files import where_it_belongs
from gs_d2.formats.files import is_inside
from gs_d2.formats.mat import load_mat

ATTRIBUTES = ("blur", "expression", "illumination", "invalid", "occlusion", "pose")
_BOX_COLUMNS = 4
_COLUMNS = (_BOX_COLUMNS, _BOX_COLUMNS + len(ATTRIBUTES))
_MAX_DIGITS = 20  # of a number of faces
_MAX_NUMBER = 1e6  # pixels; also keeps NaN and infinity out


def load_wider_face(list_file, image_root, attributes_mat=None) -> list[dict]:
    """Reads an official list into Detectron2 dataset dicts; no image is opened.

    Args:
        list_file: `wider_face_{train,val}_bbx_gt.txt`, or a file list with one image path a line.
        image_root: folder that the list's paths start from.
        attributes_mat: `wider_face_{train,val}.mat`; gives the attributes where the list has only boxes and this
            file exists.

    Returns:
        For each image a dict with
            file_name (str), image_id (str): "<event>/<name without ending>";
            gt_boxes (float32 [n, 4]): XYXY pixels as listed, boxes without area included;
            gt_ignore (bool [n]): flagged invalid, or width or height <= 0;
            attributes (dict of uint8 [n]): blur, expression, illumination, invalid, occlusion, pose.
        A file list gives no boxes.

    Raises:
        FileNotFoundError: there is no list.
        ValueError: a line cannot be what it should be, or an image comes twice; names file and line. Or the .mat is
            damaged.
    """
    list_file = Path(list_file)
    if not list_file.is_file():
        layout = "widerface/wider_face_split and widerface/WIDER_{train,val,test}/images"
        raise FileNotFoundError(f"There is no list {list_file}. {where_it_belongs('WIDER FACE', layout)}")
    content = list_file.read_bytes()
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line_number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{list_file}:{line_number}: not UTF-8 text ({error.reason})") from error
    records = []
    line_of = {}  # image_id -> line of its name
    lines_of_names = {True: [], False: []}  # of images with and without a number of faces
    at = 0
    while at < len(lines):
        name = lines[at].strip()
        at += 1
        if not name:
            continue
        _check_image_name(name, list_file, at)
        name_line = at
        while at < len(lines) and not lines[at].strip():
            at += 1
        has_count = at < len(lines) and not _is_image_name(lines[at])
        lines_of_names[has_count].append(name_line)
        rows = np.zeros((0, _BOX_COLUMNS))
        if has_count:
            rows, at = _read_rows(lines, at, list_file)
        record = _record(name, rows, image_root)
        first_line = line_of.setdefault(record["image_id"], name_line)
        if first_line != name_line:
            raise ValueError(
                f"{list_file}:{name_line}: image {record['image_id']!r} for the second time, after line {first_line}"
            )
        records.append(record)
    if lines_of_names[True] and lines_of_names[False]:
        raise ValueError(
            f"{list_file}:{lines_of_names[False][0]}: this image has no number of faces, and others of the list have"
        )
    if attributes_mat is not None and Path(attributes_mat).is_file():
        _add_attributes(records, attributes_mat)
    return records


def _is_image_name(line: str) -> bool:
    return "/" in line


def _check_image_name(name, list_file, line_number):
    if len(PurePosixPath(name).parts) != 2 or not is_inside(name):
        raise ValueError(f"{list_file}:{line_number}: expected an image path like event/name.jpg, got {name[:80]!r}")


def _read_rows(lines, at, list_file):
    """The face count at line index `at` and its rows; returns them [n, 4 or 10] and the index after them."""
    text = lines[at].strip()
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise ValueError(f"{list_file}:{at + 1}: expected a number of faces, got {text[:80]!r}")
    count = int(text)
    at += 1
    # Four images of the train list count 0 faces and yet have one row, of zeros.
    dummy = count == 0 and at < len(lines) and lines[at].strip() and not _is_image_name(lines[at])
    stop = at + (1 if dummy else count)
    rows = _numbers(lines[at:stop])
    if rows is None or len(rows) != stop - at or (dummy and rows.any()):
        wrong = at if dummy else _first_wrong_row(lines, at)
        got = repr(lines[wrong].strip()[:80]) if wrong < len(lines) else "the end of the file"
        raise ValueError(
            f"{list_file}:{wrong + 1}: expected {text} rows of numbers below {_MAX_NUMBER:g} "
            f"'x y w h {' '.join(ATTRIBUTES)}', and after {wrong - at} of them got {got}"
        )
    return rows[:count] if count else np.zeros((0, _BOX_COLUMNS)), stop


def _numbers(lines) -> np.ndarray | None:
    """The rows [n, 4 or 10], or None where they are anything else."""
    if not lines:
        return np.zeros((0, _BOX_COLUMNS))
    if any("_" in line for line in lines):  # Python reads 1_000 as a number, no other tool does
        return None
    try:
        rows = np.array([line.split() for line in lines], dtype=np.float64)
    except ValueError:
        return None
    right = rows.ndim == 2 and rows.shape[1] in _COLUMNS and (np.abs(rows) < _MAX_NUMBER).all()
    return rows if right else None


def _first_wrong_row(lines, at) -> int:
    """Index of the first line from `at` that does not go on the rows."""
    row = at
    while row < len(lines) and _numbers([lines[at], lines[row]]) is not None:
        row += 1
    return row


def _record(name, rows, image_root):
    x, y, w, h = rows[:, :_BOX_COLUMNS].T
    flags = rows[:, _BOX_COLUMNS:] if rows.shape[1] > _BOX_COLUMNS else np.zeros((len(rows), len(ATTRIBUTES)))
    attributes = {key: flags[:, k].astype(np.uint8) for k, key in enumerate(ATTRIBUTES)}
    return {
        "file_name": os.path.join(image_root, name),
        "image_id": str(PurePosixPath(name).with_suffix("")),
        "gt_boxes": np.stack([x, y, x + w, y + h], axis=1).astype(np.float32),
        "gt_ignore": (w <= 0) | (h <= 0) | (attributes["invalid"] > 0),
        "attributes": attributes,
    }


def _add_attributes(records, mat_file):
    """Fills in the attributes of lists that have only boxes, from the official .mat of the same split."""
    if any(values.any() for record in records for values in record["attributes"].values()):
        return
    labels_of = _read_labels(mat_file)
    for record in records:
        for key, values in labels_of.get(record["image_id"], {}).items():
            if len(values) == len(record["gt_boxes"]):  # the train .mat has four faces more than the list
                record["attributes"][key] = values
        record["gt_ignore"] = record["gt_ignore"] | (record["attributes"]["invalid"] > 0)


def _read_labels(mat_file) -> dict[str, dict[str, np.ndarray]]:
    """image_id -> attribute -> uint8 [n]."""
    labels_of = {}
    mat = load_mat(Path(mat_file).read_bytes(), str(mat_file))
    try:
        for e, event in enumerate(mat["event_list"][:, 0]):
            for i, name in enumerate(mat["file_list"][e, 0][:, 0]):
                labels_of[f"{event[0]}/{name[0]}"] = {
                    key: mat[f"{key}_label_list"][e, 0][i, 0].reshape(-1).astype(np.uint8) for key in ATTRIBUTES
                }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{mat_file}: not of the layout of WIDER FACE's own file ({error!r})") from error
    return labels_of


def register_wider_face(name, list_file, image_root, attributes_mat=None, ground_truth_dir=None):
    """Registers one split under `name`; touches no file until the data set is asked for."""
    DatasetCatalog.register(name, lambda: load_wider_face(list_file, image_root, attributes_mat))
    MetadataCatalog.get(name).set(
        thing_classes=["face"],
        thing_dataset_id_to_contiguous_id={1: 0},
        evaluator_type="wider_face",
        list_file=str(list_file),
        image_root=str(image_root),
        ground_truth_dir=None if ground_truth_dir is None else str(ground_truth_dir),
    )


def register_all_wider_face(root):
    """Registers the three official splits under the folder `root`."""
    base = os.path.join(root, "widerface")
    lists = {
        "train": "wider_face_train_bbx_gt.txt",
        "val": "wider_face_val_bbx_gt.txt",
        "test": "wider_face_test_filelist.txt",
    }
    for split, list_name in lists.items():
        register_wider_face(
            f"wider_face_{split}",
            os.path.join(base, "wider_face_split", list_name),
            os.path.join(base, f"WIDER_{split}", "images"),
            os.path.join(base, "wider_face_split", f"wider_face_{split}.mat"),
            os.path.join(base, "ground_truth"),
        )
