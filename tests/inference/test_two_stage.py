"""GroupedFastRCNN whole: training, testing at one and at several scales, memory order and number formats."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from small_detector import DIVISIBILITY, SCALES, build, build_two_stage, image
from torchvision.ops import nms

from gs_d2 import engine
from gs_d2.config import add_gs_config
from gs_d2.inference import PyramidDetector
from gs_d2.modeling import GroupedFastRCNN

SIZE = (96, 128)


def batch(num_images=2):
    inputs = []
    for i in range(num_images):
        faces = torch.tensor([[10.0, 12, 26, 29], [40, 30, 75, 66]])[: 2 - i]
        instances = Instances(SIZE, gt_boxes=Boxes(faces), gt_classes=torch.zeros(len(faces), dtype=torch.int64))
        inputs.append(image(*SIZE, seed=i) | {"instances": instances, "ignore_boxes": Boxes(torch.zeros(0, 4))})
    return inputs


def train(model, inputs=None):
    torch.manual_seed(5)
    with EventStorage():
        losses = model.train()(inputs or batch())
        sum(losses.values()).backward()
    return losses


def assert_same(ours: Instances, other: Instances, tolerance=0.0):
    assert ours.image_size == other.image_size and len(ours) == len(other) > 0
    assert set(ours.get_fields()) == set(other.get_fields())
    for name, value in ours.get_fields().items():
        a, b = (x.tensor if isinstance(x, Boxes) else x for x in (value, other.get(name)))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sampler", ["random", "wrs", "ohem"])
def test_trains_both_stages(sampler):
    model = build_two_stage(sampler)
    losses = train(model)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


def test_detects_by_both_stages():
    """Scores are the mean of both stages', and one NMS at the detector's threshold, not the proposals', ends it."""
    model = build_two_stage(max_detections=30)
    inputs = [image(*SIZE) | {"height": 192, "width": 256}, image(*SIZE, seed=1)]
    for result, candidates, x in zip(model(inputs), model.predict_candidates(inputs), inputs, strict=True):
        found = result["instances"]
        assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes", "anchor_scales"}
        assert found.image_size == (x.get("height", SIZE[0]), x.get("width", SIZE[1]))
        assert set(found.anchor_scales.tolist()) <= set(map(float, SCALES))
        kept = nms(candidates.pred_boxes.tensor, candidates.scores, 0.5)[:30]
        assert len(kept) < len(candidates)
        assert torch.equal(found.scores, candidates.scores[kept])
        boxes = candidates.pred_boxes.tensor[kept] * (found.image_size[0] / SIZE[0])
        torch.testing.assert_close(found.pred_boxes.tensor, boxes)
    proposals, _ = model.proposal_generator(
        model.preprocess_image(inputs), model.backbone(model.preprocess_image(inputs).tensor)
    )
    first = proposals[1].objectness_logits.sigmoid()
    second = 2 * model.predict_candidates(inputs)[1].scores - first
    assert (second > 0).all() and (second < 1).all()


def test_detections_of_sure_stages_are_ranked_by_logits():
    """Both stages' scores round to 1, and so their mean; the logits of the means still tell the detections apart."""
    model = build_two_stage(max_detections=30)
    with torch.no_grad():
        model.proposal_generator.rpn_head.objectness_logits.bias.copy_(torch.tensor([0.0, 25.0]).repeat(2))
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([25.0, 0.0]))
    (candidates,) = model.predict_candidates([image(*SIZE)])
    assert (candidates.scores == 1).sum() > 100 and len(candidates.logits.unique()) > 100
    kept = nms(candidates.pred_boxes.tensor, candidates.logits, 0.5)[:30]
    found = model([image(*SIZE)])[0]["instances"]
    assert torch.equal(found.pred_boxes.tensor, candidates.pred_boxes.tensor[kept])
    (merged,) = PyramidDetector(model=model, scales=[1.0])([image(*SIZE)])
    assert_same(merged["instances"], found)


def test_a_second_stage_alone_decides_where_asked_to():
    model, first = build_two_stage(), build()
    one = model([image(*SIZE)])[0]["instances"]
    model.roi_heads.score_ensemble = "none"
    two = model([image(*SIZE)])[0]["instances"]
    assert len(one) and len(two) and len(first([image(*SIZE)])[0]["instances"])
    assert not torch.equal(one.scores[:5], two.scores[:5])


# Several scales


def test_factor_one_is_the_plain_detector():
    model = build_two_stage()
    x = image(150, 206)
    assert_same(PyramidDetector(model=model, scales=[1.0])([x])[0]["instances"], model([x])[0]["instances"])


def test_a_pyramid_is_one_nms_over_both_stages_of_every_level():
    model = build_two_stage()
    x = image(*SIZE)
    candidates = []
    for factor in (1.0, 2.0):
        view = PyramidDetector(model=model, scales=[factor])
        model.nms_thresh, model.max_detections = 1.0, 10**6
        candidates.append(view([x])[0]["instances"])
        model.nms_thresh, model.max_detections = 0.5, 200
    candidates = Instances.cat(candidates)
    kept = nms(candidates.pred_boxes.tensor, candidates.scores, 0.5)[:200]
    found = PyramidDetector(model=model, scales=[1.0, 2.0])([x])[0]["instances"]
    assert set(found.scores.tolist()) == set(candidates.scores[kept].tolist())
    assert len(found) == len(kept)


