"""The matcher and the sampler inside Detectron2's own RPN (that of examples/) and ROI heads, in ten lines."""

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


@pytest.fixture(scope="module")
def model():
    """Detectron2's Faster R-CNN with R18-FPN and both parts replaced."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[scale] for scale in SCALES]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "GroupSampledRPN"
    cfg.MODEL.ROI_HEADS.NAME = "GroupSampledROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = len(SCALES) * NUM_PER_GROUP
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    torch.manual_seed(0)
    return build_model(cfg)


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
