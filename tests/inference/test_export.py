"""Exported graphs find the model's own faces, at sizes other than the traced one and for every anchor layout.

ONNX takes seconds to export even for a network of three convolutions, so the quick tests share one file; that of the
command line is in tests/tools/test_export_model.py.
"""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from detectron2.modeling import build_model
from small_detector import build, build_two_stage, image
from test_pyramid import pyramid
from torch import nn

from gs_d2.config import load_config
from gs_d2.inference.export import ExportableDetector, to_onnx, to_torchscript

QUICK = Path(__file__).resolve().parents[2] / "configs" / "quick" / "demo.yaml"
SIZES = [(64, 64), (97, 131), (33, 257), (203, 150), (5, 7), (1, 1)]
DETECTIONS, TOPK, THRESHOLD = 60, 400, 0.3

LAYOUTS = {
    "finest": [],
    "fpn": ["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64]], "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4"]],
    "stride": ["MODEL.GS.ANCHOR_STRIDES", [[4, 8, 16, 32]]],
    "dilated": ["MODEL.RPN.HEAD_NAME", "DilatedRPNHead"],
}


def resnet(layout):
    """The demo's ResNet-18 with random weights, and a head whose scores differ from each other."""
    limits = ["MODEL.RPN.POST_NMS_TOPK_TEST", DETECTIONS, "MODEL.RPN.PRE_NMS_TOPK_TEST", TOPK]
    cfg = load_config(QUICK, [*LAYOUTS[layout], *limits, "TEST.GS.SCORE_THRESH", THRESHOLD])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, parameter in model.proposal_generator.rpn_head.named_parameters():
        if name.endswith("weight") and ("logits" in name or "deltas" in name):
            nn.init.normal_(parameter, std=0.3 if "logits" in name else 0.02)
    return model


def small():
    return build(max_detections=DETECTIONS, topk=TOPK, score_thresh=THRESHOLD)


def flat(height, width):
    return {"image": torch.full((3, height, width), 200, dtype=torch.uint8)}


@torch.no_grad()
def expected(model, inputs, with_nms=True):
    (candidates,) = model.predict_candidates([inputs])
    found = model.select_detections(candidates) if with_nms else candidates
    return found.pred_boxes.tensor, found.scores


def assert_same_faces(found, wanted):
    """One to one, in any order: rounding may swap faces whose scores are equal up to it."""
    (boxes, scores), (wanted_boxes, wanted_scores) = found, wanted
    assert boxes.dtype == scores.dtype == torch.float32
    assert boxes.shape == wanted_boxes.shape and scores.shape == wanted_scores.shape
    same = (boxes[:, None] - wanted_boxes).abs().amax(dim=2) <= 1e-2
    same &= (scores[:, None] - wanted_scores).abs() <= 1e-4
    assert (same.sum(dim=0) == 1).all() and (same.sum(dim=1) == 1).all()


def session_of(model: onnx.ModelProto):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_onnx(session, inputs):
    return [torch.from_numpy(x) for x in session.run(["boxes", "scores"], {"image": inputs["image"][None].numpy()})]


@torch.no_grad()
def check_torchscript(model, with_nms, most):
    script, counts = to_torchscript(ExportableDetector(model, with_nms)), []
    for size in SIZES:
        inputs = image(*size)
        wanted = expected(model, inputs, with_nms)
        found = script(inputs["image"][None])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)  # the same arithmetic: also in the same order
        counts.append(len(wanted[0]))
    assert max(counts) >= most > min(counts)


@pytest.fixture(scope="module")
def exported():
    """The file of :func:`small`, which no test changes."""
    return to_onnx(ExportableDetector(small())).model_proto


@pytest.mark.parametrize("with_nms", [True, False])
def test_torchscript_at_other_sizes(with_nms):
    check_torchscript(small(), with_nms, DETECTIONS if with_nms else TOPK)  # both limits are met


def test_onnx_at_other_sizes(exported):
    model, session = small(), session_of(exported)
    for size in SIZES:
        inputs = image(*size)
        assert_same_faces(run_onnx(session, inputs), expected(model, inputs))


def zero_logits(module_or_file):
    if isinstance(module_or_file, nn.Module):
        nn.init.zeros_(module_or_file.proposal_generator.rpn_head.objectness_logits.weight)
        return module_or_file
    file = onnx.ModelProto.FromString(module_or_file.SerializeToString())
    (weight,) = (x for x in file.graph.initializer if x.name.endswith("objectness_logits.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(weight), weight.name))
    return file


def test_equal_scores_keep_the_order_of_the_anchors(exported):
    """Which of them top-k takes and which remain after NMS depends on their order alone."""
    model, inputs = zero_logits(small()), image(97, 131)
    boxes, scores = expected(model, inputs)
    assert len(boxes) == DETECTIONS and len(scores.unique()) == 1
    script = to_torchscript(ExportableDetector(model))
    for found in (run_onnx(session_of(zero_logits(exported)), inputs), script(inputs["image"][None])):
        torch.testing.assert_close(found[0], boxes, rtol=0, atol=1e-2)


def test_the_file_s_shapes_are_named(exported):
    (pixels,), outputs = session_of(exported).get_inputs(), session_of(exported).get_outputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("image", "tensor(uint8)", [1, 3, "height", "width"])
    assert [(x.name, x.shape) for x in outputs] == [("boxes", ["faces", 4]), ("scores", ["faces"])]


def test_what_cannot_be_exported():
    with pytest.raises(ValueError, match=r"GroupedFastRCNN cannot be exported.*MODEL\.META_ARCHITECTURE RPNDetector"):
        ExportableDetector(build_two_stage())
    with pytest.raises(ValueError, match=r"a single scale: set TEST\.GS\.PYRAMID False"):
        ExportableDetector(pyramid())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    model = resnet(layout)
    check_torchscript(model, with_nms=True, most=DETECTIONS)
    check_torchscript(model, with_nms=False, most=3 * DETECTIONS)
    session = session_of(to_onnx(ExportableDetector(model)).model_proto)
    for inputs in [image(*size) for size in SIZES] + [flat(40, 50)]:
        assert_same_faces(run_onnx(session, inputs), expected(model, inputs))


@pytest.mark.slow  # only for its company: a second file takes as long as the first
def test_onnx_without_nms_and_with_float_pixels():
    model = small()
    session = session_of(to_onnx(ExportableDetector(model, with_nms=False), torch.float32).model_proto)
    for size in SIZES:
        inputs = image(*size)
        wanted = expected(model, inputs, with_nms=False)
        assert_same_faces(run_onnx(session, {"image": inputs["image"].float()}), wanted)
