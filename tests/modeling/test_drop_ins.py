"""The matcher and the sampler inside Detectron2's own RPN (that of examples/) and ROI heads, in ten lines; our RPN and
ROI heads inside Detectron2's own models."""

import inspect

import faster_rcnn  # of examples/: registers GroupSampledRPN, its lines are counted in tests/test_examples.py
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from gs_d2 import engine, ops
from gs_d2.config import add_gs_config, check_config, load_config
from gs_d2.modeling import GroupSampler, TwoPassMatcher, group_by_scale

SCALES = faster_rcnn.SCALES
NUM_PER_GROUP = 16  # what it draws


@ROI_HEADS_REGISTRY.register()
class GroupSampledROIHeads(StandardROIHeads):
    def label_and_sample_proposals(self, proposals, targets):
        self.proposal_matcher = TwoPassMatcher([0.5, 0.6])
        boxes = [Boxes.cat([p.proposal_boxes, t.gt_boxes]) for p, t in zip(proposals, targets, strict=True)]
        self.group_idxs = iter([group_by_scale(b.area().sqrt(), SCALES) for b in boxes])
        return super().label_and_sample_proposals(proposals, targets)

    def _sample_proposals(self, matched_idxs, matched_labels, gt_classes):
        sampled = GroupSampler(len(SCALES), NUM_PER_GROUP)(matched_labels, next(self.group_idxs))
        return super()._sample_proposals(matched_idxs, sampled, gt_classes)


def test_at_most_ten_lines():
    source = inspect.getsource(GroupSampledROIHeads).splitlines()
    assert len([line for line in source if line.strip()]) <= 10


def faster_rcnn_cfg(proposal_generator, roi_heads):
    """Detectron2's Faster R-CNN with R18-FPN and both parts replaced."""
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[scale] for scale in SCALES]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = proposal_generator
    cfg.MODEL.ROI_HEADS.NAME = roi_heads
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = len(SCALES) * NUM_PER_GROUP
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    return cfg


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(faster_rcnn_cfg("GroupSampledRPN", "GroupSampledROIHeads"))


