"""Backbones of timm compute what timm's own networks do, and what is frozen, folded, loaded or refused."""

import logging
import pickle

import pytest
import timm
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import gs_d2.modeling  # noqa: F401
from gs_d2.checkpoint import Checkpointer
from gs_d2.config import load_config
from gs_d2.modeling import TimmBackbone
from gs_d2.modeling.timm_backbone import SamePaddedConv2d

FAMILIES = {  # channels at strides 4, 8, 16 and 32
    "mobilenetv2_100": [24, 32, 96, 320],
    "tf_efficientnet_lite0": [24, 40, 112, 320],
    "mobilenetv3_small_050": [8, 16, 24, 288],
    "resnet18": [64, 128, 256, 512],
    "regnetx_002": [24, 56, 152, 368],
    "convnext_atto": [40, 80, 160, 320],
}
MAPS = ["stride4", "stride8", "stride16", "stride32"]
IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
NORMS = nn.modules.batchnorm._BatchNorm


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """timm must not fetch anything."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def whole_net(name, seed=0, **options):
    """timm's network with its classifier, and a BatchNorm of which every value matters."""
    torch.manual_seed(seed)
    net = timm.create_model(name, pretrained=False, **options).eval()
    for module in net.modules():
        if isinstance(module, NORMS):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net


def save(net, path):
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    """A file of EfficientNet-Lite0 with its classifier."""
    return save(whole_net("tf_efficientnet_lite0"), tmp_path_factory.mktemp("lite0") / "lite0.pth")


@torch.no_grad()
def maps_by_timm(net, image):
    """The last map of each stride, without timm's networks of maps."""
    maps = net.forward_intermediates(image, intermediates_only=True)
    return {f"stride{image.shape[-1] // x.shape[-1]}": x for x in maps}


def assert_same_maps(found, expected, tolerance=1e-4):
    for name, x in found.items():
        assert x.shape == expected[name].shape
        assert (x - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_timm_does(tmp_path, name):
    whole = whole_net(name)
    backbone = TimmBackbone(name, MAPS, weights=save(whole, tmp_path / "w.pth")).train()
    shapes = backbone.output_shape()
    assert list(shapes) == MAPS and [shapes[key].channels for key in MAPS] == FAMILIES[name]
    assert [shapes[key].stride for key in MAPS] == [4, 8, 16, 32] and backbone.size_divisibility == 32
    with torch.no_grad():
        maps = backbone(IMAGE)  # statistics are fixed, so training computes the same
    assert_same_maps(maps, maps_by_timm(whole, IMAGE))
    bare = timm.create_model(name, features_only=True, out_indices=tuple(range(len(whole.feature_info)))[-4:])
    of_norms = sum(module.num_features for module in bare.modules() if isinstance(module, NORMS))
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in bare.parameters()) - of_norms
    assert not any(isinstance(module, NORMS) for module in backbone.modules())


def test_centerfaces_backbone_has_as_many_parameters_as_published():
    assert sum(p.numel() for p in TimmBackbone("mobilenetv2_100", MAPS).parameters()) == 1_795_936


@pytest.mark.parametrize("bn", ["folded", "frozen", "trained"])
def test_every_kind_of_batchnorm_computes_the_same_at_test(lite0, bn):
    backbone = TimmBackbone("tf_efficientnet_lite0", MAPS, weights=lite0, bn=bn)
    expected = maps_by_timm(whole_net("tf_efficientnet_lite0"), IMAGE)
    with torch.no_grad():
        assert_same_maps(backbone.eval()(IMAGE), expected)
        maps = backbone.train()(IMAGE)
    if bn == "trained":
        assert (maps["stride8"] - expected["stride8"]).abs().max() > 0.1 * expected["stride8"].abs().max()
    else:
        assert_same_maps(maps, expected)


