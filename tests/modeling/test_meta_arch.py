"""RPNDetector, its backbone and head, built without and with a config."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from test_rpn import build as build_rpn
from torch import nn

from gs_d2.config import add_gs_config, load_config
from gs_d2.modeling import RPNDetector, SoftmaxRPNHead, TopDown
from gs_d2.modeling.backbone import Context


def GROUP_NORM(channels):
    return nn.GroupNorm(4, channels)


class BottomUp(Backbone):
    """res2, res3, res4 by average pooling; the channels tell the level."""

    def __init__(self, channels=(4, 6, 8)):
        super().__init__()
        self.channels = channels

    def output_shape(self):
        return {f"res{i + 2}": ShapeSpec(channels=c, stride=4 << i) for i, c in enumerate(self.channels)}

    def forward(self, x):
        return {f"res{i + 2}": F.avg_pool2d(x, 4 << i).repeat(1, c, 1, 1)[:, :c] for i, c in enumerate(self.channels)}


def test_top_down_is_lateral_plus_bilinear():
    torch.manual_seed(0)
    net = TopDown(BottomUp(), ["res2", "res3", "res4"], 8)
    image = torch.rand(2, 3, 64, 96)
    features, outputs = net.bottom_up(image), net(image)
    p4 = net.fpn_lateral4(features["res4"])
    p3 = net.fpn_lateral3(features["res3"]) + F.interpolate(p4, scale_factor=2, mode="bilinear", align_corners=False)
    p2 = net.fpn_lateral2(features["res2"]) + F.interpolate(p3, scale_factor=2, mode="bilinear", align_corners=False)
    for name, expected in {"p2": p2, "p3": p3, "p4": p4}.items():
        assert torch.equal(outputs[name], expected)
    assert net.size_divisibility == 16
    assert {k: (v.channels, v.stride) for k, v in net.output_shape().items()} == {
        "p2": (8, 4), "p3": (8, 8), "p4": (8, 16),
    }  # fmt: skip
    # No 3x3 output convolution, one lateral per level.
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 3


def test_context_of_a_new_module_is_the_map_itself():
    torch.manual_seed(0)
    x = torch.rand(2, 8, 13, 7)
    assert torch.equal(Context(8, 2, GROUP_NORM)(x), x)


def test_context_is_a_pyramid_of_coarser_maps():
    torch.manual_seed(0)
    net, x = Context(8, 2, GROUP_NORM), torch.rand(2, 8, 13, 7)
    nn.init.normal_(net.up[0].norm.weight)
    half, quarter = net.down[0](x), net.down[1](net.down[0](x))
    assert half.shape[-2:] == (7, 4) and quarter.shape[-2:] == (4, 2)
    up = half + F.interpolate(net.up[1](quarter), size=(7, 4), mode="bilinear", align_corners=False)
    expected = x + F.interpolate(net.up[0](up), size=(13, 7), mode="bilinear", align_corners=False)
    assert torch.equal(net(x), expected)
    assert net(x[:, :, :1, :1]).shape == (2, 8, 1, 1)


def test_context_changes_what_its_neighbours_see():
    """A cell sees further than without: the reason why large anchors need it."""
    torch.manual_seed(0)
    with_context = TopDown(BottomUp(), ["res2", "res3", "res4"], 8, norm=GROUP_NORM, context_levels=2)
    nn.init.normal_(with_context.context.up[0].norm.weight)
    bounds = {}
    for name, net in (("with", with_context), ("without", TopDown(BottomUp(), ["res2", "res3", "res4"], 8))):
        image = torch.rand(1, 3, 320, 320, requires_grad=True)
        norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
        for norm in norms:  # its statistics see the whole image
            norm.forward = lambda x, norm=norm: x * norm.weight[:, None, None]
        net(image)["p4"][0, :, 10, 10].sum().backward()
        bounds[name] = int((image.grad.abs().sum((0, 1, 2)) > 0).sum())
    assert bounds["with"] > 3 * bounds["without"]


@pytest.mark.parametrize(("levels", "norm"), [(-1, GROUP_NORM), (1, "")])
def test_context_levels_that_cannot_be(levels, norm):
    with pytest.raises(ValueError, match="CONTEXT_LEVELS must be at least 0, and above 0 it needs a norm"):
        TopDown(BottomUp(), ["res2"], 8, norm=norm, context_levels=levels)


def test_top_down_needs_doubling_strides():
    with pytest.raises(ValueError, match="in_features must double in stride"):
        TopDown(BottomUp(), ["res2", "res4"], 8)


def test_softmax_head_shapes():
    head = SoftmaxRPNHead(in_channels=8, num_anchors=3)
    logits, deltas = head([torch.rand(2, 8, 5, 7), torch.rand(2, 8, 3, 4)])
    assert [tuple(x.shape) for x in logits] == [(2, 6, 5, 7), (2, 6, 3, 4)]
    assert [tuple(x.shape) for x in deltas] == [(2, 12, 5, 7), (2, 12, 3, 4)]


class Convolutions(BottomUp):
    """res2, res3, res4 by convolutions."""

    def __init__(self):
        super().__init__()
        strides = (4, 2, 2)
        channels = (3, *self.channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride, padding=1) for i, stride in enumerate(strides)
        )

    def forward(self, x):
        maps = {}
        for i, conv in enumerate(self.convs):
            x = maps[f"res{i + 2}"] = conv(x).relu()
        return maps


def detector(bottom_up=BottomUp, **arguments):
    torch.manual_seed(0)
    return RPNDetector(
        backbone=TopDown(bottom_up(), ["res2", "res3", "res4"], 8),
        proposal_generator=build_rpn(),
        pixel_mean=(120.0, 110.0, 100.0),
        pixel_std=(60.0, 60.0, 60.0),
        max_detections=7,
        **arguments,
    )


def batch(sizes=((90, 70), (64, 100))):
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[10.0, 10, 40, 40]]))
        inputs.append(
            {
                "image": torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8),
                "instances": instances,
                "ignore_boxes": Boxes(torch.zeros(0, 4)),
            }
        )
    return inputs


def test_detector_trains_and_detects():
    model = detector()
    with EventStorage():
        losses = model(batch())
        sum(losses.values()).backward()
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
    model.eval()
    inputs = batch()
    inputs[0] |= {"height": 180, "width": 140}
    results = model(inputs)
    for result, (height, width) in zip(results, ((180, 140), (64, 100)), strict=True):
        instances = result["instances"]
        assert instances.image_size == (height, width)
        assert 0 < len(instances) <= 7
        assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes", "anchor_scales"}
        assert (instances.pred_classes == 0).all()
        assert ((instances.scores > 0) & (instances.scores < 1)).all()
        boxes = instances.pred_boxes.tensor
        assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()


@pytest.mark.parametrize("with_logits", [True, False])
def test_detections_are_ranked_by_logits(with_logits):
    """Probabilities of logits above 17 are all 1: NMS keeps the box of the highest logit, wherever it stands."""
    model = detector()
    boxes = torch.tensor([[10.0, 10, 30, 30], [11, 10, 31, 30], [50, 50, 80, 80], [10, 11, 30, 31], [51, 50, 81, 80]])
    logits = torch.tensor([18.0, 25, 40, 19, 39])
    candidates = Instances((90, 90), pred_boxes=Boxes(boxes), scores=logits.sigmoid())
    candidates.pred_classes, candidates.anchor_scales = torch.zeros(5, dtype=torch.int64), logits
    assert (candidates.scores == 1).all()
    if with_logits:
        candidates.logits = logits
    found = model.select_detections(candidates)
    assert found.anchor_scales.tolist() == ([40, 25] if with_logits else [18, 40])
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes", "anchor_scales"}


def test_scores_fall_though_the_sigmoid_rounds():
    """And what is equal after rounding stands by logit."""
    model = detector()
    model.max_detections = 5000
    num = 4000
    logits = torch.linspace(14, 20, num)[torch.randperm(num, generator=torch.Generator().manual_seed(0))]
    corner = torch.arange(num)[:, None] * torch.tensor([30.0, 0])
    candidates = Instances((90, 90), pred_boxes=Boxes(torch.cat([corner, corner + 20], dim=1)), logits=logits)
    candidates.scores, candidates.anchor_scales = logits.sigmoid() - 1e-7 * (torch.arange(num) % 2), logits
    candidates.pred_classes = torch.zeros(num, dtype=torch.int64)
    found = model.select_detections(candidates)
    assert len(found) == num and (found.scores[1:] <= found.scores[:-1]).all()
    equal = found.scores[1:] == found.scores[:-1]
    assert equal.sum() > num // 2 and (found.anchor_scales[1:] <= found.anchor_scales[:-1])[equal].all()


def test_images_without_ignore_boxes():
    model = detector()
    inputs = batch()
    for x in inputs:
        del x["ignore_boxes"]
    with EventStorage():
        assert all(torch.isfinite(loss) for loss in model(inputs).values())


@pytest.mark.parametrize("with_regions", [0, 1])
def test_each_image_has_its_own_ignore_boxes(with_regions):
    """Also where another image of the batch has none: that one then has no region to ignore."""
    model, inputs, seen = detector(), batch(), []
    inputs[with_regions]["ignore_boxes"] = Boxes(torch.tensor([[0.0, 0, 64, 64]]))
    del inputs[1 - with_regions]["ignore_boxes"]
    group_loss = model.proposal_generator.group_loss
    match = group_loss.match
    group_loss.match = lambda *arguments: seen.append((arguments, match(*arguments)[0])) or match(*arguments)
    with EventStorage():
        model(inputs)
    (anchors, gt_boxes, _, image_sizes), labels = seen[0]
    without, _, _ = match(anchors, gt_boxes, None, image_sizes)
    assert torch.equal(labels[1 - with_regions], without[1 - with_regions])
    inside = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2:] <= 64).all(dim=1)
    assert (without[with_regions, inside] == 0).any() and not (labels[with_regions, inside] == 0).any()


def test_config_builds_the_same_classes():
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file("configs/quick/demo.yaml")
    model = build_model(cfg)
    assert isinstance(model, RPNDetector)
    assert model.proposal_generator.group_loss.sampler.num_groups == 4
    cfg.MODEL.GS.GROUP_SAMPLING = False
    assert build_model(cfg).proposal_generator.group_loss.sampler.num_groups == 1


@pytest.mark.parametrize(
    ("key", "value", "tolerance"), [("CHANNELS_LAST", True, 1e-4), ("AUTOCAST_DTYPE", "bfloat16", 0.05)]
)
def test_faster_convolutions_predict_the_same(key, value, tolerance):
    def predict(settings):
        cfg = get_cfg()
        add_gs_config(cfg)
        cfg.merge_from_file("configs/quick/demo.yaml")
        cfg.merge_from_list(settings)
        torch.manual_seed(0)
        model = build_model(cfg)
        images = model.preprocess_image(batch())
        with model._autocast():
            return model.proposal_generator.predict(model.backbone(images.tensor)), model

    plain, _ = predict(["MODEL.GS.CHANNELS_LAST", False, "MODEL.GS.AUTOCAST_DTYPE", ""])
    fast, model = predict([f"MODEL.GS.{key}", value])
    for expected, found in zip(plain, fast, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    with EventStorage():
        losses = model(batch())
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(torch.isfinite(x.grad).all() for x in model.parameters() if x.requires_grad)


@pytest.mark.parametrize(
    ("config", "compiled"),
    [
        ("quick/demo", {"TopDown", "SoftmaxRPNHead"}),
        ("quick/two_stage", {"TopDown", "SoftmaxRPNHead"}),
        ("coco/retinanet", {"FPN", "RetinaNetHead"}),
        ("pipelines/centernet", {"TransposedConvs", "CenterNetHead"}),
    ],
)
def test_backbone_and_head_are_compiled_where_the_config_says_so(config, compiled, monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: seen.append((type(self).__name__, options)))
    for value in (False, True):
        opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 18, "MODEL.GS.COMPILE", value]
        build_model(load_config(f"configs/{config}.yaml", [*opts, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]))
        assert bool(seen) == value
    assert {name for name, _ in seen} == compiled and all(options == {"dynamic": True} for _, options in seen)


@pytest.mark.slow
def test_a_compiled_detector_is_the_detector_at_any_size():
    plain, compiled = detector(Convolutions), detector(Convolutions, compile_network=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for sizes in (((90, 70), (64, 100)), ((130, 50),)):
        losses = []
        for model in (plain, compiled):
            torch.manual_seed(1)
            with EventStorage():
                losses.append(model.train()(batch(sizes)))
            model.zero_grad()
            sum(losses[-1].values()).backward()
        for name, loss in losses[0].items():
            torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5)
        for x, y in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for found, expected in zip(compiled.eval()(batch(sizes)), plain.eval()(batch(sizes)), strict=True):
                torch.testing.assert_close(found["instances"].scores, expected["instances"].scores)
