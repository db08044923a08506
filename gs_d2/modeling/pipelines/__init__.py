"""Detectors of other papers, for Table 6: each a module of its own, registered with Detectron2 on import."""

from gs_d2.modeling.pipelines.retinaface import RetinaFaceHead, build_retinaface_resnet_fpn_backbone
from gs_d2.modeling.pipelines.ssd import SSDHead, build_resnet_ssd_backbone

__all__ = [
    "RetinaFaceHead",
    "SSDHead",
    "build_resnet_ssd_backbone",
    "build_retinaface_resnet_fpn_backbone",
]