def test_mirrored():
    """A mirrored view of the mirrored image is the image: the same detections, mirrored."""
    model = build_two_stage()
    x = image(96, 128)
    mirrored = x | {"image": x["image"].flip(2)}
    detector = PyramidDetector(model=model, scales=[1.0], flip=True)
    straight, back = detector([x])[0]["instances"], detector([mirrored])[0]["instances"]
    assert DIVISIBILITY == 16 and len(straight) > 10
    torch.testing.assert_close(straight.scores, back.scores, rtol=1e-4, atol=1e-5)
    x1, y1, x2, y2 = back.pred_boxes.tensor.unbind(dim=1)
    expected = torch.stack([128 - x2, y1, 128 - x1, y2], dim=1)
    torch.testing.assert_close(straight.pred_boxes.tensor, expected, rtol=1e-4, atol=1e-2)


def test_box_voting_goes_by_the_detections_threshold():
    """Not by RPN.NMS_THRESH, which is of proposals in a two-stage detector; nor is that what is printed."""
    cfg = quick_cfg()
    cfg.TEST.GS.PYRAMID, cfg.TEST.GS.BOX_VOTING = True, True
    assert (cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST) == (0.7, 0.5)
    model = build_two_stage()
    assert PyramidDetector(cfg, model).voting_thresh == model.nms_thresh == 0.5
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 100, 150
    setting = engine.test_setting(cfg)
    assert (setting["NMS IoU"], setting["boxes per image"]) == (0.5, 150)


def quick_cfg():
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file("configs/quick/two_stage.yaml")
    return cfg


# Memory order and number formats


def test_channels_last_is_the_same_up_to_rounding():
    plain, ours = build_two_stage(), build_two_stage(channels_last=True)
    assert ours.backbone.conv.weight.is_contiguous(memory_format=torch.channels_last)
    maps = []
    ours.backbone.register_forward_hook(lambda module, args, out: maps.extend((args[0], out["p2"])))
    x = image(*SIZE)
    assert_same(ours([x])[0]["instances"], plain([x])[0]["instances"], 1e-4)
    for x in maps:
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    for name, value in train(plain).items():
        torch.testing.assert_close(train(ours)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["random", "wrs"])
def test_autocast(sampler):
    """Convolutions run in bfloat16; losses, boxes and scores do not, and every parameter still learns."""
    model = build_two_stage(sampler, autocast_dtype="bfloat16")
    types = []
    model.backbone.register_forward_hook(lambda module, args, out: types.append(out["p2"].dtype))
    model.roi_heads.box_head.register_forward_hook(lambda module, args, out: types.append(out.dtype))
    losses = train(model)
    assert set(types) == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")
    for name, value in train(build_two_stage(sampler)).items():
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], value, rtol=0.1, atol=0.02)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert (parameter.grad != 0).any(), name

    found = model.eval()([image(*SIZE)])[0]["instances"]
    assert len(found) and found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    for candidates in model.predict_candidates([image(*SIZE)]):
        assert candidates.scores.dtype == candidates.pred_boxes.tensor.dtype == torch.float32


@pytest.mark.parametrize(("own", "expected"), [("", torch.float16), ("bfloat16", torch.bfloat16)])
def test_the_callers_autocast(own, expected):
    """Empty leaves the caller's alone, on or off; a type of one's own goes before it and is gone afterwards."""
    model = build_two_stage(autocast_dtype=own)
    types = []
    model.backbone.register_forward_hook(lambda module, args, out: types.append(out["p2"].dtype))
    with torch.autocast("cpu", torch.float16):
        model([image(*SIZE)])
        assert torch.get_autocast_dtype("cpu") == torch.float16
    model([image(*SIZE)])
    assert types == [expected, torch.bfloat16 if own else torch.float32]
    with pytest.raises(ValueError, match="AUTOCAST_DTYPE must be bfloat16, float16 or empty, got 'half'"):
        build_two_stage(autocast_dtype="half")


def test_it_is_what_the_config_builds():
    cfg = quick_cfg()
    cfg.MODEL.GS.IGNORE_THRESH, cfg.MODEL.GS.SECOND_PASS = 0.3, "all"
    model = build_model(cfg)
    for matcher in (model.proposal_generator.group_loss.matcher, model.roi_heads.group_loss.matcher):
        assert (matcher.ignore_thresh, matcher.second_pass) == (0.3, "all")
    assert type(model) is GroupedFastRCNN
    assert model.nms_thresh == 0.5 and model.proposal_generator.nms_thresh == 0.7
    assert model.proposal_generator.group_post_nms_topk == {True: 60, False: 100}
    heads = model.roi_heads
    sampler, matcher = heads.group_loss.sampler, heads.group_loss.matcher
    assert (sampler.num_groups, sampler.num_per_group, sampler.method) == (4, 32, "wrs")
    assert (matcher.low, matcher.high) == (0.5, 0.6)
    assert heads.group_loss.group_scales == [16, 32, 64, 128]
    proposals = torch.tensor([[40.0, 40, 56, 56], [40, 40, 72, 72]])
    tiny = Boxes(torch.tensor([[45.0, 45, 49, 50]]))
    labels, _, _ = heads.group_loss.match(proposals, [Boxes(torch.zeros(0, 4))], [tiny])
    assert labels.tolist() == [[-1, 0]]
    cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 150, 100
    for architecture, limits in (("GroupedFastRCNN", (0.5, 150)), ("RPNDetector", (0.7, 100))):
        cfg.MODEL.META_ARCHITECTURE = architecture
        model, setting = build_model(cfg), engine.test_setting(cfg)
        assert (model.nms_thresh, model.max_detections) == (setting["NMS IoU"], setting["boxes per image"]) == limits
    cfg.MODEL.META_ARCHITECTURE = "GroupedFastRCNN"
    cfg.MODEL.GS.ROI.GROUP_SAMPLING = False
    assert build_model(cfg).roi_heads.group_loss.sampler.num_groups == 1
