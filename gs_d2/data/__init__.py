"""Data sets, registered with Detectron2 on import (no file is touched), and what turns them into training views."""

import os

from gs_d2 import compat  # noqa: F401  isort: skip

from gs_d2.data.augmentation import ScaleJitterCrop
from gs_d2.data.dataset_mapper import FaceDatasetMapper
from gs_d2.data.wider_face import load_wider_face, register_all_wider_face, register_wider_face

__all__ = [
    "FaceDatasetMapper",
    "ScaleJitterCrop",
    "load_wider_face",
    "register_all_wider_face",
    "register_wider_face",
]

register_all_wider_face(os.environ.get("DETECTRON2_DATASETS", "datasets"))