def part_of(name):
    """conv_stem, bn1 or blocks.<n>."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "blocks" else 1])


def trained_parts(backbone):
    return {part_of(name) for name, x in backbone.net.named_parameters() if x.requires_grad}


@pytest.mark.parametrize(
    ("freeze_at", "bn"),
    [*((n, "folded") for n in range(6)), (0, "frozen"), (2, "frozen"), (0, "trained"), (2, "trained")],
)
def test_stages_are_frozen_by_stride(freeze_at, bn):
    parts = ["conv_stem", *(f"blocks.{n}" for n in range(7))]
    frozen = {*parts[: {0: 0, 1: 2, 2: 3, 3: 4, 4: 6, 5: 8}[freeze_at]]}
    backbone = TimmBackbone("mobilenetv2_100", MAPS, bn=bn, freeze_at=freeze_at).train()
    assert trained_parts(backbone) - {"bn1"} == {*parts} - frozen
    if bn != "frozen":  # biases and BatchNorm too
        fixed = {part_of(name) for name, x in backbone.net.named_parameters() if not x.requires_grad}
        assert fixed - {"bn1"} == frozen
    statistics = {name: x.clone() for name, x in backbone.net.named_buffers()}
    maps = backbone(IMAGE)
    # What is frozen is no part of autograd's graph, so nothing of it is kept or computed backward.
    assert [maps[f"stride{2**n}"].requires_grad for n in range(2, 6)] == [n > freeze_at for n in range(2, 6)]
    if freeze_at < 5:
        sum(x.mean() for x in maps.values()).backward()
    for parameter in backbone.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    moved = {part_of(name) for name, x in backbone.net.named_buffers() if not torch.equal(x, statistics[name])}
    assert moved == ({*parts, "bn1"} - frozen - {"conv_stem", "bn1" if freeze_at else ""} if bn == "trained" else set())


def test_stages_of_a_resnet_are_frozen_as_in_detectron2():
    for freeze_at, layers in ((1, {"conv1", "bn1"}), (2, {"conv1", "bn1", "layer1"}), (3, {"layer2"})):
        backbone = TimmBackbone("resnet18", MAPS, bn="trained", freeze_at=freeze_at)
        fixed = {name.split(".")[0] for name, x in backbone.net.named_parameters() if not x.requires_grad}
        assert layers <= fixed and fixed.isdisjoint({"layer3", "layer4"})


@pytest.mark.parametrize(
    ("name", "parts"),
    [("mobilenetv2_100", "conv_stem blocks.0 blocks.1 blocks.2"), ("convnext_atto", "stem_0 stem_1 stages_0 stages_1")],
)
def test_freezing_more_than_the_maps_need_freezes_all_of_it_and_adds_nothing(name, parts):
    backbone = TimmBackbone(name, ["stride4", "stride8"], freeze_at=5)
    assert not any(x.requires_grad for x in backbone.parameters())
    assert {part_of(key) for key in backbone.net.state_dict()} == set(parts.split())


def test_a_network_without_such_a_stride_is_not_frozen_up_to_it():
    message = (
        r"convnext_atto has no map of stride 2\*\*1 .* \(MODEL\.BACKBONE\.FREEZE_AT\) must be one of 0, 2, 3, 4, 5"
    )
    with pytest.raises(ValueError, match=message):
        TimmBackbone("convnext_atto", MAPS, freeze_at=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_the_maps_need_is_there_and_trained(name):
    backbone = TimmBackbone(name, ["stride8"], bn="trained")
    assert backbone.size_divisibility == 8
    backbone(IMAGE)["stride8"].mean().backward()
    assert all(x.grad is not None for x in backbone.parameters())


def test_maps_by_stride_and_by_index():
    net = TimmBackbone("mobilenetv2_100", ["index2", "stride16"]).eval()
    assert {name: (s.channels, s.stride) for name, s in net.output_shape().items()} == {
        "index2": (32, 8),
        "stride16": (96, 16),
    }
    for feature in ("stride64", "index7", "res2", "stride8 ", "8"):
        with pytest.raises(ValueError, match=r"no map .* it has index0, .*stride32"):
            TimmBackbone("mobilenetv2_100", [feature])
    with pytest.raises(ValueError, match="at least one map"):
        TimmBackbone("mobilenetv2_100", [])
    dilated = TimmBackbone("mobilenetv2_100", ["stride8", "stride16"], options={"output_stride": 16})
    assert dilated.output_shape()["stride16"].channels == 320  # the last of two


def test_a_network_that_halves_beyond_its_maps_asks_for_larger_multiples():
    opts = ["MODEL.GS.TIMM.NAME", "hrnet_w18_small", "MODEL.FPN.IN_FEATURES", ["stride4", "stride8"]]
    backbone = build_backbone(config(*opts, "MODEL.BACKBONE.FREEZE_AT", 0))
    assert backbone.bottom_up.size_divisibility == backbone.size_divisibility == 32
    backbone.train()
    sum(x.mean() for x in backbone(IMAGE).values()).backward()
    assert all((x.grad is not None) == x.requires_grad for x in backbone.parameters())


def test_maps_with_channels_behind_are_turned():
    tiny = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "strict_img_size": False}
    torch.manual_seed(0)
    maps = TimmBackbone("swin_tiny_patch4_window7_224", MAPS, options=tiny).eval()(IMAGE)
    assert [tuple(x.shape[1:]) for x in maps.values()] == [(12, 16, 24), (24, 8, 12), (48, 4, 6), (96, 2, 3)]
    assert all(x.is_contiguous() for x in maps.values())


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    bias=st.booleans(),
    cells=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_same_padding_is_timms_for_sides_that_the_stride_divides(size, stride, dilation, groups, bias, cells):
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    by_timm = Conv2dSame(2 * groups, 3 * groups, size, stride=stride, dilation=dilation, groups=groups, bias=bias)
    image = torch.randn(1, 2 * groups, *(6 * s * n for s, n in zip(stride, cells, strict=True)))
    ours = SamePaddedConv2d(by_timm)
    assert ours.state_dict().keys() == by_timm.state_dict().keys() and ours.weight is by_timm.weight
    with torch.no_grad():
        assert torch.equal(ours(image), by_timm(image))


@pytest.mark.parametrize("name", ["mobilenetv2_100", "tf_efficientnet_lite0"])
def test_a_graph_of_any_size_can_be_exported(name):
    backbone = TimmBackbone(name, ["stride8"]).eval()
    height, width = (torch.export.Dim(axis, min=2, max=64) for axis in "hw")
    with torch.no_grad():
        exported = torch.export.export(backbone, (IMAGE,), dynamic_shapes=({2: 8 * height, 3: 8 * width},))
        called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert all(name.startswith("aten.") and "sym" not in name for name in called)  # no arithmetic on the size
        for image in (IMAGE, torch.rand(2, 3, 40, 24)):
            torch.testing.assert_close(exported.module()(image), backbone(image))


def test_options_go_to_timm():
    assert any(isinstance(m, nn.ReLU6) for m in TimmBackbone("mobilenetv2_100", MAPS).modules())
    net = TimmBackbone("mobilenetv2_100", MAPS, options={"act_layer": "relu"})
    kinds = {type(module) for module in net.modules()}
    assert nn.ReLU in kinds and nn.ReLU6 not in kinds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mobilnetv2_100"}, r"no model 'mobilnetv2_100' \(MODEL\.GS\.TIMM\.NAME\); close: mobilenetv2_100"),
        ({"name": ""}, r"no model ''"),
        ({"name": "hf-hub:timm/resnet18"}, "no model 'hf-hub:timm/resnet18'"),
        ({"options": {"pretrained": True}}, "must not set pretrained"),
        ({"options": {"checkpoint_path": "x"}}, "must not set checkpoint_path"),
        ({"options": {"no_such_option": 3}}, "timm cannot create resnet18 with .*no_such_option"),
        ({"bn": "fused"}, r"MODEL\.GS\.TIMM\.BN\) must be one of folded, frozen, trained, got 'fused'"),
        ({"name": "vit_tiny_patch16_224", "out_features": ["stride16"]}, "fails on images of 48 x 48: .*224"),
    ],
)
def test_what_timm_cannot_do_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**{"name": "resnet18", "out_features": ["stride8"]} | arguments)


# Weights


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
@pytest.mark.parametrize("kind", ["whole.pth", "whole.safetensors", "bare.pth", "own.pth", "frozen.pth"])
def test_files_by_timms_names_are_read(tmp_path, name, kind):
    """Of the whole network, of timm's network of maps, and of ours."""
    whole, path = whole_net(name), tmp_path / kind
    expected = maps_by_timm(whole, IMAGE)
    source = save(whole, tmp_path / "source.pth")
    if kind == "whole.safetensors":
        save_file(whole.state_dict(), path)
    elif kind == "bare.pth":
        bare = timm.create_model(
            name, features_only=True, pretrained_cfg_overlay={"state_dict": whole.state_dict()}, pretrained=True
        )
        save(bare, path)
    else:
        bn = "folded" if kind == "own.pth" else "frozen"
        save(whole if kind == "whole.pth" else TimmBackbone(name, MAPS, weights=source, bn=bn).net, path)
    with torch.no_grad():
        assert_same_maps(TimmBackbone(name, MAPS, weights=str(path)).eval()(IMAGE), expected)


