#!/usr/bin/env python
"""Detectron2's RetinaNet with group sampling: ten lines, all marked, are all that is added.

    python examples/retinanet.py

RetinaNet has no sampler: every labelled anchor takes part, nearly all of them of the smallest scale. Here the same
number of each scale does. Its focal loss and its other parts stay as they are.
"""

import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.structures import Boxes
from toy import print_table, small_config, train

SCALES = [16, 32, 64, 128]

# group sampling:
from gs_d2.modeling import GroupSampler, TwoPassMatcher, group_by_scale  # noqa: E402


@META_ARCH_REGISTRY.register()
class GroupSampledRetinaNet(RetinaNet):
    def label_anchors(self, anchors, gt_instances):
        self.anchor_matcher = TwoPassMatcher([0.4, 0.6])
        labels, gt_boxes = super().label_anchors(anchors, gt_instances)
        groups = group_by_scale(Boxes.cat(anchors).area().sqrt(), SCALES)
        rows = [torch.cat(GroupSampler(len(SCALES), 16).subsample_labels(x, groups, self.num_classes)) for x in labels]
        return [torch.full_like(x, -1).index_copy(0, i, x[i]) for x, i in zip(labels, rows, strict=True)], gt_boxes


# :group sampling


def run(meta_architecture):
    torch.manual_seed(0)
    cfg = small_config(SCALES)
    cfg.MODEL.META_ARCHITECTURE = meta_architecture  # group sampling
    model = build_model(cfg)
    return train(model, model.label_anchors, SCALES, background=model.num_classes)


if __name__ == "__main__":
    print_table(SCALES, before=run("RetinaNet"), after=run("GroupSampledRetinaNet"))
