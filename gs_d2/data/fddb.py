"""FDDB: reads the official lists of ellipses and registers fddb, for testing only.

Layout under $DETECTRON2_DATASETS (default ./datasets), with the folder names of the two official archives::

    fddb/
      FDDB-folds/FDDB-fold-{01..10}-ellipseList.txt    (FDDB-folds.tgz)
      originalPics/<year>/<month>/<day>/big/*.jpg      (originalPics.tar.gz)
"""

import os

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data.missing_files import check_images, where_it_belongs
from gs_d2.data.records import Record
from gs_d2.formats.fddb import bounding_boxes, read_annotations
from gs_d2.formats.folders import undoubled


def load_fddb(annotations, image_root) -> list[dict]:
    """Reads the ellipses into Detectron2 dataset dicts; no image is opened.

    Args:
        annotations: folder of the `FDDB-fold-*-ellipseList.txt`, or one such list.
        image_root: folder that the lists' paths start from.

    Returns:
        For each image a :class:`gs_d2.data.records.Record` with
            file_name (str), image_id (str): "<year>/<month>/<day>/big/<name without ending>";
            gt_ellipses (float64 [n, 5]): major radius, minor radius, angle in radians, centre x, centre y;
            gt_boxes (float32 [n, 4]): XYXY pixels, upright around the ellipses, and so beyond the image in places;
            gt_ignore (bool [n]): False, FDDB has nothing to ignore;
            attributes (dict): empty.

    Raises:
        FileNotFoundError: lists or images are missing; says where they belong.
        ValueError: a line cannot be what it should be; names file and line.
    """
    hint = where_it_belongs("FDDB", "fddb/FDDB-folds and fddb/originalPics")
    try:
        ellipses_of = read_annotations(annotations)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {hint}") from error
    dataset_dicts, base = [], undoubled(image_root)
    for image, ellipses in ellipses_of.items():
        dataset_dicts.append(
            Record(
                file_name=os.path.join(base, f"{image}.jpg"),
                image_id=image,
                gt_ellipses=ellipses,
                gt_boxes=bounding_boxes(ellipses).astype(np.float32),
                gt_ignore=np.zeros(len(ellipses), dtype=bool),
                attributes={},
            )
        )
    check_images(dataset_dicts, image_root, hint)
    return dataset_dicts


def register_fddb(name, annotations, image_root):
    """Registers FDDB, or some of its folds, under `name`; touches no file until the data set is asked for."""
    DatasetCatalog.register(name, lambda: load_fddb(annotations, image_root))
    MetadataCatalog.get(name).set(
        thing_classes=["face"],
        thing_dataset_id_to_contiguous_id={1: 0},
        evaluator_type="fddb",
        annotations=str(annotations),
        image_root=str(image_root),
    )


def register_all_fddb(root):
    """Registers fddb under the folder `root`."""
    base = os.path.join(root, "fddb")
    register_fddb("fddb", os.path.join(base, "FDDB-folds"), os.path.join(base, "originalPics"))
