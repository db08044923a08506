"""CenterNet: targets and losses against loops in numpy, decoding against a search, and all that it shares."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import small_config
from torch import nn
from torchvision.models import resnet18

from gs_d2 import engine
from gs_d2.config import check_config, load_config
from gs_d2.conversion.torchvision import convert_file
from gs_d2.engine.checks import leaves
from gs_d2.inference import FaceDetector, PyramidDetector
from gs_d2.inference.tiling import TiledPredictor
from gs_d2.modeling import description_of
from gs_d2.modeling.pipelines import CenterNet, CenterNetHead, TransposedConvs
from gs_d2.modeling.pipelines.centernet import (
    center_targets,
    gaussian_radius,
    heat_peaks,
    l1_at_faces,
    penalty_reduced_focal_loss,
)

CONFIG = "configs/pipelines/centernet.yaml"
SMALL = """
    MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM GN MODEL.FPN.NORM GN
    MODEL.FPN.OUT_CHANNELS 32 MODEL.RPN.PRE_NMS_TOPK_TEST 5000
""".split()
INF = math.inf


def cfg(*opts):
    return load_config(CONFIG, [*SMALL, *opts])


@functools.cache
def small_model():
    """Shared: a test that changes it must build its own."""
    torch.manual_seed(0)
    return build_model(cfg()).eval()


def image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)}


def with_faces(x, faces, **fields):
    boxes = torch.tensor(faces, dtype=torch.float32).reshape(-1, 4)
    instances = Instances(tuple(x["image"].shape[1:]), gt_boxes=Boxes(boxes), gt_classes=torch.zeros(len(boxes)).long())
    return {**x, "instances": instances, **fields}


# The network


def test_three_transposed_convolutions_from_stride_32_to_4():
    model = build_model(load_config(CONFIG, ["MODEL.DEVICE", "cpu"]))
    layers = list(model.backbone.upsampling)
    convs = [x for x in layers if isinstance(x, nn.ConvTranspose2d)]
    assert [(x.in_channels, x.out_channels) for x in convs] == [(512, 256), (256, 256), (256, 256)]
    assert {(x.kernel_size, x.stride, x.padding, x.bias) for x in convs} == {((4, 4), (2, 2), (1, 1), None)}
    assert [type(x).__name__ for x in layers[:3]] == ["ConvTranspose2d", "NaiveSyncBatchNorm", "ReLU"]
    assert [name for name, _ in model.head.named_children()] == ["heatmap", "size", "offset"]
    assert all([*map(type, x)] == [nn.Conv2d, nn.ReLU, nn.Conv2d] for x in model.head.children())
    assert [(x[0].out_channels, x[2].out_channels) for x in model.head.children()] == [(64, 1), (64, 2), (64, 2)]
    assert model.stride == 4 and model.size_divisibility == 32
    trained = {name.split(".")[1] for name, x in model.backbone.named_parameters() if x.requires_grad}
    assert {"res3", "res4", "res5"} <= trained and not {"stem", "res2"} & trained, "as the row it is compared with"


def test_maps_are_a_quarter_of_the_padded_image():
    model = small_model()
    images = model.preprocess_image([image(70, 130), image(64, 60)])
    with torch.no_grad():
        logits, sizes, offsets = model._predict(images)
    assert logits.shape == (2, 24, 40) and sizes.shape == offsets.shape == (2, 2, 24, 40)
    ((name, shape),) = model.backbone.output_shape().items()
    assert (name, shape.stride, shape.channels) == ("p2", 4, 32)


@pytest.mark.parametrize("norm", ["", "GN"])
def test_transposed_convolutions_keep_the_size_of_activations(norm):
    """From the first step on, with or without normalisation."""

    class Noise(Backbone):
        def output_shape(self):
            return {"res5": ShapeSpec(channels=64, stride=32)}

        def forward(self, x):
            return {"res5": torch.randn(1, 64, 12, 12).relu()}

    torch.manual_seed(0)
    with torch.no_grad():
        feature = TransposedConvs(Noise(), 64, norm)(None)["p2"]
    assert feature.shape == (1, 64, 96, 96) and 0.3 < feature.std() < 3


def test_the_heat_map_begins_at_a_tenth():
    torch.manual_seed(0)
    with torch.no_grad():
        logits, *_ = CenterNetHead(32)(torch.rand(1, 32, 16, 16))
    assert logits.sigmoid().mean() == pytest.approx(0.1, abs=0.03)


def test_takes_torchvisions_weights(tmp_path):
    torch.manual_seed(1)
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "published.pth")
    converted = convert_file(tmp_path / "published.pth")
    converted.save(tmp_path / "resnet18.pth")
    config = load_config(CONFIG, ["MODEL.DEVICE", "cpu"])
    assert config.MODEL.WEIGHTS == load_config("configs/wider/fpn_finest_sampling_r18.yaml").MODEL.WEIGHTS
    model = build_model(config)
    DetectionCheckpointer(model).load(str(tmp_path / "resnet18.pth"))
    for name, value in model.backbone.bottom_up.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, converted.tensors[name]), name


# Targets


def iou(a, b):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


@given(st.floats(0.5, 500), st.floats(0.5, 500), st.floats(0.05, 1), st.lists(st.floats(-1, 1), min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_side_moved_by_the_radius_loses_the_overlap(w, h, overlap, moves):
    r = float(gaussian_radius(torch.tensor([[w, h]], dtype=torch.float64), overlap))
    box = (0, 0, w, h)
    assert 0 <= r < min(w, h) / 2
    assert iou(box, [x + r * move for x, move in zip(box, moves, strict=True)]) >= overlap - 1e-6
    inwards = [x + r * move for x, move in zip(box, (1, 1, -1, -1), strict=True)]
    assert iou(box, inwards) == pytest.approx(overlap, abs=1e-6), "a larger radius would lose it"


def test_radius_of_a_square():
    sides = torch.tensor([[16.0, 16.0]])
    assert float(gaussian_radius(sides, 0.3)) == pytest.approx(16 * (1 - math.sqrt(0.3)) / 2)
    assert float(gaussian_radius(sides, 1.0)) == 0 and float(gaussian_radius(sides * 0, 0.3)) == 0


def slow_targets(faces, regions, image_size, map_size, stride, min_overlap):
    """Cell by cell: heat map, counted, and for each face that is one its cell, size and offset."""
    (height, width), (rows, columns) = image_size, map_size
    heatmap, counted, of_faces = np.zeros(map_size), np.zeros(map_size, dtype=bool), []
    for x1, y1, x2, y2 in faces:
        x, y, w, h = (x1 + x2) / 2 / stride, (y1 + y2) / 2 / stride, (x2 - x1) / stride, (y2 - y1) / stride
        if not (w > 0 and h > 0 and math.isfinite(w * h) and 0 <= x < width / stride and 0 <= y < height / stride):
            of_faces.append(None)
            continue
        column, row = math.floor(x), math.floor(y)
        of_faces.append((row * columns + column, (w, h), (x - column, y - row)))
        radius = math.floor(((w + h) - math.sqrt((w + h) ** 2 - 4 * (1 - min_overlap) * w * h)) / 4)
        sigma = (2 * radius + 1) / 6
        for i in range(rows):
            for j in range(columns):
                if abs(i - row) <= radius and abs(j - column) <= radius:
                    heat = math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * sigma**2))
                    heatmap[i, j] = max(heatmap[i, j], heat)
    for i in range(rows):
        for j in range(columns):
            left, top = j * stride, i * stride
            touched = any(
                min(x2, left + stride) > max(x1, left) and min(y2, top + stride) > max(y1, top)
                for x1, y1, x2, y2 in regions
            )
            counted[i, j] = left < width and top < height and (heatmap[i, j] == 1 or not touched)
    return heatmap, counted, of_faces


def random_boxes(rng, num, size=(60, 90), largest=50):
    corner = rng.uniform(-10, [size[1], size[0]], (num, 2))
    return np.concatenate([corner, corner + rng.uniform(0.5, largest, (num, 2))], axis=1).astype(np.float32)


def check_targets(faces, regions, sizes, map_size, stride=4, min_overlap=0.3):
    boxes = [Boxes(torch.tensor(x, dtype=torch.float32).reshape(-1, 4)) for x in faces]
    ignored = [Boxes(torch.tensor(x, dtype=torch.float32).reshape(-1, 4)) for x in regions]
    targets = center_targets(boxes, ignored, sizes, map_size, stride, min_overlap)
    num_cells, first = map_size[0] * map_size[1], 0
    for i, size in enumerate(sizes):
        heatmap, counted, of_faces = slow_targets(faces[i], regions[i], size, map_size, stride, min_overlap)
        np.testing.assert_allclose(targets.heatmap[i].numpy(), heatmap, atol=1e-6)
        assert (targets.heatmap[i].numpy() == 1).tolist() == (heatmap == 1).tolist()
        assert targets.counted[i].tolist() == counted.tolist()
        for row, expected in enumerate(of_faces, first):
            assert bool(targets.valid[row]) == (expected is not None)
            if expected is not None:
                assert int(targets.cells[row]) == i * num_cells + expected[0]
                np.testing.assert_allclose(targets.sizes[row].numpy(), expected[1], rtol=1e-5)
                np.testing.assert_allclose(targets.offsets[row].numpy(), expected[2], atol=1e-5)
        first += len(faces[i])
    assert all(len(x) == first for x in (targets.cells, targets.sizes, targets.offsets, targets.valid))
    assert 0 <= int(targets.cells.amin()) and int(targets.cells.amax()) < len(sizes) * num_cells
    return targets


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stride", [4, 8])
def test_targets_against_loops(seed, stride):
    rng = np.random.default_rng(seed)
    sizes = [(60, 90), (53, 71)]
    faces = [random_boxes(rng, rng.integers(1, 9)), random_boxes(rng, rng.integers(0, 4))]
    regions = [random_boxes(rng, rng.integers(0, 4), largest=20), random_boxes(rng, 2, largest=9)]
    check_targets(faces, regions, sizes, (64 // stride, 96 // stride), stride, rng.uniform(0.1, 1))


def test_the_targets_compared_have_what_matters():
    """Overlapping heats, faces off the image, cells in regions to ignore and cells beyond the image."""
    rng = np.random.default_rng(0)
    targets = check_targets([random_boxes(rng, 30)], [random_boxes(rng, 3)], [(60, 90)], (16, 24))
    assert 0 < int(targets.valid.sum()) < 30 and 0 < int((~targets.counted[0, :15, :23]).sum())
    assert not targets.counted[0, 15].any() and not targets.counted[0, :, 23].any()
    assert 0 < int(((targets.heatmap > 0) & (targets.heatmap < 1)).sum())


def test_many_faces_are_no_more_memory_at_a_time(monkeypatch):
    rng = np.random.default_rng(1)
    faces = [Boxes(torch.from_numpy(random_boxes(rng, 50)))]
    whole = center_targets(faces, None, [(60, 90)], (16, 24), 4, 0.3)
    monkeypatch.setattr("gs_d2.modeling.pipelines.centernet._MAX_ELEMENTS", 1000)
    assert all(map(torch.equal, whole, center_targets(faces, None, [(60, 90)], (16, 24), 4, 0.3)))


def test_the_order_of_faces_does_not_matter():
    faces = torch.from_numpy(random_boxes(np.random.default_rng(2), 40))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    one, other = (center_targets([Boxes(x)], None, [(60, 90)], (16, 24), 4, 0.3) for x in (faces, faces[order]))
    assert torch.equal(one.heatmap, other.heatmap) and torch.equal(one.counted, other.counted)
    assert torch.equal(one.sizes[order], other.sizes) and torch.equal(one.cells[order], other.cells)


def test_two_faces_in_one_cell_are_one_peak_and_both_count():
    """A small face in front of a large one."""
    faces = [[0, 0, 60, 60], [25, 25, 36, 36]]
    targets = check_targets([faces], [[]], [(64, 64)], (16, 16))
    assert targets.cells.tolist() == [7 * 16 + 7] * 2 and int((targets.heatmap == 1).sum()) == 1
    sizes = torch.zeros(1, 2, 16, 16)
    assert float(l1_at_faces(sizes, targets.sizes, targets.cells, targets.valid)) == pytest.approx(15 + 2.75)


def test_a_face_in_the_heat_of_another_is_a_positive():
    faces = [[0, 0, 60, 60], [38, 34, 42, 38]]
    targets = check_targets([faces], [[]], [(64, 64)], (16, 16))
    assert targets.heatmap[0, 7, 7] == targets.heatmap[0, 9, 10] == 1
    assert 0 < targets.heatmap[0, 9, 9] < 1


@pytest.mark.parametrize(
    "face",
    [
        [10, 10, 10, 20],
        [10, 10, 20, 10],
        [20, 20, 10, 10],
        [10, math.nan, 20, 20],
        [-30, 10, -10, 20],
        [-20, 10, 10, 20],
        [60, 10, 70, 20],
        [10, 64, 20, 64.5],
        [10, 10, INF, 20],
    ],
)
def test_what_is_no_face_or_has_its_centre_off_the_image(face):
    targets = check_targets([[face]], [[]], [(64, 64)], (16, 32))
    assert not targets.valid.any() and not targets.heatmap.any() and targets.counted[0, :, :16].all()
    maps = torch.full((1, 2, 16, 32), 3.0, requires_grad=True)
    loss = l1_at_faces(maps, targets.sizes, targets.cells, targets.valid)
    loss.backward()
    assert loss == 0 and not maps.grad.any()


@pytest.mark.parametrize("face", [[0, 0, 0.5, 0.5], [63, 63, 64, 64], [60.5, 62, 62, 64], [-9, -9, 10, 10]])
def test_small_faces_and_faces_across_the_border(face):
    targets = check_targets([[face]], [[]], [(64, 64)], (16, 16))
    assert targets.valid.all() and int((targets.heatmap == 1).sum()) == 1


def test_a_region_to_ignore_has_no_negative_and_keeps_its_faces():
    faces, region = [[10, 10, 30, 30]], [4, 4, 28, 28]
    targets = check_targets([faces], [[region]], [(64, 64)], (16, 16))
    without = check_targets([faces], [[]], [(64, 64)], (16, 16))
    assert torch.equal(targets.heatmap, without.heatmap)
    expected = torch.ones(16, 16, dtype=torch.bool)
    expected[1:7, 1:7] = False
    expected[5, 5] = True
    assert torch.equal(targets.counted[0], expected)
    for counts, region in (
        (1, [13, 13, 13.5, 13.5]),
        (4, [11, 11, 13, 13]),
        (0, [13, 13, 13, 20]),
        (0, [math.nan] * 4),
    ):
        targets = check_targets([faces[:0] or [[40, 40, 60, 60]]], [[region]], [(64, 64)], (16, 16))
        assert int((~targets.counted).sum()) == counts


def test_no_region_is_none():
    boxes = [Boxes(torch.tensor([[10.0, 10, 30, 30]]))]
    with_none = center_targets(boxes, None, [(60, 64)], (16, 16), 4, 0.3)
    assert all(map(torch.equal, with_none, center_targets(boxes, [boxes[0][:0]], [(60, 64)], (16, 16), 4, 0.3)))


# Losses


def slow_focal_loss(logits, heatmap, counted):
    total, num_faces = 0.0, 0
    for logit, heat, counts in zip(logits.flat, heatmap.flat, counted.flat, strict=True):
        if not counts:
            continue
        p = 1 / (1 + math.exp(-logit))
        if heat == 1:
            total -= (1 - p) ** 2 * math.log(p)
            num_faces += 1
        else:
            total -= (1 - heat) ** 4 * p**2 * math.log(1 - p)
    return total / max(num_faces, 1)


@pytest.mark.parametrize("num_faces", [0, 1, 7])
def test_focal_loss_against_loops(num_faces):
    rng = np.random.default_rng(num_faces)
    faces = [Boxes(torch.from_numpy(random_boxes(rng, num)).reshape(-1, 4)) for num in (num_faces, 0)]
    regions = [Boxes(torch.from_numpy(random_boxes(rng, 2, largest=20))) for _ in range(2)]
    targets = center_targets(faces, regions, [(60, 90), (50, 80)], (16, 24), 4, 0.3)
    logits = torch.from_numpy(rng.normal(-1, 3, (2, 16, 24)))
    expected = slow_focal_loss(logits.numpy(), targets.heatmap.double().numpy(), targets.counted.numpy())
    assert float(penalty_reduced_focal_loss(logits, targets.heatmap, targets.counted)) == pytest.approx(expected, 1e-4)


@pytest.mark.parametrize("num_faces", [0, 1, 9])
def test_l1_against_loops(num_faces):
    rng = np.random.default_rng(num_faces)
    faces = [Boxes(torch.from_numpy(random_boxes(rng, num)).reshape(-1, 4)) for num in (num_faces, 2)]
    targets = center_targets(faces, None, [(60, 90), (50, 80)], (16, 24), 4, 0.3)
    predicted = rng.normal(0, 3, (2, 2, 16, 24))
    total, count = 0.0, 0
    for valid, cell, target in zip(targets.valid, targets.cells, targets.sizes, strict=True):
        if valid:
            i, row, column = np.unravel_index(int(cell), (2, 16, 24))
            total += sum(abs(predicted[i, k, row, column] - float(target[k])) for k in range(2))
            count += 1
    loss = l1_at_faces(torch.from_numpy(predicted), targets.sizes, targets.cells, targets.valid)
    assert float(loss) == pytest.approx(total / max(count, 1), rel=1e-5)
    assert num_faces == 0 or 0 < count


@pytest.mark.parametrize("logit", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_gradients_stay_finite_and_push_the_right_way(logit):
    targets = center_targets([Boxes(torch.tensor([[10.0, 10, 40, 40]]))], None, [(64, 64)], (16, 16), 4, 0.3)
    logits = torch.full((1, 16, 16), logit, requires_grad=True)
    loss = penalty_reduced_focal_loss(logits, targets.heatmap, targets.counted)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    has_face = targets.heatmap == 1
    assert (logits.grad[has_face] <= 0).all() and (logits.grad[~has_face] >= 0).all()


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_cells_that_do_not_count_may_be_anything(value):
    region = [Boxes(torch.tensor([[0.0, 0, 20, 20]]))]
    targets = center_targets([Boxes(torch.zeros(0, 4))], region, [(60, 60)], (16, 16), 4, 0.3)
    logits = torch.zeros(1, 16, 16)
    expected = penalty_reduced_focal_loss(logits, targets.heatmap, targets.counted)
    logits = torch.where(targets.counted, logits, value).requires_grad_()
    loss = penalty_reduced_focal_loss(logits, targets.heatmap, targets.counted)
    loss.backward()
    assert loss == expected and torch.isfinite(logits.grad).all()
    assert ((logits.grad != 0) == targets.counted).all()


def test_the_heat_around_a_face_costs_less():
    """And the better the guess, the less."""
    targets = center_targets([Boxes(torch.tensor([[4.0, 4, 60, 60]]))], None, [(64, 64)], (16, 16), 4, 0.3)

    def loss(row, column, logit=4.0):
        logits = torch.full((1, 16, 16), -4.0)
        logits[0, row, column] = logit
        return float(penalty_reduced_focal_loss(logits, targets.heatmap, targets.counted))

    assert loss(8, 8) < loss(8, 9) < loss(8, 10) < loss(8, 15)
    assert loss(8, 8, 6.0) < loss(8, 8, 4.0)


# Training


def train_inputs(**fields):
    return [
        with_faces(image(64, 90), [[10, 10, 30, 40], [40, 5, 52, 20], [20, 20, 60, 60]], **fields),
        with_faces(image(60, 96, seed=1), []),
    ]


def test_every_parameter_learns_and_losses_are_weighted():
    torch.manual_seed(0)
    model = build_model(cfg()).train()
    losses = model(train_inputs())
    assert set(losses) == {"loss_heatmap", "loss_size", "loss_offset"}
    assert all(torch.isfinite(x) and x > 0 for x in losses.values())
    sum(losses.values()).backward()
    assert [
        n for n, x in model.named_parameters() if x.requires_grad and not (x.grad is not None and x.grad.any())
    ] == []
    model.loss_weights = (2.0, 0.4, 0.0)
    weighted = model(train_inputs())
    losses, weighted = ({name: x.detach() for name, x in found.items()} for found in (losses, weighted))
    assert float(weighted["loss_heatmap"]) == pytest.approx(2 * float(losses["loss_heatmap"]), rel=1e-4)
    assert float(weighted["loss_size"]) == pytest.approx(4 * float(losses["loss_size"]), rel=1e-4)
    assert weighted["loss_offset"] == 0


def test_images_without_a_face():
    model = build_model(cfg()).train()
    losses = model([with_faces(image(64, 64), []), with_faces(image(50, 64, seed=1), [])])
    assert losses["loss_size"] == losses["loss_offset"] == 0 < losses["loss_heatmap"]
    sum(losses.values()).backward()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters() if x.requires_grad)
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad), "DDP waits for all of them"


def test_regions_to_ignore_reach_the_loss():
    model = build_model(cfg()).train()
    everywhere = model(train_inputs())["loss_heatmap"]
    left = model(train_inputs(ignore_boxes=Boxes(torch.tensor([[0.0, 0, 45, 64]]))))["loss_heatmap"]
    assert 0 < left < everywhere


def test_bfloat16():
    model = build_model(cfg("MODEL.GS.AUTOCAST_DTYPE", "bfloat16")).train()
    losses = model(train_inputs())
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    found = model.eval()([image(64, 90)])[0]["instances"]
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32


def test_learns_a_face_in_a_few_steps():
    """tests/test_overfitting.py trains on four images, through the trainer."""
    torch.manual_seed(0)
    model = build_model(cfg()).train()
    inputs = [with_faces(image(64, 64), [[12, 8, 44, 48]])]
    inputs[0]["image"][:, 8:48, 12:44] //= 4
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(30):
        optimizer.zero_grad()
        sum(model(inputs).values()).backward()
        optimizer.step()
    found = model.eval()(inputs)[0]["instances"]
    torch.set_num_threads(num_threads)
    assert found.scores[0] > 0.5 and (found.scores[1:] < 0.5).all()
    assert iou(found.pred_boxes.tensor[0].tolist(), (12, 8, 44, 48)) > 0.5


# Detections


class Maps(nn.Module):
    """A head that predicts given maps."""

    def __init__(self, logits, sizes, offsets):
        super().__init__()
        self.maps = logits, sizes, offsets

    def forward(self, feature):
        return tuple(x.to(feature.device) for x in self.maps)


class Pass(Backbone):
    """Nothing but a map of stride 4."""

    size_divisibility = 32

    def output_shape(self):
        return {"p2": ShapeSpec(channels=3, stride=4)}

    def forward(self, x):
        return {"p2": x[:, :, ::4, ::4]}


def detector(logits, sizes=None, offsets=None, **settings):
    shape = (len(logits), 2, *logits.shape[1:])
    sizes = torch.full(shape, 4.0) if sizes is None else sizes
    offsets = torch.full(shape, 0.5) if offsets is None else offsets
    settings = {"max_detections": 1000, "nms_thresh": 0.5, **settings}
    return CenterNet(
        backbone=Pass(), head=Maps(logits, sizes, offsets), in_feature="p2", pixel_mean=(0.0,) * 3,
        pixel_std=(1.0,) * 3, **settings,
    ).eval()  # fmt: skip


def test_a_peak_is_a_box():
    logits = torch.full((1, 16, 16), -9.0)
    logits[0, 5, 7] = 2.0
    sizes, offsets = torch.ones(1, 2, 16, 16), torch.zeros(1, 2, 16, 16)
    sizes[0, :, 5, 7], offsets[0, :, 5, 7] = torch.tensor([3.0, 5.0]), torch.tensor([0.25, 0.5])
    (found,) = detector(logits, sizes, offsets, score_thresh=0.5).predict_candidates([image(64, 64)])
    assert set(found.get_fields()) == {"pred_boxes", "logits", "scores", "pred_classes"}
    assert found.pred_boxes.tensor.tolist() == [[23.0, 12.0, 35.0, 32.0]]
    assert found.logits.tolist() == [2.0] and found.pred_classes.tolist() == [0]
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-2))])


def test_targets_decode_to_the_faces_they_were_made_of():
    """The two halves agree on where a cell is and which comes first, x or y."""
    faces = torch.tensor([[10.0, 10, 31, 52], [70, 4, 93, 20], [0, 0, 8, 9], [40, 40, 49, 50]])
    targets = center_targets([Boxes(faces)], None, [(60, 96)], (16, 24), 4, 0.3)
    maps = torch.zeros(2, 2, 16 * 24)
    maps[0, :, targets.cells], maps[1, :, targets.cells] = targets.sizes.T, targets.offsets.T
    sizes, offsets = maps.reshape(2, 1, 2, 16, 24)
    logits = torch.logit(targets.heatmap.clamp(1e-4, 1 - 1e-4))
    found = detector(logits, sizes, offsets, score_thresh=0.9)([image(60, 96)])[0]["instances"]
    boxes = found.pred_boxes.tensor
    torch.testing.assert_close(boxes[boxes[:, 0].argsort()], faces[faces[:, 0].argsort()], rtol=0, atol=1e-4)


def slow_peaks(logits):
    rows, columns = logits.shape
    value = [[x if math.isfinite(x) else -INF for x in row] for row in logits.tolist()]
    return [
        i * columns + j
        for i in range(rows)
        for j in range(columns)
        if math.isfinite(value[i][j])
        and all(
            value[i][j] >= value[a][b]
            for a in range(max(i - 1, 0), min(i + 2, rows))
            for b in range(max(j - 1, 0), min(j + 2, columns))
        )
    ]


@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 30.0, 31.0, math.nan, INF, -INF]), min_size=49, max_size=49),
)
@settings(max_examples=150, deadline=None)
def test_peaks_against_a_search(rows, columns, values):
    logits = torch.tensor(values)[: rows * columns].reshape(rows, columns)
    assert heat_peaks(logits).tolist() == slow_peaks(logits)


def test_peaks_are_of_logits_not_of_probabilities():
    """Whose neighbours all round to 1."""
    logits = torch.full((3, 3), 30.0)
    logits[1, 1] = 40.0
    assert heat_peaks(logits).tolist() == [4]


@pytest.mark.parametrize("topk", [1, 5, 1023, 5000])
def test_of_equal_peaks_the_lower_cell_comes_first_also_at_the_cut(topk, device):
    logits = torch.full((1, 64, 64), -3.0)
    logits[0, ::2, ::2] = 0.0  # 1024 peaks
    model = detector(logits, topk=topk, score_thresh=0.2).to(device)
    (found,) = model.predict_candidates([image(256, 256)])
    centres = found.pred_boxes.get_centers()
    cells = [64 * i + j for i in range(0, 64, 2) for j in range(0, 64, 2)]
    whole = ((found.pred_boxes.tensor > 0) & (found.pred_boxes.tensor < 256)).all(dim=1)
    expected = torch.tensor([(4.0 * (cell % 64) + 2, 4.0 * (cell // 64) + 2) for cell in cells[:topk]])
    assert len(found) == min(topk, 1024)
    assert torch.equal(centres[whole].cpu(), expected[whole.cpu()])


def test_cells_beyond_the_image_hide_nothing_and_find_nothing():
    """A batch's smaller image is padded; the result is that of the image alone."""
    logits = torch.full((2, 16, 16), -9.0)
    logits[:, 4, 7], logits[:, 4, 8], logits[:, 12, 12] = 1.0, 5.0, 5.0
    inputs = [image(64, 64), image(40, 31)]  # the second has cells up to column 7 and row 9
    one, other = detector(logits, score_thresh=0.5).predict_candidates(inputs)
    assert one.logits.tolist() == [5.0, 5.0] and other.logits.tolist() == [1.0]
    assert other.image_size == (40, 31) and other.pred_boxes.tensor.tolist() == [[22.0, 10.0, 31.0, 26.0]]


