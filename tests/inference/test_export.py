"""Exported graphs give the model's own detections, at sizes other than the traced one and for every anchor layout."""

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from small_detector import TRANSFORM, Blocks, build_two_stage, image
from test_pyramid import pyramid
from torch import nn

from gs_d2.inference.export import ExportableDetector, to_exported_program, to_onnx, to_torchscript
from gs_d2.modeling import (
    DilatedRPNHead,
    GroupSampler,
    GroupSamplingRPN,
    RPNDetector,
    ScaleStrideAnchorGenerator,
    SoftmaxRPNHead,
    TwoPassMatcher,
)
from gs_d2.modeling.backbone import TopDown
from gs_d2.modeling.criterion import GroupCriterion
from gs_d2.modeling.group_loss import GroupLoss

CHANNELS = 8
SIZES = [(64, 64), (97, 131), (33, 257), (203, 150), (5, 7)]  # the example of the graph is 77 x 109 and larger


class Maps(Backbone):
    """res2 and res3, of strides 4 and 8."""

    def __init__(self):
        super().__init__()
        self.res2 = nn.Conv2d(3, CHANNELS, 7, stride=4, padding=3)
        self.res3 = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)

    def output_shape(self):
        return {"res2": ShapeSpec(channels=CHANNELS, stride=4), "res3": ShapeSpec(channels=CHANNELS, stride=8)}

    def forward(self, x):
        x = self.res2(x).relu()
        return {"res2": x, "res3": self.res3(x).relu()}


class Unpadded(Blocks):
    size_divisibility = 0


# (sizes, anchor strides, head) on the maps of a small network; one size on each of two maps is FPN's layout.
LAYOUTS = {
    "fpn": ([[16], [32]], None, SoftmaxRPNHead),
    "finest": ([[16, 32, 64]], None, SoftmaxRPNHead),
    "stride": ([[16, 32, 64]], [[4, 8, 16]], SoftmaxRPNHead),
    "coarse": ([[32, 64]], [[64, 128]], SoftmaxRPNHead),  # no anchors at all in the smallest images
    "dilated": ([[16, 32, 64]], [[4, 4, 8]], DilatedRPNHead),
}


def build(layout, topk=400, score_thresh=0.3, backbone=None, **detector):
    sizes, strides, head = LAYOUTS[layout]
    torch.manual_seed(0)
    backbone = backbone or TopDown(Maps(), ["res2", "res3"], CHANNELS)
    channels = {"in_channels": CHANNELS}
    counts = {"num_anchors": len(sizes[0])}
    if head is DilatedRPNHead:
        counts = {"num_scales": len(sizes[0]), "anchors_per_scale": 1}
    scales = [size for sizes_of_map in sizes for size in sizes_of_map]
    rpn = GroupSamplingRPN(
        in_features=["p2", "p3"][: len(sizes)],
        head=head(**channels, **counts),
        anchor_generator=ScaleStrideAnchorGenerator(
            sizes=sizes, aspect_ratios=[[1.0]], feature_strides=[4, 8][: len(sizes)], anchor_strides=strides
        ),
        anchor_matcher=TwoPassMatcher([0.4, 0.6]),
        sampler=GroupSampler(len(scales), 64),
        criterion=GroupCriterion(TRANSFORM),
        group_scales=scales,
        box2box_transform=TRANSFORM,
        pre_nms_topk=(500, topk),
        post_nms_topk=(50, 500),
        score_thresh_test=score_thresh,
    )
    for name, parameter in rpn.rpn_head.named_parameters():
        if name.endswith("weight") and ("logits" in name or "deltas" in name):
            nn.init.normal_(parameter, std=0.5 if "logits" in name else 0.02)
    mean_and_std = {"pixel_mean": (120.0, 110.0, 100.0), "pixel_std": (60.0, 60.0, 60.0)}
    arguments = {"max_detections": 60, "nms_thresh": 0.5, **mean_and_std, **detector}
    return RPNDetector(backbone=backbone, proposal_generator=rpn, **arguments).eval()


def expected(model, inputs, with_nms=True):
    (candidates,) = model.predict_candidates([inputs])
    found = model.select_detections(candidates) if with_nms else candidates
    return found.pred_boxes.tensor, found.scores


