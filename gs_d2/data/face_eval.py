"""AFW and PASCAL faces, annotated by "face-eval": registers afw and pascal_face, for testing only.

Layout under $DETECTRON2_DATASETS (default ./datasets)::

    afw/
      testimages/*.jpg        (the folder of AFW's archive; its own annotations are not used)
      annotations/new_annotations_AFW.mat
    pascal_face/
      images/*.jpg
      annotations/Annotations_Face_PASCALLayout_large_fixed.mat

The .mat files are those of face-eval's own folder `annotations`. PASCAL faces has no archive of images: its 851 are
spread over the JPEGImages of PASCAL VOC's years, so copy or link these into pascal_face/images.
"""

import os

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data.missing_files import check_images, where_it_belongs
from gs_d2.data.records import Record
from gs_d2.formats.face_eval import TITLES, read_annotations
from gs_d2.formats.folders import undoubled

_IMAGE_FOLDERS = {"afw": "testimages", "pascal_face": "images"}


def load_face_eval(benchmark, annotations, image_root) -> list[dict]:
    """Reads face-eval's MATLAB file of a benchmark into Detectron2 dataset dicts; no image is opened.

    Args:
        benchmark: `afw` or `pascal_face`.
        annotations: the `.mat` file, or the folder that holds it under its own name.
        image_root: folder of the images.

    Returns:
        For each image a :class:`gs_d2.data.records.Record` with
            file_name (str), image_id (str): name without ending;
            gt_boxes (float32 [n, 4]): XYXY pixels;
            gt_ignore (bool [n]): what the protocol ignores: flagged, or narrower or lower than 30 pixels;
            attributes (dict): empty.

    Raises:
        FileNotFoundError: annotations or images are missing; says where they belong.
        ValueError: the file is of another layout, or the benchmark unknown.
    """
    folder = _IMAGE_FOLDERS.get(benchmark, "images")
    layout = f"{benchmark}/annotations and {benchmark}/{folder}"
    hint = where_it_belongs(TITLES.get(benchmark, benchmark), layout)
    try:
        faces = read_annotations(annotations, benchmark)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {hint}") from error
    base = undoubled(image_root)
    dataset_dicts = [
        Record(
            file_name=os.path.join(base, f"{image}.jpg"),
            image_id=image,
            gt_boxes=boxes.astype(np.float32),
            gt_ignore=faces.ignore[image],
            attributes={},
        )
        for image, boxes in faces.boxes.items()
    ]
    check_images(dataset_dicts, image_root, hint)
    return dataset_dicts


def register_face_eval(name, benchmark, annotations, image_root):
    """Registers a benchmark under `name`; touches no file until the data set is asked for."""
    DatasetCatalog.register(name, lambda: load_face_eval(benchmark, annotations, image_root))
    MetadataCatalog.get(name).set(
        thing_classes=["face"],
        thing_dataset_id_to_contiguous_id={1: 0},
        evaluator_type="face_eval",
        benchmark=benchmark,
        annotations=str(annotations),
        image_root=str(image_root),
    )


def register_all_face_eval(root):
    """Registers afw and pascal_face under the folder `root`."""
    for benchmark, images in _IMAGE_FOLDERS.items():
        base = os.path.join(root, benchmark)
        register_face_eval(benchmark, benchmark, os.path.join(base, "annotations"), os.path.join(base, images))
