"""Which faces a detector found and which of its detections are right, on one image."""

import numpy as np
import torch

from gs_d2 import ops


def match_detections(gt_boxes: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gives each detection in turn the nearest face that is still free, if their IoU is at least 0.5.

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
