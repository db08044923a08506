#!/usr/bin/env python
"""Detectron2's Faster R-CNN with group sampling in its RPN: ten lines, all marked, are all that is added.

    python examples/faster_rcnn.py

The RPN samples 256 anchors of an image whatever their scale. Here the same number of each scale is sampled. The second
stage is done in the same way: tests/modeling/test_drop_ins.py does it, in ten lines too.
"""

import torch
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes
from toy import print_table, small_config, train

SCALES = [16, 32, 64, 128]

# group sampling:
from gs_d2.modeling import GroupSampler, TwoPassMatcher, group_by_scale  # noqa: E402


@PROPOSAL_GENERATOR_REGISTRY.register()
class GroupSampledRPN(RPN):
    def label_and_sample_anchors(self, anchors, gt_instances):
        self.anchor_matcher = TwoPassMatcher([0.4, 0.6])
        self.groups = group_by_scale(Boxes.cat(anchors).area().sqrt(), SCALES)
        return super().label_and_sample_anchors(anchors, gt_instances)

    def _subsample_labels(self, labels):
        return GroupSampler(len(SCALES), 16)(labels, self.groups)


# :group sampling


def run(proposal_generator):
    torch.manual_seed(0)
    cfg = small_config(SCALES)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = proposal_generator  # group sampling
    model = build_model(cfg)
    return train(model, model.proposal_generator.label_and_sample_anchors, SCALES, background=0)


if __name__ == "__main__":
    print_table(SCALES, before=run("RPN"), after=run("GroupSampledRPN"))