def test_limits():
    logits = torch.full((1, 16, 16), -9.0)
    logits[0, 2, 2], logits[0, 2, 12], logits[0, 10, 2] = 3.0, 2.0, -2.0
    sizes = torch.full((1, 2, 16, 16), 4.0)
    sizes[0, 0, 2, 12] = 1.0

    def found(**settings):
        return detector(logits, sizes, **settings).predict_candidates([image(64, 64)])[0].logits.tolist()

    assert found(score_thresh=0.05) == [3.0, 2.0, -2.0] and found(score_thresh=0.5) == [3.0, 2.0]
    assert found(score_thresh=0.05, min_box_size=4.0) == [3.0, -2.0] and found(topk=1) == [3.0]
    sizes[0, 1, 2, 2] = -1.0
    assert found(score_thresh=0.05) == [2.0, -2.0], "a size below 0 is no box"


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("which", range(3))
def test_what_a_diverged_model_predicts_is_dropped(value, which):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, *shape, generator=generator) for shape in ((16, 16), (2, 16, 16), (2, 16, 16))]
    maps[which][..., ::2, :] = value
    (found,) = detector(*maps).predict_candidates([image(64, 64)])
    assert torch.isfinite(found.pred_boxes.tensor).all() and torch.isfinite(found.logits).all()
    assert (found.pred_boxes.tensor >= 0).all() and (found.pred_boxes.tensor <= 64).all()
    maps[which][:] = value
    assert len(detector(*maps)([image(64, 64)])[0]["instances"]) == 0


