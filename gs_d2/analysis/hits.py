"""Which faces a detector found and which of its detections are right."""

import numpy as np
import torch

from gs_d2 import ops


def match_detections(gt_boxes: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """On one image, gives each detection in turn the nearest face that is still free, if their IoU is at least 0.5.

    Args:
        gt_boxes: [n, 4], XYXY.
        boxes: [m, 4], by falling score.

    Returns:
        found, hits (bool [n], [m]): which faces and which detections have a partner.
    """
    found, hits = np.zeros(len(gt_boxes), bool), np.zeros(len(boxes), bool)
    ious = ops.box_iou(torch.from_numpy(np.float32(boxes)), torch.from_numpy(np.float32(gt_boxes))).numpy()
    for i, row in enumerate(ious):
        row = np.where(found, 0, row)
        if len(row) and row.max() >= 0.5:
            found[row.argmax()] = hits[i] = True
    return found, hits


def why_none_is_shown(detections: dict[str, np.ndarray], image_ids: list[str], lowest_score: float) -> str | None:
    """Why none of some images has a detection of at least a score, in words; None if one has.

    Args:
        detections: image id -> [n, 5], the score in the last column.
        image_ids: of the images, at least one.
    """
    rows_of = [detections[image_id] for image_id in image_ids if image_id in detections]
    if not rows_of:
        return f"none of the {len(image_ids)} images has predictions; names like {image_ids[0]} are needed"
    scores = np.concatenate(rows_of)[:, 4]
    if not len(scores):
        return f"the predictions of the {len(image_ids)} images are empty"
    if scores.max() < lowest_score:
        return f"no score reaches {lowest_score:g}, the highest is {scores.max():g}; lower --confidence-threshold"
    return None