def test_a_folded_file_of_a_network_that_folds_in_part_is_told_from_its_original(tmp_path):
    whole = whole_net("densenet121", growth_rate=4)
    options = {"growth_rate": 4}
    first = TimmBackbone("densenet121", ["stride8"], options=options, weights=save(whole, tmp_path / "a.pth"))
    assert any(isinstance(module, NORMS) for module in first.modules())
    again = TimmBackbone("densenet121", ["stride8"], options=options, weights=save(first.net, tmp_path / "b.pth"))
    with torch.no_grad():
        maps = first.eval()(IMAGE)
        assert torch.equal(again.eval()(IMAGE)["stride8"], maps["stride8"])
    assert_same_maps(maps, maps_by_timm(whole, IMAGE))


def test_a_deeper_file_serves_fewer_maps(tmp_path, lite0):
    folded = save(TimmBackbone("tf_efficientnet_lite0", MAPS, weights=lite0).net, tmp_path / "folded.pth")
    expected = maps_by_timm(whole_net("tf_efficientnet_lite0"), IMAGE)
    for path in (lite0, folded):
        with torch.no_grad():
            assert_same_maps(TimmBackbone("tf_efficientnet_lite0", ["stride8"], weights=path).eval()(IMAGE), expected)


@pytest.mark.parametrize(
    ("change", "bn", "message"),
    [
        ({"conv_stem.weight": None}, "folded", r"w\.pth \(MODEL\.GS\.TIMM\.WEIGHTS\) .* 1 missing: conv_stem\.weight"),
        ({"blocks.0.0.bn2.running_mean": None}, "frozen", r"1 missing: blocks\.0\.0\.bn2\.running_mean"),
        ({"conv_stem.bias": torch.zeros(32)}, "folded", r"1 unexpected: conv_stem\.bias"),
        ({"blocks.9.weight": torch.zeros(32)}, "trained", r"1 unexpected: blocks\.9\.weight"),
        ({"bn1.bias": torch.zeros(3)}, "folded", r"1 of another shape: bn1\.bias \(3,\) \(the network's is \(32,\)\)"),
        ({"bn1.num_batches_tracked": None, "classifier.bias": None}, "folded", None),
    ],
)
def test_a_file_must_fit(tmp_path, lite0, change, bn, message):
    state = torch.load(lite0) | change
    path = str(tmp_path / "w.pth")
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    if message is None:
        TimmBackbone("tf_efficientnet_lite0", MAPS, weights=path, bn=bn)
    else:
        with pytest.raises(ValueError, match=message):
            TimmBackbone("tf_efficientnet_lite0", MAPS, weights=path, bn=bn)


