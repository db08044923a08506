"""Detectors of other papers, for Tables 6 and 10: each a module of its own, registered with Detectron2 on import."""

from gs_d2.modeling.pipelines.centernet import (
    CenterNet,
    CenterNetHead,
    TransposedConvs,
    build_resnet_transposed_backbone,
)
from gs_d2.modeling.pipelines.darknet import Darknet53, build_darknet53_backbone
from gs_d2.modeling.pipelines.retinaface import RetinaFaceHead, build_retinaface_resnet_fpn_backbone
from gs_d2.modeling.pipelines.rfcn import PositionSensitiveROIHeads
from gs_d2.modeling.pipelines.ssd import build_resnet_ssd_backbone
from gs_d2.modeling.pipelines.yolov3 import YOLOv3Neck, build_darknet53_yolov3_backbone

__all__ = [
    "CenterNet",
    "CenterNetHead",
    "Darknet53",
    "PositionSensitiveROIHeads",
    "RetinaFaceHead",
    "TransposedConvs",
    "YOLOv3Neck",
    "build_darknet53_backbone",
    "build_darknet53_yolov3_backbone",
    "build_resnet_ssd_backbone",
    "build_resnet_transposed_backbone",
    "build_retinaface_resnet_fpn_backbone",
]
