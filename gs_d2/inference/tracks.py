"""Boxes of a video's frames, linked over time, so that a face that is missed in some frames stays covered in them."""

from collections import deque

import numpy as np
import torch

from gs_d2.ops import box_iou

_MIN_IOU = 0.2  # of a face's boxes before and after a gap, in which it moves


class GaplessBoxes:
    """Adds the boxes that are missing between a face's detections, to frames that arrive one by one.

    A box continues the one of an earlier frame that it overlaps most (IoU of at least 0.2; the best pairs first).

    - In a gap of at most `max_gap` frames, the boxes lie on the straight line between the two ends.
    - In up to `max_gap` frames before a face is first found, and after it was last found, its box stays where it is.

    A frame is held back until `max_gap` later ones are known. No more frames than these are in memory.

    >>> gapless = GaplessBoxes(max_gap=1)
    >>> frames = [("a", [[0, 0, 10, 10]]), ("b", []), ("c", [[2, 0, 12, 10]])]
    >>> done = [pair for name, boxes in frames for pair in gapless.push(name, boxes)] + gapless.finish()
    >>> [(name, boxes.tolist()) for name, boxes in done][1]
    ('b', [[1.0, 0.0, 11.0, 10.0]])
    """

    def __init__(self, max_gap: int):
        """
        Args:
            max_gap: at least 0; 0 returns every frame at once with its own boxes.
        """
        if max_gap < 0:
            raise ValueError(f"max_gap must be at least 0, got {max_gap}")
        self._max_gap = max_gap
        self._waiting = deque()  # (frame, {face: box})
        self._last = {}  # face -> (number of the frame that it was last found in, box)
        self._num_frames = 0
        self._num_faces = 0

    def push(self, frame, boxes) -> list:
        """Takes the next frame.

        Args:
            frame: anything, such as an image; it is handed back as it is.
            boxes (array [n, 4]): XYXY, finite, of the faces found in it.

        Returns:
            The frames that are complete now, in order: pairs of a frame and its boxes (float64 [m, 4]). These are the
            boxes found and those added, in no order.
        """
        boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
        now = self._num_frames
        self._last = {face: end for face, end in self._last.items() if now - end[0] <= self._max_gap + 1}
        self._waiting.append((frame, {}))
        linked = self._link(boxes)
        for face, box in zip(linked, boxes, strict=True):
            self._found(face, now, box)
        for face, (then, box) in self._last.items():
            if then < now <= then + self._max_gap:
                self._boxes_at(now)[face] = box  # until it is found again
        self._num_frames += 1
        return [self._next()] if len(self._waiting) > self._max_gap else []

    def finish(self) -> list:
        """The frames that are left, as :meth:`push` returns them, after the last one."""
        return [self._next() for _ in range(len(self._waiting))]

    def _link(self, boxes: np.ndarray) -> list[int]:
        """The face of each box, a new one where it continues none."""
        faces = list(self._last)
        linked = [-1] * len(boxes)
        if faces and len(boxes):
            ends = np.stack([self._last[face][1] for face in faces])
            iou = box_iou(torch.from_numpy(ends).float(), torch.from_numpy(boxes).float()).numpy()
            for _ in range(min(iou.shape)):
                row, column = np.unravel_index(iou.argmax(), iou.shape)
                if iou[row, column] < _MIN_IOU:
                    break
                linked[column] = faces[row]
                iou[row], iou[:, column] = -1, -1
        for i, face in enumerate(linked):
            if face < 0:
                linked[i] = self._num_faces
                self._num_faces += 1
        return linked

    def _found(self, face: int, now: int, box: np.ndarray) -> None:
        then, before = self._last.get(face, (now - len(self._waiting), box))  # a new one: in all frames that wait
        for i in range(then + 1, now):
            self._boxes_at(i)[face] = before + (box - before) * ((i - then) / (now - then))
        self._boxes_at(now)[face] = box
        self._last[face] = now, box

    def _boxes_at(self, i: int) -> dict:
        return self._waiting[i - self._num_frames - 1 + len(self._waiting)][1]

    def _next(self) -> tuple:
        frame, boxes = self._waiting.popleft()
        return frame, np.stack(list(boxes.values())) if boxes else np.zeros((0, 4))
