"""PyramidDetector against the plain detector and against its definition."""

import gc
import os
import weakref

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from small_detector import build, image
from torchvision.ops import nms

import gs_d2.modeling  # noqa: F401  (registers the detectors)
from gs_d2 import engine
from gs_d2.config import add_gs_config, check_config
from gs_d2.data import register_wider_face
from gs_d2.inference import PyramidDetector
from gs_d2.inference.pyramid import pyramid_levels
from gs_d2.modeling.nms import top_nms

SIZE = (150, 206)


def pyramid(model=None, scales=(1.0,), **arguments):
    return PyramidDetector(model=model or build(), scales=list(scales), **arguments)


def assert_same(ours: Instances, other: Instances, tolerance=0.0):
    assert ours.image_size == other.image_size
    assert set(ours.get_fields()) == set(other.get_fields())
    assert len(ours) == len(other) > 0
    for name, value in ours.get_fields().items():
        a, b = (x.tensor if isinstance(x, Boxes) else x for x in (value, other.get(name)))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def in_order(instances: Instances):
    """By position, for results whose equal scores may come in any order."""
    boxes = instances.pred_boxes.tensor.double().round(decimals=2)
    return instances[torch.argsort((boxes * torch.tensor([1e6, 1e3, 1, 1e-3])).sum(dim=1))]


# One factor of 1 is the plain detector


@pytest.mark.parametrize("size", [{}, {"height": 300, "width": 412}], ids=["own size", "other size"])
def test_factor_one_is_the_plain_detector(size, device):
    model = build().to(device)
    x = image(*SIZE) | size
    (plain,), (ours,) = model([x]), pyramid(model)([x])
    tolerance = 1e-4 if size else 0.0  # there plain testing scales after NMS, we before
    assert_same(ours["instances"], plain["instances"], tolerance)
    assert ours["instances"].scores.device.type == device


