"""Single-stage detectors as graphs with tensors only, for TorchScript and ONNX.

The graph uses the detector's own arithmetic (:meth:`RPNDetector.normalize`, its backbone,
:meth:`GroupSamplingRPN.predict` and :func:`gs_d2.modeling.decoding.best_boxes`). This module adds only the padding to
whole feature maps and the order of NMS and limit.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from gs_d2.inference.pyramid import PyramidDetector
from gs_d2.modeling import RPNDetector

INPUT = "image"
OUTPUTS = ("boxes", "scores")
OPSET = 20
_EXAMPLE_CELLS = (5, 7)  # of the coarsest grid: unlike each other, and not 1, which torch.export takes for a constant


class ExportableDetector(nn.Module):
    """Detects the faces of one image, at one scale and in float32. Tracing and torch.export can record it."""

    def __init__(self, detector: nn.Module, with_nms: bool = True):
        """
        Args:
            detector: an :class:`RPNDetector`. It is set to eval mode.
            with_nms: False ends the graph before NMS.

        Raises:
            ValueError: the detector has two stages, or is an image pyramid.
        """
        super().__init__()
        if isinstance(detector, PyramidDetector):
            raise ValueError(
                "TEST.GS.PYRAMID is True, and an exported graph has a single scale: set TEST.GS.PYRAMID False, and run "
                "the graph on the image at several sizes where faces of all sizes are wanted"
            )
        if type(detector) is not RPNDetector:
            raise ValueError(
                f"{type(detector).__name__} cannot be exported, only single-stage detectors can: use a config with "
                "MODEL.META_ARCHITECTURE RPNDetector"
            )
        self.detector = detector.eval()
        self.with_nms = with_nms

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            image (uint8 or float32 Tensor[1, 3, H, W]): 0..255, any size, channels in the order of INPUT.FORMAT.

        Returns:
            boxes (float32 Tensor[n, 4]): XYXY in pixels of `image`, clipped to it.
            scores (float32 Tensor[n]): face probabilities of at least TEST.GS.SCORE_THRESH, highest first (up to
            rounding).

            With NMS, these are the detections of :class:`RPNDetector`, up to rounding. Without NMS, they are the input
            of its NMS, at most MODEL.RPN.PRE_NMS_TOPK_TEST. n is 0 if there is no face.
        """
        detector, rpn = self.detector, self.detector.proposal_generator
        height, width = image.shape[-2:]
        divisor = detector.size_divisibility
        pixels = detector.normalize(image)
        pixels = F.pad(pixels, (0, (divisor - width % divisor) % divisor, 0, (divisor - height % divisor) % divisor))
        features = detector.backbone(pixels.contiguous(memory_format=detector.memory_format))
        anchors, logits, deltas = rpn.predict(features)
        boxes, logits, _ = rpn.best_boxes(anchors, logits[0], deltas[0], (height, width), rpn.score_thresh)
        if self.with_nms:
            # One NMS over all: top_nms looks at chunks until it has enough, with the same result. By logits, since
            # rounding may swap close probabilities.
            kept = nms(boxes, logits, detector.nms_thresh)[: detector.max_detections]
            boxes, logits = boxes[kept], logits[kept]
        return boxes, logits.sigmoid()

    def example(self, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Returns an example input. Its size lets both formats generalise to other sizes."""
        side = max(self.detector.size_divisibility, 32)
        height, width = (cells * side - 3 for cells in _EXAMPLE_CELLS)
        return torch.zeros(1, 3, height, width, dtype=dtype, device=self.detector.device)


@torch.no_grad()
def to_torchscript(graph: ExportableDetector, dtype: torch.dtype = torch.uint8) -> torch.jit.ScriptModule:
    """Traces the graph, for images of `dtype` (uint8 or float32) and any size. The result needs torchvision's ops."""
    with warnings.catch_warnings():
        # Detectron2 tests for empty tensors, which these never are before the end of the graph.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(graph, graph.example(dtype))


def to_onnx(graph: ExportableDetector, dtype: torch.dtype = torch.uint8):
    """Makes the ONNX model (torch.onnx.ONNXProgram), for images of `dtype` (uint8 or float32) and any size.

    Its input is `image` and its outputs are `boxes` and `scores`, as in :meth:`ExportableDetector.forward`.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    program = torch.onnx.export(
        _program(graph, dtype),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        custom_translation_table={torch.ops.aten.sort.stable: _onnx_stable_sort()},
    )
    inputs, outputs = program.model.graph.inputs, program.model.graph.outputs
    for value, names in ((inputs[0], ("height", "width")), (outputs[0], ("faces",)), (outputs[1], ("faces",))):
        _name_open_sizes(value, names)
    return program


@torch.no_grad()
def _program(graph: ExportableDetector, dtype: torch.dtype) -> torch.export.ExportedProgram:
    open_size = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision's own use of torch
        return torch.export.export(
            graph,
            (graph.example(dtype),),
            dynamic_shapes={INPUT: {2: open_size, 3: open_size}},
            # That the maps of a top-down path fit onto each other follows from the padding, but not for sympy.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _onnx_stable_sort():
    """torch.sort(stable=True) of one dimension, which torch.onnx lacks: TopK of all; the lower index wins ties."""
    from onnxscript import opset20 as op

    def sort(self, stable: bool = True, dim: int = -1, descending: bool = False):
        return op.TopK(self, op.Shape(self), axis=dim, largest=descending, sorted=True)

    return sort


def _name_open_sizes(value, names: tuple[str, ...]):
    names = iter(names)
    value.shape = type(value.shape)([size if isinstance(size, int) else next(names) for size in value.shape])
