"""Data sets, registered with Detectron2 on import (no file is touched), and what turns them into training views."""

import os

from gs_d2 import compat  # noqa: F401  isort: skip

from gs_d2.data.augmentation import FaceCrop, ScaleJitterCrop, ShortSideCrop
from gs_d2.data.check_data_sets import check_data_sets
from gs_d2.data.coco import CocoDatasetMapper, dataset_mapper_of
from gs_d2.data.dataset_mapper import FaceDatasetMapper
from gs_d2.data.face_eval import load_face_eval, register_all_face_eval, register_face_eval
from gs_d2.data.fddb import load_fddb, register_all_fddb, register_fddb
from gs_d2.data.loaders import build_test_loader, build_training_views
from gs_d2.data.subset import register_subset
from gs_d2.data.wider_face import load_wider_face, register_all_wider_face, register_wider_face

__all__ = [
    "CocoDatasetMapper",
    "FaceCrop",
    "FaceDatasetMapper",
    "ScaleJitterCrop",
    "ShortSideCrop",
    "build_test_loader",
    "build_training_views",
    "check_data_sets",
    "dataset_mapper_of",
    "load_face_eval",
    "load_fddb",
    "load_wider_face",
    "register_all_face_eval",
    "register_all_fddb",
    "register_all_wider_face",
    "register_face_eval",
    "register_fddb",
    "register_subset",
    "register_wider_face",
]

_root = os.environ.get("DETECTRON2_DATASETS", "datasets")
register_all_wider_face(_root)
register_all_fddb(_root)
register_all_face_eval(_root)
