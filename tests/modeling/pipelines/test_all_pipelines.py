"""What every detector of Table 6 has to do, with and without group sampling. A new one is a row in PIPELINES."""

import functools
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from small_pipelines import PIPELINES
from torchvision.models import resnet50

from gs_d2.conversion.torchvision import convert_file
from gs_d2.data import load_wider_face
from gs_d2.inference import PyramidDetector

ROOT = Path(__file__).resolve().parents[3]

each_pipeline = pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.name)
with_and_without = pytest.mark.parametrize("sampling", [False, True], ids=["all anchors", "groups"])


@functools.cache
def small_model(pipeline, sampling=True):
    """Shared: a test that changes it must build its own."""
    torch.manual_seed(0)
    return build_model(pipeline.cfg(sampling, small=True)).eval()


@functools.cache
def full_model(pipeline, sampling, num_samples=None):
    cfg = pipeline.cfg(sampling)
    if num_samples is not None:
        cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = num_samples
    return build_model(cfg).eval()


def image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)}


def feature_maps(model, height, width):
    """Names of the maps that the first stage reads, and the maps of a random image."""
    images = model.preprocess_image([image(height, width)])
    with torch.no_grad():
        features = model.backbone(images.tensor)
    return [features[name] for name in model.proposal_generator.in_features]


# The network


@each_pipeline
def test_maps_are_as_large_as_they_say(pipeline):
    model = small_model(pipeline)
    shapes = model.backbone.output_shape()
    for name, feature in zip(model.proposal_generator.in_features, feature_maps(model, 160, 224), strict=True):
        sides = [-(-side // shapes[name].stride) for side in (160, 224)]
        assert tuple(feature.shape) == (1, shapes[name].channels, *sides)


@each_pipeline
def test_the_head_predicts_for_every_anchor(pipeline):
    generator = small_model(pipeline).proposal_generator
    maps = feature_maps(small_model(pipeline), 160, 224)
    with torch.no_grad():
        logits, deltas = generator.rpn_head(maps)
    assert [x.shape[1] for x in logits] == [2 * num for num in generator.anchor_generator.num_anchors]
    assert [x.shape[1] for x in deltas] == [4 * num for num in generator.anchor_generator.num_anchors]
    assert [x.shape[-2:] for x in logits] == [x.shape[-2:] for x in deltas] == [x.shape[-2:] for x in maps]
    num_anchors = sum(len(anchors) for anchors in generator.anchor_generator(maps))
    assert generator.anchor_generator.flatten(logits, 2).shape == (1, num_anchors, 2)


@each_pipeline
@with_and_without
def test_every_parameter_learns(pipeline, sampling):
    """From a face of every scale, so that every anchor scale has a positive."""
    cfg = pipeline.cfg(sampling, small=True)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    scales = model.proposal_generator.anchor_generator.scales
    side = int(max(scales)) + 8
    instances = Instances((side, side), gt_boxes=Boxes(torch.tensor([[4.0, 4, 4 + s, 4 + s] for s in scales])))
    instances.gt_classes = torch.zeros(len(scales), dtype=torch.int64)
    with EventStorage():
        losses = model([{**image(side, side), "instances": instances}])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values()), losses
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without == []


@pytest.mark.parametrize("pipeline", [p for p in PIPELINES if p.resnet], ids=lambda pipeline: pipeline.name)
def test_takes_torchvisions_weights(pipeline, tmp_path):
    """MODEL.WEIGHTS, a ResNet-50 under Detectron2's names, reaches every array of the backbone's ResNet."""
    torch.manual_seed(1)
    torch.save(resnet50(weights=None).state_dict(), tmp_path / "published.pth")
    converted = convert_file(tmp_path / "published.pth")
    converted.save(tmp_path / "resnet50.pth")
    tensors = converted.tensors
    assert pipeline.cfg(sampling=True, weights=True).MODEL.WEIGHTS.endswith("torchvision/R-50.pkl")
    model = build_model(pipeline.cfg(sampling=True))
    result = DetectionCheckpointer(model).load(str(tmp_path / "resnet50.pth"))
    assert not result.get("unexpected_keys") and not result.get("incorrect_shapes")
    bottom_up = model.backbone.bottom_up if hasattr(model.backbone, "bottom_up") else model.backbone
    loaded = bottom_up.state_dict()
    assert {name for name in tensors if name.startswith(("stem", "res2", "res3", "res4"))} <= set(loaded)
    for name, value in loaded.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, tensors[name]), name


# Group sampling


