"""The paper's Table 6: group sampling in other detectors. Each module is one of them, registered on import."""

from gs_d2.modeling.pipelines import darknet, rfcn, yolov3  # noqa: F401
