"""The detectors, registered with Detectron2 on import."""

from gs_d2 import compat  # noqa: F401  isort: skip

from gs_d2.modeling import generalized_rcnn, pipelines  # noqa: F401  (describes Detectron2's; registers Tables 6's and 10's)
from gs_d2.modeling.anchors import ScaleStrideAnchorGenerator
from gs_d2.modeling.backbone import TopDown, build_resnet_topdown_backbone, build_resnet_topdown_p6_backbone
from gs_d2.modeling.bn_folding import fuse
from gs_d2.modeling.box_detector import BoxDetector
from gs_d2.modeling.description import BreakingDefault, DetectionSettings, description_of
from gs_d2.modeling.group_loss import GroupLoss
from gs_d2.modeling.matcher import TwoPassMatcher
from gs_d2.modeling.meta_arch import GroupedFastRCNN, RPNDetector
from gs_d2.modeling.retinanet import GroupSamplingRetinaNet
from gs_d2.modeling.roi_heads import GroupedROIHeads
from gs_d2.modeling.rpn import GroupSamplingRPN
from gs_d2.modeling.rpn_heads import DilatedRPNHead, PerMapRPNHead, SoftmaxRPNHead
from gs_d2.modeling.timm_backbone import TimmBackbone, build_timm_topdown_backbone
from gs_d2.sampling import GroupSampler, group_by_scale

__all__ = [
    "BoxDetector",
    "BreakingDefault",
    "DetectionSettings",
    "DilatedRPNHead",
    "GroupLoss",
    "GroupSampler",
    "GroupSamplingRPN",
    "GroupSamplingRetinaNet",
    "GroupedFastRCNN",
    "GroupedROIHeads",
    "PerMapRPNHead",
    "RPNDetector",
    "ScaleStrideAnchorGenerator",
    "SoftmaxRPNHead",
    "TimmBackbone",
    "TopDown",
    "TwoPassMatcher",
    "build_resnet_topdown_backbone",
    "build_resnet_topdown_p6_backbone",
    "build_timm_topdown_backbone",
    "description_of",
    "fuse",
    "group_by_scale",
]