def test_overlapping_boxes_of_two_peaks_are_merged():
    logits = torch.full((1, 16, 16), -9.0)
    logits[0, 6, 6], logits[0, 6, 8], logits[0, 12, 12] = 3.0, 4.0, 1.0
    model = detector(logits, torch.full((1, 2, 16, 16), 8.0), score_thresh=0.5)
    assert len(model.predict_candidates([image(64, 64)])[0]) == 3
    found = model([{**image(64, 64), "height": 128, "width": 192}])[0]["instances"]
    assert found.image_size == (128, 192) and len(found) == 2 and not found.has("logits")
    assert found.pred_boxes.tensor[0].tolist() == [54.0, 20.0, 150.0, 84.0]


# What it shares


def test_one_level_of_a_pyramid_is_the_plain_detector():
    model, x = small_model(), image(150, 206)
    with torch.no_grad():
        (plain,), (ours,) = model([x]), PyramidDetector(model=model, scales=[1.0])([x])
    plain, ours = plain["instances"], ours["instances"]
    assert len(plain) == len(ours) > 0 and set(plain.get_fields()) == set(ours.get_fields())
    assert torch.equal(plain.scores, ours.scores) and torch.equal(plain.pred_boxes.tensor, ours.pred_boxes.tensor)


def test_pyramid_and_box_voting_of_the_config():
    model = small_model()
    config = cfg("TEST.GS.SCALES", [0.5, 1.0, 1.5], "TEST.GS.FLIP", True)
    assert config.TEST.GS.PYRAMID
    found = {}
    for voting in (False, True):
        config.TEST.GS.BOX_VOTING = voting
        found[voting] = PyramidDetector(config, model)([image(100, 140)])[0]["instances"]
        boxes = found[voting].pred_boxes.tensor
        assert len(found[voting]) > 0 and (boxes >= -1e-3).all()
        assert (boxes <= torch.tensor([140, 100, 140, 100]) + 1e-3).all()
    assert torch.equal(found[False].scores, found[True].scores)
    assert not torch.equal(found[False].pred_boxes.tensor, found[True].pred_boxes.tensor)