def test_a_folded_file_needs_bn_folded(tmp_path):
    path = save(TimmBackbone("mobilenetv2_100", MAPS).net, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"missing: bn1\.weight.*If the file's BatchNorm is folded, set .*TIMM\.BN folded"
    ):
        TimmBackbone("mobilenetv2_100", MAPS, weights=path, bn="frozen")


def test_a_file_that_could_run_code_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"model": print}))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        TimmBackbone("mobilenetv2_100", MAPS, weights=str(path))


# In a detector


def config(*opts):
    settings = [
        "MODEL.BACKBONE.NAME", "build_timm_topdown_backbone", "MODEL.GS.TIMM.NAME", "mobilenetv2_100",
        "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.FPN.IN_FEATURES", ["stride8", "stride16"], "MODEL.FPN.OUT_CHANNELS", 32,
        "MODEL.RPN.IN_FEATURES", ["p3"], "MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0],
    ]  # fmt: skip
    return load_config("configs/quick/Base-Quick.yaml", [*settings, *opts])


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_the_builder_reads_its_keys(tmp_path):
    whole = whole_net("mobilenetv2_100", act_layer="relu")
    opts = ["MODEL.GS.TIMM.OPTIONS", ["act_layer", "relu"], "MODEL.GS.TIMM.BN", "frozen"]
    opts += ["MODEL.GS.TIMM.WEIGHTS", save(whole, tmp_path / "w.pth"), "MODEL.FPN.NORM", "GN"]
    backbone = build_backbone(config(*opts)).eval()
    shapes = backbone.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {"p3": (32, 8), "p4": (32, 16)}
    assert backbone.size_divisibility == 16
    assert "blocks.1" not in trained_parts(backbone.bottom_up) and "blocks.2" in trained_parts(backbone.bottom_up)
    assert isinstance(backbone.fpn_lateral3.norm, nn.GroupNorm)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()) == 39
    with torch.no_grad():
        assert_same_maps(backbone.bottom_up(IMAGE), maps_by_timm(whole, IMAGE))
        assert backbone(IMAGE)["p3"].shape == (2, 32, 8, 12)