def assert_equal(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def run_onnx(program, tmp_path):
    program.save(str(tmp_path / "model.onnx"), external_data=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_outputs()] == ["boxes", "scores"]
    return lambda pixels: [torch.from_numpy(x) for x in session.run(None, {"image": pixels.numpy()})]


def assert_close(found, wanted, size):
    """In the same order, which the seeds are such that rounding does not change."""
    (boxes, scores), (wanted_boxes, wanted_scores) = found, wanted
    assert boxes.shape == wanted_boxes.shape and scores.shape == wanted_scores.shape, size
    assert boxes.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(boxes, wanted_boxes, rtol=0, atol=1e-2)
    torch.testing.assert_close(scores, wanted_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_nms", [True, False])
def test_torchscript_at_other_sizes(layout, with_nms):
    model = build(layout)
    graph = ExportableDetector(model, with_nms)
    script = to_torchscript(graph)
    counts = []
    for size in SIZES:
        inputs = image(*size)
        wanted = expected(model, inputs, with_nms)
        assert_equal(graph(inputs["image"][None]), wanted)
        assert_equal(script(inputs["image"][None]), wanted)
        counts.append(len(wanted[0]))
    assert max(counts) == {True: 60, False: 400}[with_nms] or layout == "coarse"  # both limits are met
    assert (min(counts) == 0) == (layout == "coarse")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_onnx_at_other_sizes(layout, tmp_path):
    model = build(layout)
    run = run_onnx(to_onnx(ExportableDetector(model)), tmp_path)
    for size in SIZES:
        inputs = image(*size)
        assert_close(run(inputs["image"][None]), expected(model, inputs), size)


def test_onnx_without_nms_and_with_float_pixels(tmp_path):
    model = build("stride")
    run = run_onnx(to_onnx(ExportableDetector(model, with_nms=False), torch.float32), tmp_path)
    for size in SIZES:
        inputs = image(*size)
        assert_close(run(inputs["image"][None].float()), expected(model, inputs, with_nms=False), size)


@pytest.mark.parametrize("layout", ["fpn", "dilated"])
def test_exported_program_at_other_sizes(layout):
    model = build(layout)
    run = to_exported_program(ExportableDetector(model)).module()
    for size in SIZES[:-1]:
        inputs = image(*size)
        assert_equal(run(inputs["image"][None]), expected(model, inputs))
    with pytest.raises((AssertionError, RuntimeError)):  # not above size_divisibility: refused, not wrong
        run(image(*SIZES[-1])["image"][None])


def test_a_backbone_that_does_not_pad(tmp_path):
    model = build("finest", backbone=Unpadded())
    run = run_onnx(to_onnx(ExportableDetector(model)), tmp_path)
    for size in SIZES[:-1]:
        inputs = image(*size)
        assert_close(run(inputs["image"][None]), expected(model, inputs), size)
    with pytest.raises(ValueError, match="export to ONNX or TorchScript instead"):
        to_exported_program(ExportableDetector(model))


def test_no_face(tmp_path):
    model = build("finest", score_thresh=1 - 1e-9)
    graph = ExportableDetector(model)
    for run in (run_onnx(to_onnx(graph), tmp_path), to_torchscript(graph), to_exported_program(graph).module()):
        boxes, scores = run(image(97, 131)["image"][None])
        assert boxes.shape == (0, 4) and scores.shape == (0,)


def test_equal_scores_keep_the_order_of_the_anchors(tmp_path):
    """All anchors of a flat image score alike: which boxes remain after NMS depends on the order alone."""
    model = build("stride", topk=10000, max_detections=10000)
    for name, parameter in model.proposal_generator.rpn_head.named_parameters():
        if not name.startswith("conv"):
            nn.init.zeros_(parameter)
    run = run_onnx(to_onnx(ExportableDetector(model)), tmp_path)
    inputs = image(97, 131)
    boxes, scores = expected(model, inputs)
    assert len(boxes) > 100 and len(scores.unique()) == 1
    assert_close(run(inputs["image"][None]), (boxes, scores), (97, 131))


def test_what_cannot_be_exported():
    with pytest.raises(ValueError, match=r"GroupedFastRCNN cannot be exported.*MODEL\.META_ARCHITECTURE RPNDetector"):
        ExportableDetector(build_two_stage())
    with pytest.raises(ValueError, match=r"a single scale: set TEST\.GS\.PYRAMID False"):
        ExportableDetector(pyramid())


def test_the_files_shapes_are_named(tmp_path):
    program = to_onnx(ExportableDetector(build("finest")))
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (pixels,), outputs = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("image", "tensor(uint8)", [1, 3, "height", "width"])
    assert [x.shape for x in outputs] == [["faces", 4], ["faces"]]
    assert session.run(None, {"image": np.zeros((1, 3, 40, 50), np.uint8)})[0].shape[1] == 4
