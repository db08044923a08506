"""gs_d2: scale-invariant face detection by group sampling, a Detectron2 project."""