class OutOfMemory(nn.Module):
    """The detector, on a machine that has memory for images of a limited size only."""

    def __init__(self, model, max_pixels):
        super().__init__()
        self.model, self.max_pixels = model, max_pixels
        self.tile_geometry = model.tile_geometry

    def predict_candidates(self, batched_inputs):
        if sum(x["image"].shape[1] * x["image"].shape[2] for x in batched_inputs) > self.max_pixels:
            raise torch.OutOfMemoryError
        return self.model.predict_candidates(batched_inputs)


def test_tiles_find_what_the_whole_image_has():
    """With features that depend on what is near only: GroupNorm's do not."""
    torch.manual_seed(0)
    model = build_model(cfg("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN")).eval()
    assert model.tile_geometry == (32, 64)
    x = image(64, 1472)["image"]
    (whole,), (tiled,) = (
        TiledPredictor(OutOfMemory(model, limit), topk=5000)([x], "It") for limit in (10**9, 64 * 1100)
    )
    assert len(whole) == len(tiled) > 50
    one, other = (found[found.pred_boxes.get_centers()[:, 0].argsort()] for found in (whole, tiled))
    torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=1e-2)
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-4)


def test_the_trainer_trains_and_evaluates_it(drawn_datasets, tmp_path):
    own = (
        "MODEL.META_ARCHITECTURE", "CenterNet", "MODEL.BACKBONE.NAME", "build_resnet_transposed_backbone",
        "MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.GS.SAMPLER", "random",
        "MODEL.RPN.BBOX_REG_LOSS_TYPE", "smooth_l1", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (),
    )  # fmt: skip
    config = small_config(drawn_datasets, tmp_path, *own)
    config.DATASETS.TEST = config.DATASETS.TRAIN
    check_config(config)
    trainer = engine.Trainer(config)
    trainer.train()
    summary = json.loads((tmp_path / "inference/engine_train/results.json").read_text())
    assert summary["setting"]["boxes before NMS"] == 5000 and "all" in summary
    assert not any("@" in name for name in summary), "there are no anchor scales"