def test_options_come_in_pairs():
    with pytest.raises(ValueError, match=r"OPTIONS must be names and values in turn, got \['act_layer'\]"):
        build_backbone(config("MODEL.GS.TIMM.OPTIONS", ["act_layer"]))


def test_a_checkpoint_of_the_detector_replaces_the_file(tmp_path, caplog):
    """The file of the backbone is needed for no more than the start of a training."""
    path = tmp_path / "w.pth"
    cfg = config("MODEL.GS.TIMM.WEIGHTS", save(whole_net("mobilenetv2_100"), path))
    first = build_model(cfg)
    Checkpointer(first, str(tmp_path)).save("detector")
    path.unlink()
    with caplog.at_level(logging.WARNING):
        second = build_model(cfg)
    assert "w.pth (MODEL.GS.TIMM.WEIGHTS) is not there" in caplog.text
    inputs = [{"image": 255 * IMAGE[0], "instances": faces(), "height": 64, "width": 96}]
    second.eval()(inputs)
    with pytest.raises(FileNotFoundError, match=r"no such weights: .*w\.pth \(MODEL\.GS\.TIMM\.WEIGHTS\)"):
        second.train()(inputs)
    Checkpointer(second, strict=True).load(str(tmp_path / "detector.pth"))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())
    assert torch.equal(*(net.eval()(inputs)[0]["instances"].scores for net in (first, second)))
    losses(second.train(), inputs)
    assert not any("running" in name for name in second.state_dict())


def faces():
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8, 30, 30], [40, 10, 80, 50]]))
    instances.gt_classes = torch.zeros(2, dtype=torch.int64)
    return instances


def losses(model, inputs):
    from detectron2.utils.events import EventStorage

    with EventStorage():
        return model(inputs)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_a_detector_trains_in_any_memory_order_and_precision(channels_last, dtype):
    def built(*opts):
        torch.manual_seed(0)
        return build_model(config(*opts)).train()

    reference = built()
    model = built("MODEL.GS.CHANNELS_LAST", channels_last, "MODEL.GS.AUTOCAST_DTYPE", dtype)
    assert next(model.backbone.bottom_up.parameters()).is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    inputs = [{"image": 255 * IMAGE[0], "instances": faces()}]
    torch.manual_seed(0)
    found = losses(model, inputs)
    torch.manual_seed(0)
    expected = losses(reference, inputs)
    for name in expected:
        torch.testing.assert_close(found[name].float(), expected[name], rtol=0.1 if dtype else 1e-3, atol=0.02)
    sum(found.values()).backward()
    for name, x in model.backbone.bottom_up.named_parameters():
        assert (x.grad is not None) == x.requires_grad, name
        assert x.grad is None or x.grad.isfinite().all()
    assert any(x.requires_grad for x in model.backbone.bottom_up.parameters())
