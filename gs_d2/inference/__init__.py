"""Testing: a detector for pictures, image pyramids, tiles for images that do not fit into memory, and box voting.

The code uses four public members of a model only (see :class:`gs_d2.modeling.BoxDetector`). Any detector with these
members can be tested in this way.
"""

from gs_d2 import compat  # noqa: F401  isort: skip

from gs_d2.inference.face_detector import FaceDetector
from gs_d2.inference.pyramid import PyramidDetector

__all__ = ["FaceDetector", "PyramidDetector"]