def test_face_detector(drawn_datasets, tmp_path):
    config = cfg("TEST.GS.PYRAMID", False)
    torch.save({"model": small_model().state_dict()}, tmp_path / "model.pth")
    picture = next(drawn_datasets.rglob("*.jpg"))
    finder = FaceDetector(config, tmp_path / "model.pth", confidence_threshold=0.05)
    boxes, scores = finder.detect(picture)
    assert len(boxes) == len(scores) > 0 and (scores >= 0.05).all() and (scores[1:] <= scores[:-1]).all()
    with pytest.raises(ValueError):
        FaceDetector(cfg("MODEL.GS.CENTERNET.CONV_DIM", 16), tmp_path / "model.pth")


# What it says of itself


def test_its_settings_are_those_it_detects_with():
    config = cfg(
        "TEST.GS.SCORE_THRESH", 0.25, "MODEL.RPN.PRE_NMS_TOPK_TEST", 321, "MODEL.RPN.NMS_THRESH", 0.375,
        "MODEL.RPN.POST_NMS_TOPK_TEST", 1500, "TEST.DETECTIONS_PER_IMAGE", 1200, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 3,
    )  # fmt: skip
    assert description_of("CenterNet").test_settings(config) == (0.25, 321, 0.375, 1200)
    assert description_of("CenterNet").class_agnostic
    model = build_model(config)
    assert (model.score_thresh, model.topk, model.nms_thresh, model.max_detections) == (0.25, 321, 0.375, 1200)
    assert model.min_box_size == 3
    setting = engine.test_setting(config)
    assert setting["boxes before NMS per level"] == 321 and setting["NMS IoU"] == 0.375


