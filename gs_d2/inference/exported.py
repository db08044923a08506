"""Exported files, and whether they find the faces of the model that they were made of."""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from gs_d2.inference.export import INPUT, OUTPUTS, ExportableDetector
from gs_d2.modeling.nms import top_nms

BOX_TOLERANCE, SCORE_TOLERANCE = 1e-2, 1e-4  # pixels, probability


def load_exported(path: str | os.PathLike) -> Callable:
    """A file (.onnx, else TorchScript) as a function of an array [1, 3, H, W] that gives boxes and scores."""
    path = str(path)
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: session.run(list(OUTPUTS), {INPUT: image})
    module = torch.jit.load(path)
    return torch.no_grad()(lambda image: [output.numpy() for output in module(torch.from_numpy(image))])


class Comparison(NamedTuple):
    """Of the faces that a file and its model find on some images.

    Attributes:
        num_faces: that the model finds.
        box_error, score_error: the largest difference of faces that both find, in pixels and probability.
        unlike: a line for each face that only one of them finds.
    """

    num_faces: int
    box_error: float
    score_error: float
    unlike: list[str]


def compare(run: Callable, graph: ExportableDetector, images: list[np.ndarray]) -> Comparison:
    """
    There is no allowance for near ties (an overlap that is the NMS threshold up to rounding): the faces concerned are
    unlike, and the reader decides.

    Args:
        run: of :func:`load_exported`.
        graph: what was exported.
        images: arrays [1, 3, H, W], of the exported dtype.
    """
    detector, num_faces, unlike, errors = graph.detector, 0, [], torch.zeros(2)
    for image in images:
        boxes, scores = (torch.from_numpy(x) for x in run(image))
        if not graph.with_nms:
            kept = top_nms(boxes, scores, detector.nms_thresh, detector.max_detections)
            boxes, scores = boxes[kept], scores[kept]
        instances = detector([{"image": torch.from_numpy(image[0])}])[0]["instances"]
        expected = torch.cat([instances.pred_boxes.tensor, instances.scores[:, None]], dim=1)
        pairs = matched(found := torch.cat([boxes, scores[:, None]], dim=1), expected)
        num_faces += len(expected)
        if len(pairs):
            distances = (found[pairs[:, 0]] - expected[pairs[:, 1]]).abs()
            errors = errors.maximum(torch.stack([distances[:, :4].max(), distances[:, 4].max()]))
        for who, faces, of_pairs in (("the file", found, pairs[:, 0]), ("the model", expected, pairs[:, 1])):
            alone = torch.ones(len(faces), dtype=torch.bool).index_fill(0, of_pairs, False)
            size = f"{image.shape[3]} x {image.shape[2]}"
            unlike += [f"{size}, only {who}: box {face[:4]}, score {face[4]:.6f}" for face in faces[alone].tolist()]
    return Comparison(num_faces, *errors.tolist(), unlike)


def matched(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Rows (i, j), int64 [n, 2], of faces (x1, y1, x2, y2, score) that agree, in any order; each i and j once.

    Found face i and expected face j are each other's nearest, and within BOX_TOLERANCE and SCORE_TOLERANCE.
    """
    if not len(found) or not len(expected):
        return torch.zeros(0, 2, dtype=torch.int64)
    tolerance = torch.tensor([BOX_TOLERANCE] * 4 + [SCORE_TOLERANCE])
    distances = ((found[:, None] - expected) / tolerance).abs().amax(dim=2)
    nearest = distances.argmin(dim=1)
    rows = torch.arange(len(found))
    agree = (distances.argmin(dim=0)[nearest] == rows) & (distances[rows, nearest] <= 1)
    return torch.stack([rows[agree], nearest[agree]], dim=1)
