"""Scale-invariant face detection by group sampling, a Detectron2 project.

``import gs_d2`` and ``import gs_d2.ops`` need torch only. ``import gs_d2.modeling`` and ``import gs_d2.data`` register
the detectors and data sets with Detectron2.
"""

__version__ = "0.1.0"