def test_factor_one_is_the_plain_detector_for_the_quick_config():
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file("configs/quick/demo.yaml")
    cfg.TEST.GS.PYRAMID, cfg.TEST.GS.SCALES = True, [1.0]
    check_config(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    x = image(96, 120)
    assert_same(PyramidDetector(cfg, model)([x])[0]["instances"], model([x])[0]["instances"])


# Levels


@pytest.mark.parametrize(
    ("size", "scales", "cap", "expected"),
    [
        ((100, 200), [2.0, 0.5, 1.0], 3000, [(0.5, 50, 100), (1.0, 100, 200), (2.0, 200, 400)]),
        ((100, 200), [0.5, 1.0, 2.0], 200, [(0.5, 50, 100), (1.0, 100, 200)]),  # a side equal to the cap stays
        ((200, 100), [0.5, 1.0, 2.0], 199, [(0.5, 100, 50)]),
        ((100, 400), [1.0, 2.0], 200, [(0.5, 50, 200)]),  # even the smallest is over the cap
        ((1, 6000), [0.25], 100, [(1 / 60, 1, 100)]),
    ],
)
def test_levels(size, scales, cap, expected):
    levels = pyramid_levels(*size, scales, cap)
    assert [(level.factor, level.height, level.width) for level in levels] == expected
    assert [level.is_smallest for level in levels] == [True] + [False] * (len(levels) - 1)
    assert [level.is_largest for level in levels] == [False] * (len(levels) - 1) + [True]


def test_the_paper_s_levels():
    levels = pyramid_levels(768, 1024, [0.25 * n for n in range(1, 9)], 3000)
    assert [(level.width, level.height) for level in levels] == [(256 * n, 192 * n) for n in range(1, 9)]


def spy(model):
    """Records the size of every image that the model gets."""
    seen = []
    predict = model.predict_candidates

    def recorded(inputs):
        seen.extend(tuple(x["image"].shape[1:]) for x in inputs)
        return predict(inputs)

    model.predict_candidates = recorded
    return seen


def test_skipped_levels_are_never_run():
    model = build()
    seen = spy(model)
    pyramid(model, [0.5, 1.0, 2.0], max_size=210)([image(*SIZE)])
    assert seen == [SIZE, (75, 103)]
    seen.clear()
    (result,) = pyramid(model, [1.0, 2.0], max_size=103)([image(*SIZE)])
    assert seen == [(75, 103)]
    assert result["instances"].image_size == SIZE
    assert result["instances"].pred_boxes.tensor[:, 2].max() > 103


# One merged NMS


def literal_candidates(model, x, scales, flip):
    """Every level's candidates, mapped back by arithmetic of its own."""
    height, width = x["image"].shape[1:]
    boxes, scores = [], []
    for level in reversed(pyramid_levels(height, width, scales, 3000)):
        view = x["image"].permute(1, 2, 0).numpy()
        if level.factor != 1:
            view = np.asarray(Image.fromarray(view).resize((level.width, level.height), Image.BILINEAR))
        view = torch.from_numpy(view.copy()).permute(2, 0, 1)
        for mirrored in [False, True] if flip else [False]:
            (found,) = model.predict_candidates([{"image": torch.flip(view, [2]) if mirrored else view}])
            for (x1, y1, x2, y2), score in zip(found.pred_boxes.tensor.tolist(), found.scores.tolist(), strict=True):
                if mirrored:
                    x1, x2 = level.width - x2, level.width - x1
                sx, sy = width / level.width, height / level.height
                boxes.append([x1 * sx, y1 * sy, x2 * sx, y2 * sy])
                scores.append(score)
    return torch.tensor(boxes), torch.tensor(scores)


@pytest.mark.parametrize("flip", [False, True])
def test_levels_are_merged_by_one_nms(flip):
    model = build()
    x = image(96, 128)
    scales = [0.5, 1.0, 1.5]
    boxes, scores = literal_candidates(model, x, scales, flip)
    keep = nms(boxes, scores, 0.5)[:200]
    result = pyramid(model, scales, flip=flip)([x])[0]["instances"]
    torch.testing.assert_close(result.scores, scores[keep], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.pred_boxes.tensor, boxes[keep], rtol=1e-4, atol=1e-3)
    assert len(result) > 50


def test_levels_of_a_sure_detector_are_merged_by_logits():
    """All of their scores round to 1: by these the first level's boxes would win."""
    model, merged = build(), []
    with torch.no_grad():
        model.proposal_generator.rpn_head.objectness_logits.bias.copy_(torch.tensor([0.0, 30.0]).repeat(2))
    select = model.select_detections
    model.select_detections = lambda candidates: merged.append(candidates) or select(candidates)
    (result,) = pyramid(model, [0.5, 1.0, 1.5])([image(96, 128)])
    (candidates,) = merged
    assert (candidates.scores == 1).all() and (candidates.logits[1:] > candidates.logits[:-1]).any()
    kept = nms(candidates.pred_boxes.tensor, candidates.logits, 0.5)[:200]
    assert torch.equal(result["instances"].pred_boxes.tensor, candidates.pred_boxes.tensor[kept])
    assert not result["instances"].has("logits")


def test_mirrored_image_gives_mirrored_boxes():
    detector = pyramid(scales=[0.5, 1.0], flip=True)
    x = image(96, 130)
    straight = detector([x])[0]["instances"]
    mirrored = detector([{"image": x["image"].flip(2)}])[0]["instances"]
    boxes = mirrored.pred_boxes.tensor
    back = torch.stack([130 - boxes[:, 2], boxes[:, 1], 130 - boxes[:, 0], boxes[:, 3]], dim=1)
    assert len(straight) > 50
    torch.testing.assert_close(mirrored.scores, straight.scores, rtol=0, atol=1e-6)
    mirrored.pred_boxes = Boxes(back)
    assert_same(in_order(mirrored), in_order(straight), 1e-3)


def test_top_nms_is_the_head_of_nms(monkeypatch):
    monkeypatch.setattr("gs_d2.modeling.nms._CHUNK", {"cpu": 64})
    generator = torch.Generator().manual_seed(0)
    for n in (0, 1, 63, 64, 65, 1000):
        corner = torch.rand(n, 2, generator=generator) * 100
        boxes = torch.cat([corner, corner + 5 + torch.rand(n, 2, generator=generator) * 20], dim=1)
        scores = (torch.rand(n, generator=generator) * 50).round() / 50  # many ties
        for limit in (1, 7, 10**6):
            assert torch.equal(top_nms(boxes, scores, 0.3, limit), nms(boxes, scores, 0.3)[:limit])


# Batches and memory


def test_batch_size_does_not_matter():
    detector = pyramid(scales=[0.5, 1.0], flip=True)
    inputs = [image(*SIZE), image(*SIZE, seed=1), image(145, 200, seed=2), image(40, 60, seed=3)]
    together = detector(inputs)
    for x, result in zip(inputs, together, strict=True):
        assert_same(in_order(result["instances"]), in_order(detector([x])[0]["instances"]), 1e-5)


def test_only_small_views_of_equal_padded_shape_share_a_batch(monkeypatch):
    monkeypatch.setattr("gs_d2.inference.pyramid._MAX_BATCH_PIXELS", 2 * 160 * 208)
    detector = pyramid(scales=[1.0, 2.0], flip=True)
    images = [image(*SIZE)["image"], image(145, 200)["image"], image(40, 60)["image"]]
    batches = [[(v.image, v.level.factor, v.flip) for v in batch] for batch in detector._batches(images)]
    assert batches == [
        *[[(i, 2.0, flip)] for i in (0, 1) for flip in (False, True)],
        [(2, 2.0, False), (2, 2.0, True)],
        *[[(i, 1.0, False), (i, 1.0, True)] for i in (0, 1)],
        [(2, 1.0, False), (2, 1.0, True)],
    ]


def test_one_level_in_memory_at_a_time():
    """Whatever a level computed is gone when the next one starts, and what is kept lies on the CPU."""
    model = build()
    alive = []

    def record(module, inputs, outputs):
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        alive.extend(weakref.ref(x) for x in (inputs[0], *outputs.values()))

    model.backbone.register_forward_hook(record)
    pyramid(model, [0.25 * n for n in range(1, 9)])([image(*SIZE)])
    assert len(alive) == 8 * 2


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux only")
def test_peak_memory_does_not_grow_with_levels():
    model = build(topk=500)
    x = image(500, 750)
    levels = {1: [2.0], 8: [0.25 * n for n in range(1, 9)]}
    peak_of(model, x, scales=levels[8])  # warms up the allocators
    peaks = {n: peak_of(model, x, scales=scales) for n, scales in levels.items()}
    print({n: f"{peak / 1e6:.0f} MB" for n, peak in peaks.items()})
    # Were they all held, eight levels would take 3.2 times what the largest takes.
    assert peaks[8] < 1.4 * peaks[1], peaks


def peak_of(model, x, **arguments) -> int:
    """How far the resident set rises while a pyramid runs, in bytes."""

    def status(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    pyramid(model, **arguments)([x])
    return status("VmHWM") - before


# Options


def test_box_voting_is_the_weighted_mean():
    model = build()
    x = image(96, 128)
    scales = [0.5, 1.0]
    boxes, scores = literal_candidates(model, x, scales, flip=False)
    plain = pyramid(model, scales)([x])[0]["instances"]
    voted = pyramid(model, scales, voting_thresh=0.5)([x])[0]["instances"]
    assert torch.equal(voted.scores, plain.scores)
    expected = []
    for kept in plain.pred_boxes.tensor.tolist():
        total, weight = [0.0] * 4, 0.0
        for other, score in zip(boxes.tolist(), scores.tolist(), strict=True):
            w = min(kept[2], other[2]) - max(kept[0], other[0])
            h = min(kept[3], other[3]) - max(kept[1], other[1])
            inter = max(w, 0) * max(h, 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (kept, other)]
            if inter / (sum(areas) - inter) >= 0.5:
                total = [t + score * c for t, c in zip(total, other, strict=True)]
                weight += score
        expected.append([t / weight for t in total])
    torch.testing.assert_close(voted.pred_boxes.tensor, torch.tensor(expected), rtol=1e-4, atol=1e-3)
    assert (voted.pred_boxes.tensor - plain.pred_boxes.tensor).abs().max() > 0.1


def test_level_box_size_keeps_each_size_on_its_level():
    model = build()
    x = image(192, 256)
    fixed = {0.5: [10.0, 20.0, 40.0], 1.0: [10.0, 20.0, 40.0], 2.0: [10.0, 20.0, 40.0]}

    def predict(inputs):
        side = torch.tensor(fixed[inputs[0]["image"].shape[1] / 192])
        corner = torch.tensor([0.0, 12.0, 40.0]) * inputs[0]["image"].shape[1] / 192
        boxes = Boxes(torch.stack([corner * 0, corner, side, corner + side], dim=1))
        size = tuple(inputs[0]["image"].shape[1:])
        ones = torch.ones(3)
        return [Instances(size, pred_boxes=boxes, scores=ones, pred_classes=ones.long(), anchor_scales=ones * 16)]

    model.predict_candidates = predict
    model.nms_thresh = 1.0
    found = pyramid(model, [0.5, 1.0, 2.0], level_box_size=[16, 32])([x])[0]["instances"]
    # 0.5: 20 and 40 in its pixels (the smallest level has no upper limit); 1.0: 20; 2.0: 10 and 20 (no lower one).
    assert sorted(found.pred_boxes.area().sqrt().tolist()) == pytest.approx([5.0, 10.0, 20.0, 40.0, 80.0])
    assert len(pyramid(model, [0.5, 1.0, 2.0])([x])[0]["instances"]) == 9


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": []}, "TEST.GS.SCALES must be different positive factors"),
        ({"scales": [1.0, 0.0]}, "TEST.GS.SCALES must be different positive factors"),
        ({"scales": [1.0, float("nan")]}, "TEST.GS.SCALES must be different positive factors"),
        ({"scales": [1.0, 1.0]}, "TEST.GS.SCALES must be different positive factors"),
        ({"max_size": 0}, "TEST.GS.MAX_SIZE must be at least 1 pixel, got 0"),
        ({"level_box_size": [32]}, r"TEST.GS.LEVEL_BOX_SIZE must be \[\] or \[low, high\]"),
        ({"level_box_size": [32, 16]}, r"TEST.GS.LEVEL_BOX_SIZE must be \[\] or \[low, high\]"),
        ({"model": torch.nn.Identity()}, "Identity cannot be tested on a pyramid: it has no predict_candidates"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        pyramid(**arguments)


def test_contradictory_config():
    message = "INPUT.MIN_SIZE_TEST 800 would resize before: set INPUT.MIN_SIZE_TEST 0"
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file("configs/Base-WIDER.yaml")
    check_config(cfg)
    cfg.INPUT.MIN_SIZE_TEST = 800
    with pytest.raises(ValueError, match=message):
        check_config(cfg)
    with pytest.raises(ValueError, match=message):
        PyramidDetector(cfg, build())
    cfg.TEST.GS.PYRAMID = False
    check_config(cfg)


def test_keeps_the_model_s_mode_and_refuses_training():
    detector = pyramid(build().train())
    assert detector.training
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        detector([image(*SIZE)])


# In training


@pytest.fixture
def drawn_cfg(drawn_datasets, tmp_path):
    """The demo's config, tested on four generated images."""
    name = "test_pyramid"
    base = drawn_datasets / "widerface"
    register_wider_face(name, base / "wider_face_split" / "wider_face_val_bbx_gt.txt", base / "WIDER_val" / "images")
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file("configs/quick/demo.yaml")
    opts = ["DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path)]
    cfg.merge_from_list([*opts, "TEST.GS.SCORE_THRESH", 0.45])
    yield cfg
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_the_trainer_tests_on_the_pyramid(drawn_cfg, tmp_path):
    torch.manual_seed(0)
    model = engine.Trainer.build_model(drawn_cfg)
    predictions = []
    for scales in (None, [1.0], [0.5, 1.0]):
        drawn_cfg.TEST.GS.PYRAMID, drawn_cfg.TEST.GS.SCALES = scales is not None, scales or [2.0]
        metrics = engine.Trainer.test(drawn_cfg, model)["wider_face"]
        assert 0 <= metrics["all"] <= 100
        assert model.training, "evaluation gives the model back as it was"
        files = sorted((tmp_path / "inference").rglob("*.txt"))
        predictions.append([file.read_bytes() for file in files])
    plain, one, two = predictions
    assert len(plain) == 4 and plain == one and plain != two


def test_the_setting_is_printed_with_the_figures(drawn_cfg):
    drawn_cfg.TEST.GS.PYRAMID = True
    drawn_cfg.merge_from_list(["TEST.GS.SCALES", [1.0, 0.5], "TEST.GS.FLIP", True, "TEST.GS.LEVEL_BOX_SIZE", [16, 256]])
    setting = engine.test_setting(drawn_cfg)
    assert setting["test size"] == "0.5, 1 x original, sides <= 3000"
    assert (setting["flip"], setting["box voting"], setting["level box size"]) == (True, False, [16, 256])
    assert setting["boxes before NMS per level"] == 5000 and setting["NMS IoU"] == 0.5
    drawn_cfg.TEST.GS.PYRAMID = False
    assert engine.test_setting(drawn_cfg)["test size"] == "original"


def test_wrong_settings_are_refused_before_training(drawn_cfg):
    drawn_cfg.TEST.GS.PYRAMID, drawn_cfg.TEST.GS.SCALES = True, [0.0]
    with pytest.raises(ValueError, match=r"TEST\.GS\.SCALES"):
        engine.Trainer.build_model(drawn_cfg)