@each_pipeline
def test_group_sampling_is_a_few_lines(pipeline):
    """The diff of the two rows, which docs/pipelines.md shows."""
    without, with_gs = pipeline.cfg(sampling=False), pipeline.cfg(sampling=True)
    assert not without.MODEL.GS.GROUP_SAMPLING and with_gs.MODEL.GS.GROUP_SAMPLING
    without.MODEL.GS.GROUP_SAMPLING, without.OUTPUT_DIR = True, with_gs.OUTPUT_DIR
    assert without == with_gs, "the two rows differ in more than group sampling"
    text = (ROOT / "configs" / "pipelines" / f"{pipeline.name}_sampling.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["_BASE_"] == f"{pipeline.name}.yaml" and len(text.splitlines()) <= 15
    assert text in (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def real_faces(shared_data):
    """Faces of every tenth training image."""
    data = shared_data / "mini_wider" / "widerface"
    records = load_wider_face(data / "wider_face_split" / "wider_face_train_bbx_gt.txt", "")
    return [Boxes(torch.from_numpy(record["gt_boxes"])) for record in records[::10]]


@each_pipeline
@with_and_without
@pytest.mark.parametrize("num", [None, 64], ids=["N = 2048", "N = 64"])  # no image here has 512 positives
def test_n_samples_at_1_to_3_on_real_annotations(pipeline, sampling, num, real_faces):
    """Section 4.2: N of every group, a quarter positive at most; without groups, N of an image in all."""
    model = full_model(pipeline, sampling, num)
    rpn, num = model.proposal_generator, num or 2048
    shapes = model.backbone.output_shape()
    maps = [torch.zeros(1, 1, *[-(-640 // shapes[name].stride)] * 2) for name in rpn.in_features]
    anchors = Boxes.cat(rpn.anchor_generator(maps)).tensor
    labels, _, _ = rpn.group_loss.match(anchors, real_faces)
    _, group_idxs = rpn.group_loss.group(anchors)
    num_groups = len(rpn.group_loss.group_scales) if sampling else 1
    assert group_idxs.unique().tolist() == list(range(num_groups))
    sampled = rpn.group_loss.sample(labels, group_idxs, torch.rand(labels.shape), lambda: None)
    capped = short = one_to_three = 0
    for image_labels, image_sampled in zip(labels, sampled, strict=True):
        drawn_ones = image_sampled >= 0
        assert torch.equal(image_sampled[drawn_ones], image_labels[drawn_ones])
        for group in range(num_groups):
            positives, negatives = (int(((image_labels == x) & (group_idxs == group)).sum()) for x in (1, 0))
            drawn = [int(((image_sampled == x) & (group_idxs == group)).sum()) for x in (1, 0)]
            expected = min(positives, num // 4)
            assert drawn == [expected, min(negatives, num - expected)]
            capped += positives > num // 4
            short += 0 < positives < num // 4
            one_to_three += 3 * drawn[0] == drawn[1]
    assert short > 0 and (num > 64 or (capped > 0 and one_to_three > 0))  # the cases occurred


# Testing


@each_pipeline
def test_one_level_of_a_pyramid_is_the_plain_detector(pipeline):
    model = small_model(pipeline)
    x = image(150, 206)
    with torch.no_grad():
        (plain,), (ours,) = model([x]), PyramidDetector(model=model, scales=[1.0])([x])
        plain, ours = plain["instances"], ours["instances"]
    assert len(plain) == len(ours) > 0
    assert set(plain.get_fields()) == set(ours.get_fields())
    assert torch.equal(plain.scores, ours.scores) and torch.equal(plain.pred_boxes.tensor, ours.pred_boxes.tensor)


@each_pipeline
def test_detects_on_a_pyramid(pipeline):
    """Boxes of all levels come in the file's pixels, with anchor scales that the detector has."""
    model = small_model(pipeline)
    found = PyramidDetector(model=model, scales=[0.5, 1.0, 1.5], flip=True)([image(100, 140)])[0]["instances"]
    assert found.image_size == (100, 140) and len(found) > 0
    boxes = found.pred_boxes.tensor
    assert (boxes >= -1e-3).all() and (boxes <= torch.tensor([140, 100, 140, 100]) + 1e-3).all()
    scales = torch.tensor(model.proposal_generator.anchor_generator.scales)
    assert torch.allclose((found.anchor_scales[:, None] - scales).abs().amin(dim=1), torch.zeros(1), atol=1e-3)


@each_pipeline
def test_a_tile_has_the_anchors_of_the_whole_image(pipeline):
    """`tile_geometry`: where memory is short, a level of a pyramid runs in tiles cut at multiples of the alignment."""
    model = small_model(pipeline)
    alignment, reach = model.tile_geometry
    generator = model.proposal_generator.anchor_generator
    assert reach >= max(generator.scales)

    def anchors(height, width):
        shapes = model.backbone.output_shape()
        names = model.proposal_generator.in_features
        maps = [torch.zeros(1, 1, -(-height // shapes[n].stride), -(-width // shapes[n].stride)) for n in names]
        return Boxes.cat(generator(maps)).tensor

    whole = anchors(2 * alignment, 3 * alignment)
    tile = anchors(alignment, alignment) + alignment * torch.tensor([2.0, 1, 2, 1])
    assert {tuple(row) for row in tile.round().tolist()} <= {tuple(row) for row in whole.round().tolist()}
