"""A detector whose output depends on a few pixels only, so that views and tiles of an image can be compared exactly."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import nn

from gs_d2.modeling import (
    GroupedFastRCNN,
    GroupedROIHeads,
    GroupSampler,
    GroupSamplingRPN,
    RPNDetector,
    ScaleStrideAnchorGenerator,
    SoftmaxRPNHead,
    TwoPassMatcher,
)
from gs_d2.modeling.criterion import GroupCriterion
from gs_d2.modeling.group_loss import GroupLoss

SCALES = [16, 32]
TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
DIVISIBILITY = 16


class Blocks(Backbone):
    """One map of stride 4, each cell from its own 4 x 4 pixels."""

    size_divisibility = DIVISIBILITY

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)

    def output_shape(self):
        return {"p2": ShapeSpec(channels=8, stride=4)}

    def forward(self, x):
        return {"p2": self.conv(x).relu()}


def build(max_detections=200, topk=3000, seed=0, detector=RPNDetector, **rpn):
    torch.manual_seed(seed)
    backbone, proposal_generator = Blocks(), build_rpn(topk, **rpn)
    model = detector(
        backbone=backbone,
        proposal_generator=proposal_generator,
        pixel_mean=(120.0, 110.0, 100.0),
        pixel_std=(60.0, 60.0, 60.0),
        max_detections=max_detections,
        nms_thresh=0.5,
    )
    nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight, std=0.5)
    nn.init.normal_(model.proposal_generator.rpn_head.anchor_deltas.weight, std=0.02)
    return model.eval()


def build_group_loss(thresholds, sampler):
    return GroupLoss(
        matcher=TwoPassMatcher(thresholds), sampler=sampler, criterion=GroupCriterion(TRANSFORM), group_scales=SCALES
    )


def build_rpn(topk, **rpn):
    return GroupSamplingRPN(
        in_features=["p2"],
        head=SoftmaxRPNHead(in_channels=8, num_anchors=2),
        anchor_generator=ScaleStrideAnchorGenerator(
            sizes=[SCALES], aspect_ratios=[[1.0]], feature_strides=[4], anchor_strides=[[4, 8]]
        ),
        group_loss=build_group_loss([0.4, 0.6], GroupSampler(2, 64)),
        box2box_transform=TRANSFORM,
        pre_nms_topk=(500, topk),
        post_nms_topk=(50, 500),
        **rpn,
    )


def build_two_stage(sampler="random", channels_last=False, autocast_dtype="", **arguments):
    def detector(**parts):
        predictor = FastRCNNOutputLayers(
            ShapeSpec(channels=16), box2box_transform=TRANSFORM, num_classes=1, cls_agnostic_bbox_reg=True
        )
        nn.init.normal_(predictor.cls_score.weight, std=0.5)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.02)
        roi_heads = GroupedROIHeads(
            in_features=["p2"],
            box_pooler=ROIPooler(output_size=3, scales=[0.25], sampling_ratio=2, pooler_type="ROIAlignV2"),
            box_head=FastRCNNConvFCHead(ShapeSpec(channels=8, height=3, width=3), conv_dims=[], fc_dims=[16]),
            box_predictor=predictor,
            num_classes=1,
            box2box_transform=TRANSFORM,
            group_loss=build_group_loss([0.5, 0.6], GroupSampler(2, 16, method=sampler)),
        )
        return GroupedFastRCNN(**parts, roi_heads=roi_heads, channels_last=channels_last, autocast_dtype=autocast_dtype)

    return build(detector=detector, nms_thresh=0.7, **arguments)


def image(height, width, seed=0, **size):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": pixels, **size}