@pytest.mark.parametrize(
    "key", ["RPN.NMS_THRESH", "RPN.PRE_NMS_TOPK_TEST", "RPN.POST_NMS_TOPK_TEST", "TEST.DETECTIONS_PER_IMAGE"]
)
def test_a_breaking_default_is_named(key):
    key = key.replace("RPN", "MODEL.RPN", 1)
    with pytest.raises(ValueError, match=f"{key} is Detectron2's default ") as error:
        check_config(cfg(key, dict(leaves(get_cfg()))[key]))
    assert str(error.value).count("is Detectron2's default") == 1


def test_defaults_that_are_of_samples_do_not_break_it():
    check_config(
        cfg(
            "MODEL.RPN.IOU_THRESHOLDS", [0.3, 0.7], "MODEL.RPN.POSITIVE_FRACTION", 0.5,
            "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 256,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("MODEL.GS.SAMPLER", "wrs", "every cell of the map is trained on"),
        ("MODEL.GS.GROUP_SAMPLING", False, "every cell of the map is trained on"),
        ("MODEL.GS.GROUP_SCALES", [16, 32], "every cell of the map is trained on"),
        ("MODEL.GS.OHEM_NMS_THRESH", 0.7, "every cell of the map is trained on"),
        ("MODEL.GS.IOU_AWARE", [0.4, 0.6], r"use MODEL\.GS\.CENTERNET\.LOSS_WEIGHTS"),
        ("MODEL.GS.CLS_LOSS_TYPE", "focal", r"use MODEL\.GS\.CENTERNET\.LOSS_WEIGHTS"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "least_square_iou", r"use MODEL\.GS\.CENTERNET\.LOSS_WEIGHTS"),
        ("MODEL.RPN.LOSS_WEIGHT", 2.0, r"use MODEL\.GS\.CENTERNET\.LOSS_WEIGHTS"),
        ("MODEL.RPN.CONV_DIMS", [64], "the head has the channels"),
    ],
)
def test_keys_that_do_nothing_in_it_are_refused(key, value, hint):
    check_config(cfg())
    with pytest.raises(ValueError, match=rf"do nothing in CenterNet(.|\n)*{key} .*{hint}"):
        check_config(cfg(key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.GS.CENTERNET.MIN_OVERLAP", 0.0, r"CENTERNET.MIN_OVERLAP must be in \(0, 1\], got 0.0"),
        ("MODEL.GS.CENTERNET.MIN_OVERLAP", 1.5, r"CENTERNET.MIN_OVERLAP must be in \(0, 1\], got 1.5"),
        (
            "MODEL.GS.CENTERNET.LOSS_WEIGHTS",
            [1.0, 0.1],
            r"LOSS_WEIGHTS must be three numbers not below 0, .* \[1.0, 0.1",
        ),
        ("MODEL.GS.CENTERNET.LOSS_WEIGHTS", [1.0, -0.1, 1.0], "LOSS_WEIGHTS must be three numbers not below 0"),
        ("MODEL.RPN.IN_FEATURES", ["p2", "p3"], r"CenterNet has one map, got MODEL.RPN.IN_FEATURES \['p2', 'p3'\]"),
        ("MODEL.RPN.IN_FEATURES", ["p3"], "IN_FEATURES names 'p3', and the backbone has p2"),
    ],
)
def test_a_wrong_value_builds_nothing(key, value, message):
    with pytest.raises(ValueError, match=message):
        build_model(cfg(key, value))


def test_any_backbone_with_a_map_will_do():
    """A top-down path instead of the transposed convolutions; strides come from the map."""
    model = build_model(
        cfg(
            "MODEL.BACKBONE.NAME", "build_resnet_topdown_backbone", "MODEL.RPN.IN_FEATURES", ["p3"],
            "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
            "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"],
        )
    )  # fmt: skip
    assert model.stride == 8
    assert all(torch.isfinite(x) for x in model.train()(train_inputs()).values())
    assert isinstance(copy.deepcopy(model).eval()(train_inputs())[0]["instances"], Instances)
