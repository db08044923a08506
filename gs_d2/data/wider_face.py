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
        ValueError: a line cannot be what it should be; names file and line.
    """
    list_file = Path(list_file)
    if not list_file.is_file():
        layout = "widerface/wider_face_split and widerface/WIDER_{train,val,test}/images"
        raise FileNotFoundError(f"There is no list {list_file}. {where_it_belongs('WIDER FACE', layout)}")
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{list_file}: not UTF-8 text ({error})") from error
    records = []
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
        records.append(_record(name, rows, image_root))
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
        raise ValueError(f"{list_file}:{line_number}: expected an image path like event/name.jpg, got {name!r}")


def _read_rows(lines, at, list_file):
    """The face count at line index `at` and its rows; returns them [n, 4 or 10] and the index after them."""
    text = lines[at].strip()
    if not text.isdecimal():
        raise ValueError(f"{list_file}:{at + 1}: expected a number of faces, got {text!r}")
    count = int(text)
    at += 1
    # Four images of the train list count 0 faces and yet have one row, of zeros.
    dummy = count == 0 and at < len(lines) and lines[at].strip() and not _is_image_name(lines[at])
    stop = at + (1 if dummy else count)
    try:
        rows = np.array([line.split() for line in lines[at:stop]], dtype=np.float64)
        well_formed = rows.shape in ((stop - at, 10), (stop - at, _BOX_COLUMNS)) or stop == at
    except ValueError:
        well_formed = False
    well_formed = well_formed and len(rows) == stop - at and (np.abs(rows) < _MAX_NUMBER).all()
    if not well_formed or (dummy and rows.any()):
        raise ValueError(
            f"{list_file}:{at + 1}: expected {count} rows of numbers below {_MAX_NUMBER:g} "
            f"'x y w h {' '.join(ATTRIBUTES)}', and the lines up to {stop} are something else"
        )
    return rows[:count].reshape(count, -1) if count else np.zeros((0, _BOX_COLUMNS)), stop


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
    mat = load_mat(Path(mat_file).read_bytes(), str(mat_file))
    try:
        _add_labels(records, mat)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{mat_file}: not of the layout of WIDER FACE's own file ({error!r})") from error


def _add_labels(records, mat):
    by_id = {}
    for e, event in enumerate(mat["event_list"][:, 0]):
        for i, name in enumerate(mat["file_list"][e, 0][:, 0]):
            by_id[f"{event[0]}/{name[0]}"] = (e, i)
    for record in records:
        if record["image_id"] not in by_id:
            continue
        e, i = by_id[record["image_id"]]
        for key in ATTRIBUTES:
            values = mat[f"{key}_label_list"][e, 0][i, 0].reshape(-1).astype(np.uint8)
            if len(values) == len(record["gt_boxes"]):  # the train .mat has four faces more than the list
                record["attributes"][key] = values
        record["gt_ignore"] = record["gt_ignore"] | (record["attributes"]["invalid"] > 0)


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
