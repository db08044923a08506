"""Testing: a detector for pictures, and beyond one forward pass image pyramids, tiles for images that do not fit into
memory, and box voting.

Models are used through four public members only (see :class:`gs_d2.modeling.BoxDetector`), so any detector that has
them can be tested this way.
"""

from gs_d2 import compat  # noqa: F401  isort: skip

from gs_d2.inference.face_detector import FaceDetector
from gs_d2.inference.pyramid import PyramidDetector

__all__ = ["FaceDetector", "PyramidDetector"]
