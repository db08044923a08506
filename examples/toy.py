"""What the two Detectron2 examples share and nobody needs: generated squares, a small ResNet, a training loop."""

import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from gs_d2.modeling import group_by_scale

IMAGE_SIZE = 192


def small_config(scales):
    """Detectron2's defaults with a small R18-FPN on the CPU, an anchor scale on each of P2, P3, ..."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "GN"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[scale] for scale in scales]
    levels = [f"p{2 + i}" for i in range(len(scales))]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.RETINANET.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = levels
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME = "StandardROIHeads", "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = "ROIAlignV2", 7
    return cfg


def draw_batch(num_images=2, num_boxes=8):
    """Model inputs: bright squares with sides of 12 to 120 pixels on noise."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(num_images):
        sides = 12 * 10 ** torch.rand(num_boxes, 1, generator=generator)
        corners = torch.rand(num_boxes, 2, generator=generator) * (IMAGE_SIZE - sides)
        image = torch.randint(0, 100, (3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
        boxes = torch.cat([corners, corners + sides], dim=1).round()
        for x1, y1, x2, y2 in boxes.int().tolist():
            image[:, y1:y2, x1:x2] += 100
        instances = Instances((IMAGE_SIZE, IMAGE_SIZE))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.zeros(num_boxes, dtype=torch.int64)
        inputs.append({"image": image, "instances": instances})
    return inputs


def train(model, labelling, scales, background, num_iterations=3):
    """Trains on one batch and counts, in the last iteration, the anchors that take part in the loss.

    Args:
        labelling: the bound method that labels (and samples) anchors; it returns (labels of each image, boxes).
        background: what that method calls a negative; -1 is an anchor that takes no part.

    Returns:
        Samples of each image and scale, the positives among them, and the loss of the last iteration.
    """
    owner, name = labelling.__self__, labelling.__name__

    def watch(anchors, gt_instances):
        labels, boxes = labelling(anchors, gt_instances)
        groups = group_by_scale(Boxes.cat(anchors).area().sqrt(), scales)
        for chosen, counts in (((x >= 0 for x in labels), samples), ((positives_of(x) for x in labels), positives)):
            counts[:] = [[int((mask & (groups == g)).sum()) for g in range(len(scales))] for mask in chosen]
        return labels, boxes

    def positives_of(labels):
        return (labels >= 0) & (labels != background)

    samples, positives = [], []
    setattr(owner, name, watch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch = draw_batch()
    with EventStorage():
        for _ in range(num_iterations):
            loss = sum(model(batch).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
    return samples, positives, loss.item()


def print_table(scales, before, after):
    """Of the first image: anchors in the loss by scale (positives in brackets), and the loss."""
    print(f"{'anchor scale':<18}" + "".join(f"{scale:>14}" for scale in scales) + f"{'loss':>8}")
    for name, (samples, positives, loss) in (("as it is", before), ("group sampling", after)):
        cells = [f"{n} ({p})" for n, p in zip(samples[0], positives[0], strict=True)]
        print(f"{name:<18}" + "".join(f"{cell:>14}" for cell in cells) + f"{loss:>8.3f}")
