"""Darknet-53, YOLOv3's neck and its matching. What they compute is compared layer by layer with a literal net in
tests/tools/test_convert_darknet.py; what every pipeline does is in test_all_pipelines.py."""

import math

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes
from small_pipelines import PIPELINES

from gs_d2.data import load_wider_face
from gs_d2.modeling.pipelines import Darknet53, YOLOv3Neck
from gs_d2.ops import reference

(YOLOV3,) = [pipeline for pipeline in PIPELINES if pipeline.name == "yolov3"]
STAGES = ["res1", "res2", "res3", "res4", "res5"]


def trainable(module) -> bool:
    (answer,) = {parameter.requires_grad for parameter in module.parameters()}
    return answer


def test_darknet_53_is_the_published_net():
    with torch.device("meta"):
        net = Darknet53(STAGES, norm="BN")
        maps = net(torch.zeros(1, 3, 96, 129))
    assert sum(isinstance(module, torch.nn.Conv2d) for module in net.modules()) == 52
    assert sum(parameter.numel() for parameter in net.parameters()) == 40_584_928
    assert [tuple(maps[name].shape) for name in STAGES] == [
        (1, 64 * 2**k, math.ceil(96 / 2 ** (k + 1)), math.ceil(129 / 2 ** (k + 1))) for k in range(5)
    ]
    shapes = net.output_shape()
    assert [(shapes[name].stride, shapes[name].channels) for name in STAGES] == [
        (2, 64), (4, 128), (8, 256), (16, 512), (32, 1024)
    ]  # fmt: skip


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_freezing_begins_at_the_stem(freeze_at):
    net = Darknet53(["res5"], stem_channels=4, norm="BN", freeze_at=freeze_at)
    frozen = [name for name in ["stem", *STAGES] if not any(p.requires_grad for p in getattr(net, name).parameters())]
    assert frozen == ["stem", *STAGES][: freeze_at + 1 if freeze_at else 0]
    for name in ["stem", *STAGES]:
        norms = [conv.norm for conv in getattr(net, name).modules() if isinstance(conv, torch.nn.Conv2d)]
        assert all(isinstance(norm, FrozenBatchNorm2d) == (name in frozen) for norm in norms)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"must be some of res1, .*, res5, got \['res6'\]"):
        Darknet53(["res6"], stem_channels=4)
    with pytest.raises(ValueError, match="in_features must double in stride"):
        YOLOv3Neck(Darknet53(STAGES, stem_channels=4), ["res3", "res5"], norm="BN")


def test_the_neck_trains_its_normalisation_and_the_backbone_does_not():
    with torch.device("meta"):
        backbone = build_backbone(YOLOV3.cfg(sampling=True))
    norms = [conv.norm for conv in backbone.bottom_up.modules() if isinstance(conv, torch.nn.Conv2d)]
    assert len(norms) == 52 and all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)
    assert not trainable(backbone.bottom_up.res2) and trainable(backbone.bottom_up.res3)
    for name in ("p3", "p4", "p5"):
        level = getattr(backbone, name)
        norms = [conv.norm for conv in level.modules() if isinstance(conv, torch.nn.Conv2d)]
        assert len(norms) == (6 if name == "p5" else 7) and trainable(level)
        assert all(isinstance(norm, torch.nn.BatchNorm2d) for norm in norms)


def test_a_coarser_map_reaches_the_finer_ones_and_not_the_other_way():
    torch.manual_seed(0)
    neck = YOLOv3Neck(Darknet53(["res3", "res4", "res5"], stem_channels=4, norm="BN"), ["res3", "res4", "res5"], "BN")
    for name in ("p3", "p4", "p5"):
        neck.zero_grad()
        neck(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))[name].square().sum().backward()
        reached = {
            level
            for level in ("p3", "p4", "p5")
            if any(p.grad is not None and p.grad.any() for p in getattr(neck, level).convs.parameters())
        }
        assert reached == {f"p{k}" for k in range(int(name[1]), 6)}


@pytest.fixture(scope="module")
def first_stage():
    return build_model(YOLOV3.cfg(sampling=True, small=True)).proposal_generator


@pytest.fixture(scope="module")
def anchors(first_stage):
    return Boxes.cat(first_stage.anchor_generator([torch.zeros(1, 1, 640 // s, 640 // s) for s in (8, 16, 32)]))


@pytest.fixture(scope="module")
def real_faces(shared_data):
    """Faces of every fortieth training image, of 8 px and more."""
    data = shared_data / "mini_wider" / "widerface"
    records = load_wider_face(data / "wider_face_split" / "wider_face_train_bbx_gt.txt", "")
    boxes = [Boxes(torch.from_numpy(record["gt_boxes"])) for record in records[::40]]
    return [x[x.area() >= 64] for x in boxes]


def test_a_face_has_one_anchor_its_best_and_no_good_one_is_a_negative(first_stage, anchors, real_faces):
    """YOLO's assignment, written out over the whole matrix of overlaps."""
    labels, matched_idxs, _ = first_stage.group_loss.match(anchors.tensor, real_faces)
    first, num_positives = 0, 0
    for image_labels, image_idxs, faces in zip(labels, matched_idxs, real_faces, strict=True):
        ious = reference.box_iou(faces.tensor, anchors.tensor)
        assert torch.equal(image_labels == 0, ious.amax(dim=0) < 0.4)
        owners = ious.argmax(dim=0)
        for face in range(len(faces)):
            own = ious[face].where((owners == face) & (ious[face] >= 0.4), ious.new_tensor(-1))
            positives = torch.nonzero((image_labels == 1) & (image_idxs == first + face))[:, 0].tolist()
            assert positives == ([int(own.argmax())] if own.max() >= 0.4 else [])
            num_positives += len(positives)
        first += len(faces)
    assert num_positives > 30


def test_groups_are_octaves_and_each_has_positives(first_stage, anchors, real_faces):
    sizes = [16, 22, 32, 45, 64, 90, 128, 181, 256]
    assert first_stage.anchor_generator.scales == sizes
    _, group_idxs = first_stage.group_loss.group(anchors.tensor)
    scales = anchors.area().sqrt()
    members = [sorted(set(scales[group_idxs == group].tolist())) for group in range(4)]
    assert members == [[16, 22], [32, 45], [64, 90], [128, 181, 256]]
    labels, _, _ = first_stage.group_loss.match(anchors.tensor, real_faces)
    assert [bool((labels[:, group_idxs == group] == 1).any()) for group in range(4)] == [True] * 4
