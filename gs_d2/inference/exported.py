"""Loads exported files and compares their faces with those of the original model."""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from gs_d2.inference.export import INPUT, OUTPUTS, ExportableDetector
from gs_d2.modeling.nms import top_nms

BOX_TOLERANCE, SCORE_TOLERANCE = 1e-2, 1e-4  # pixels, probability


def load_exported(path: str | os.PathLike) -> Callable:
    """Loads an exported file: ONNX if the name ends in .onnx, else TorchScript.

    Returns:
        A function that takes an array [1, 3, H, W] of the exported dtype and returns boxes and scores, as arrays.
    """
    path = str(path)
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: session.run(list(OUTPUTS), {INPUT: image})
    module = torch.jit.load(path)
    return torch.no_grad()(lambda image: [output.numpy() for output in module(torch.from_numpy(image))])


class Comparison(NamedTuple):
    """Compares the faces of an exported file and its model on some images.

    Attributes:
        num_faces: number of faces that the model finds.
        box_error, score_error: largest difference for the faces that both find, in pixels and in probability; 0 if
            there are none.
        unlike: one line for each face that only the file or only the model finds.
    """

    num_faces: int
    box_error: float
    score_error: float
    unlike: list[str]


def compare(run: Callable, graph: ExportableDetector, images: list[np.ndarray]) -> Comparison:
    """Compares an exported file with its model.

    Near ties get no tolerance: if an overlap equals the NMS threshold up to rounding, the faces can be in
    :attr:`Comparison.unlike`.

    Args:
        run: a function of :func:`load_exported`.
        graph: the exported graph.
        images: arrays [1, 3, H, W] of the exported dtype.
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
    """Finds pairs of faces that agree. Faces are rows (x1, y1, x2, y2, score).

    Faces agree if each is the other's nearest, within BOX_TOLERANCE and SCORE_TOLERANCE.

    Returns:
        int64 Tensor[n, 2]: pairs (i, j) of found face i and expected face j, by rising i. Each i and j occurs once.
    """
    if not len(found) or not len(expected):
        return torch.zeros(0, 2, dtype=torch.int64)
    tolerance = torch.tensor([BOX_TOLERANCE] * 4 + [SCORE_TOLERANCE])
    distances = ((found[:, None] - expected) / tolerance).abs().amax(dim=2)
    nearest = distances.argmin(dim=1)
    rows = torch.arange(len(found))
    agree = (distances.argmin(dim=0)[nearest] == rows) & (distances[rows, nearest] <= 1)
    return torch.stack([rows[agree], nearest[agree]], dim=1)
