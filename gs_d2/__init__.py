"""Scale-invariant face detection by group sampling, a Detectron2 project.

``gs_d2.ops`` and ``gs_d2.sampling`` need torch only. :func:`gs_d2.config.add_gs_config` registers the detectors and
the data sets with Detectron2. ``import gs_d2.modeling`` registers the detectors, ``import gs_d2.data`` the data sets.
"""

__version__ = "0.1.0"
