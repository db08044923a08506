"""WIDER FACE: reads the official lists and registers wider_face_train, wider_face_val and wider_face_test.

Layout under $DETECTRON2_DATASETS (default ./datasets), with the official folder names::

    widerface/
      WIDER_{train,val,test}/images/<event>/*.jpg
      wider_face_split/wider_face_{train,val}_bbx_gt.txt, wider_face_test_filelist.txt
      ground_truth/wider_{face,easy,medium,hard}_val.mat    (from the official evaluation tools)
"""

import os

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data.missing_files import where_it_belongs
from gs_d2.data.records import Record
from gs_d2.formats.folders import undoubled
from gs_d2.formats.wider_face import add_labels, read_list


def load_wider_face(list_file, image_root, attributes_mat=None) -> list[dict]:
    """Reads an official list into Detectron2 dataset dicts; no image is opened.

    Args:
        list_file: `wider_face_{train,val}_bbx_gt.txt`, or a file list with one image path a line.
        image_root: folder that the list's paths start from.
        attributes_mat: `wider_face_{train,val}.mat`; gives the attributes where the list has only boxes and this
            file exists.

    Returns:
        For each image a :class:`gs_d2.data.records.Record` with
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
    list_file = undoubled(list_file)
    if not list_file.is_file():
        layout = "widerface/wider_face_split and widerface/WIDER_{train,val,test}/images"
        raise FileNotFoundError(f"There is no list {list_file}. {where_it_belongs('WIDER FACE', layout)}")
    images = read_list(list_file)
    image_root = undoubled(image_root)
    if attributes_mat is not None and undoubled(attributes_mat).is_file():
        add_labels(images, undoubled(attributes_mat))
    return [
        Record(
            file_name=os.path.join(image_root, image.path),
            image_id=image.image_id,
            gt_boxes=image.boxes.astype(np.float32),
            gt_ignore=image.ignore,
            attributes=image.labels,
        )
        for image in images
    ]


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