def batch(num_images=2):
    inputs = []
    for i in range(num_images):
        instances = Instances((192, 256))
        instances.gt_boxes = Boxes(torch.tensor([[20.0, 20, 60, 60], [100.0, 30, 220, 150], [10.0, 100, 33, 123]]))
        instances.gt_classes = torch.zeros(3, dtype=torch.int64)
        image = torch.randint(0, 256, (3, 192, 256), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


def test_detectron2s_faster_rcnn_trains_with_both(model):
    drawn = []
    inner = model.proposal_generator.losses

    def losses(anchors, logits, gt_labels, deltas, gt_boxes):
        drawn.append((torch.stack(gt_labels), model.proposal_generator.groups))
        return inner(anchors, logits, gt_labels, deltas, gt_boxes)

    model.proposal_generator.losses = losses
    with EventStorage():
        values = model(batch())
    assert {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"} <= set(values)
    assert all(torch.isfinite(value) for value in values.values())
    sum(values.values()).backward()
    labels, groups = drawn[0]
    for image in labels:
        for group in range(len(SCALES)):
            available = int((groups == group).sum())
            assert int(((image >= 0) & (groups == group)).sum()) == min(NUM_PER_GROUP, available)


def test_roi_heads_sample_every_group(model):
    heads = model.roi_heads
    generator = torch.Generator().manual_seed(0)
    proposals, targets = [], []
    for x in batch():
        scale = 16 * 32 ** torch.rand(3000, 1, generator=generator)
        centre = torch.rand(3000, 2, generator=generator) * torch.tensor([256.0, 192.0])
        proposal = Instances((192, 256))
        proposal.proposal_boxes = Boxes(torch.cat([centre - scale / 2, centre + scale / 2], dim=1))
        proposal.objectness_logits = torch.zeros(3000)
        proposals.append(proposal)
        targets.append(x["instances"])
    with EventStorage():
        for sample in heads.label_and_sample_proposals(proposals, targets):
            groups = group_by_scale(sample.proposal_boxes.area().sqrt(), SCALES)
            assert torch.bincount(groups, minlength=len(SCALES)).tolist() == [NUM_PER_GROUP] * len(SCALES)
            assert (sample.gt_classes == 0).any() and (sample.gt_classes == 1).any()


def test_subsample_labels_is_detectron2s_call(device):
    labels = torch.tensor([0, 1, -1, 1, 0, 1, 1, -1, 0, 1] * 30, device=device)
    groups = torch.zeros(300, dtype=torch.int64, device=device)
    pos, neg = GroupSampler(1, 40, 0.25).subsample_labels(labels, groups, bg_label=1, seed=0)
    their_pos, their_neg = subsample_labels(labels, 40, 0.25, 1)
    assert (len(pos), len(neg)) == (len(their_pos), len(their_neg)) == (10, 30)
    assert (labels[pos] == 0).all() and (labels[neg] == 1).all()
    assert pos.dtype == neg.dtype == torch.int64


def with_our_parts(proposal_generator, roi_heads, meta_architecture="GeneralizedRCNN"):
    cfg = faster_rcnn_cfg(proposal_generator, roi_heads)
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = [0.5, 0.6] if roi_heads in OURS else [0.5]
    cfg.MODEL.RPN.IOU_THRESHOLDS = [0.4, 0.6] if proposal_generator == "GroupSamplingRPN" else [0.3, 0.7]
    if proposal_generator == "GroupSamplingRPN":
        cfg.MODEL.RPN.HEAD_NAME, cfg.MODEL.ANCHOR_GENERATOR.NAME = "SoftmaxRPNHead", "ScaleStrideAnchorGenerator"
        cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    if roi_heads == "PositionSensitiveROIHeads":
        cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE, cfg.MODEL.ROI_HEADS.IN_FEATURES = "PSROIPool", ["p2"]
    cfg.merge_from_list(
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN 1000 MODEL.RPN.POST_NMS_TOPK_TRAIN 300 MODEL.RPN.POST_NMS_TOPK_TEST 300 "
        "TEST.GS.SCORE_THRESH 0.0 TEST.DETECTIONS_PER_IMAGE 40 "
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True MODEL.ROI_HEADS.NUM_CLASSES 2".split()
    )
    if roi_heads not in OURS:
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    return cfg


OURS = ("GroupedROIHeads", "PositionSensitiveROIHeads")
PAIRS = [
    ("GroupSamplingRPN", "StandardROIHeads"),
    ("GroupSamplingRPN", "CascadeROIHeads"),
    ("GroupSamplingRPN", "GroupedROIHeads"),
    ("GroupSamplingRPN", "PositionSensitiveROIHeads"),
    ("RPN", "GroupedROIHeads"),
]


@pytest.mark.parametrize(("proposal_generator", "roi_heads"), PAIRS)
def test_our_parts_in_detectron2s_generalized_rcnn(proposal_generator, roi_heads):
    torch.manual_seed(0)
    model = build_model(with_our_parts(proposal_generator, roi_heads))
    with EventStorage():
        losses = model(batch())
    assert {"loss_rpn_cls", "loss_rpn_loc"} < set(losses) and all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    trained = {name: x.grad is not None for name, x in model.named_parameters() if x.requires_grad}
    assert all(trained.values()), trained

    results = model.eval()([x | {"height": 384, "width": 512} for x in batch()])
    for found in (x["instances"] for x in results):
        assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"} and found.image_size == (384, 512)
        assert 5 < len(found) <= 40
        assert (found.scores[1:] <= found.scores[:-1]).all()
        for k in (0, 1):
            boxes = found.pred_boxes.tensor[found.pred_classes == k]
            assert (ops.box_iou(boxes, boxes).fill_diagonal_(0) <= 0.5 + 1e-5).all()


@pytest.mark.parametrize(
    ("proposal_generator", "roi_heads", "message"),
    [
        ("RPN", "GroupedROIHeads", r"PROPOSAL_GENERATOR\.NAME.*and RPN has none: set MODEL\.META_ARCHITECTURE"),
        ("GroupSamplingRPN", "StandardROIHeads", r"ROI_HEADS\.NAME.*and StandardROIHeads has none: set MODEL\.META"),
    ],
)
def test_detectron2s_parts_in_our_detectors_are_refused_by_name(proposal_generator, roi_heads, message):
    with pytest.raises(ValueError, match=message):
        build_model(with_our_parts(proposal_generator, roi_heads, "GroupedFastRCNN"))
    if proposal_generator == "RPN":
        with pytest.raises(ValueError, match="^RPNDetector needs .*" + message):
            build_model(with_our_parts(proposal_generator, roi_heads, "RPNDetector"))


def test_our_roi_heads_refuse_masks():
    cfg = with_our_parts("GroupSamplingRPN", "GroupedROIHeads")
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match=r"GroupedROIHeads finds boxes only: set MODEL\.MASK_ON"):
        build_model(cfg)


@pytest.mark.parametrize("roi_heads", ["StandardROIHeads", "GroupedROIHeads"])
def test_the_check_of_configs_knows_detectron2s_generalized_rcnn(roi_heads):
    """Its RPN's NMS is of proposals, at Detectron2's 0.7; Detectron2's own matcher takes one threshold."""
    cfg = with_our_parts("GroupSamplingRPN", roi_heads)
    cfg.merge_from_list(
        "MODEL.RPN.PRE_NMS_TOPK_TEST 2000 MODEL.RPN.POSITIVE_FRACTION 0.25 MODEL.RPN.BATCH_SIZE_PER_IMAGE 2048".split()
    )
    assert cfg.MODEL.RPN.NMS_THRESH == 0.7
    check_config(cfg)
    setting = engine.test_setting(cfg)
    assert (setting["NMS IoU"], setting["boxes per image"]) == (0.5, 40)
    threshold = "TEST.GS.SCORE_THRESH" if roi_heads == "GroupedROIHeads" else "MODEL.ROI_HEADS.SCORE_THRESH_TEST"
    assert engine.test_setting(load_config(cfg, [threshold, 0.3]))["score threshold"] == 0.3
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 2000
    with pytest.raises(ValueError, match=r"MODEL\.RPN\.POST_NMS_TOPK_TRAIN is Detectron2's default 2000"):
        check_config(cfg)
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = 300, [0.5]
    if roi_heads == "GroupedROIHeads":
        with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.IOU_THRESHOLDS is Detectron2's default"):
            check_config(cfg)
