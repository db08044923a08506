"""How well the anchors of a config fit the faces that it is trained on."""

import sys
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from gs_d2 import ops
from gs_d2.analysis.views import ViewAnchors, annotated_records, blank_image

HEIGHTS = (8, 16, 32, 64, 128, 256, 512)  # pixels, between the rows of a table
ASPECT_RATIOS = (0.55, 0.65, 0.85, 1.1)  # width / height

_MAX_PAIRS = 1 << 22  # IoUs in memory at a time: 16 MB


class AnchorFit(NamedTuple):
    """The anchors of each of n faces.

    Attributes:
        widths, heights (float32 ndarray[n]): of the faces, in pixels of the views.
        num_first_pass (int64 ndarray[n]): anchors that are positive because their IoU with the face reaches the upper
            threshold.
        num_positives (int64 ndarray[n]): all positive anchors, with the one that the second pass may add.
        best_ious (float32 ndarray[n]): the highest IoU with any anchor.
    """

    widths: np.ndarray
    heights: np.ndarray
    num_first_pass: np.ndarray
    num_positives: np.ndarray
    best_ious: np.ndarray

    def summary(self, faces: np.ndarray) -> dict[str, float]:
        """Of some of the faces (bool or index ndarray): their number, the fractions without an anchor, and medians.

        Fractions and medians of no face are NaN.
        """
        number = len(self.widths[faces])

        def of(function, values):
            return float(function(values)) if number else float("nan")

        return {
            "faces": number,
            "without_first_pass": of(np.mean, self.num_first_pass[faces] == 0),
            "without_anchor": of(np.mean, self.num_positives[faces] == 0),
            "median_positives": of(np.median, self.num_positives[faces]),
            "median_best_iou": of(np.median, self.best_ious[faces]),
        }


def anchor_fit(anchors: ViewAnchors, dataset: str, num_images: int | None = None, seed: int = 0) -> AnchorFit:
    """Matches the faces of one augmented view of each image to a config's anchors, as training does.

    Args:
        anchors: of the config.
        dataset: name of a registered data set.
        num_images: a random subset of so many; None: all.
        seed: of subset and augmentation; the result is equal for equal arguments.

    Returns:
        AnchorFit: of the faces that training would learn from; those to ignore are left out.

    Raises:
        ValueError: the data set has no annotated faces.
    """
    records, idxs = annotated_records(dataset, num_images, seed)
    parts = []
    for i in tqdm(idxs, desc="matching", unit="image", mininterval=0.1 if sys.stderr.isatty() else 10):
        np.random.seed([seed, i])  # Detectron2's augmentations take from numpy's own state
        view, faces, _ = anchors.augment(blank_image(records[i])[0], records[i])
        parts.append(_fit_of_view(anchors, view.shape[:2], torch.from_numpy(faces)))
    return AnchorFit(*map(np.concatenate, zip(*parts, strict=True)))


def _fit_of_view(anchors, image_size, faces) -> AnchorFit:
    boxes, matcher = anchors.anchors(image_size), anchors.rpn.group_loss.matcher
    first = ops.two_pass_match(faces, boxes, low=matcher.low, high=matcher.high, second_pass="none")
    step = max(1, _MAX_PAIRS // len(boxes))
    best = [ops.box_iou(part, boxes).max(dim=1).values for part in faces.split(step) if len(part)]
    sides = (faces[:, 2:] - faces[:, :2]).numpy()
    return AnchorFit(
        sides[:, 0],
        sides[:, 1],
        _positives_of_faces(first, len(faces)),
        _positives_of_faces(matcher.match(faces, boxes), len(faces)),
        torch.cat([*best, torch.empty(0)]).numpy(),
    )


def _positives_of_faces(match: ops.TwoPassMatch, num_faces: int) -> np.ndarray:
    return torch.bincount(match.matched_idxs[match.match_labels == 1], minlength=num_faces).numpy()
