"""Videos and cameras as RGB images, and videos written; with OpenCV, which is imported when it is needed.

OpenCV reads and writes pictures only: a video that is written has no sound, and no metadata.
"""

import math
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

_MOST_FRAMES = 1e9  # a container that says more does not know
_MOST_RATE = 1000.0  # frames a second; the same
_DEFAULT_RATE = 25.0


def import_cv2():
    """OpenCV.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"videos and webcams need OpenCV ({error}): pip install opencv-python") from error
    return cv2


class Video:
    """A video file, or a camera.

    Attributes:
        rate: frames a second; 25 where the file does not say.
        num_frames: how many the file names, which may be a few too many; None where it does not say.
    """

    def __init__(self, source: str | int):
        """
        Args:
            source: a file, or the number of a camera.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be opened, or OpenCV is not installed.
        """
        cv2 = import_cv2()
        is_file = isinstance(source, str)
        if is_file and not os.path.isfile(source):
            raise FileNotFoundError(f"no such video: {source}")
        self._video = cv2.VideoCapture(source)
        if not self._video.isOpened():
            name = source if is_file else "webcam"
            raise ValueError(f"{name}: cannot be opened as a video: damaged, cut short, or of a kind that OpenCV lacks")
        count = self._video.get(cv2.CAP_PROP_FRAME_COUNT)
        self.num_frames = int(count) if is_file and 0 < count < _MOST_FRAMES else None
        rate = self._video.get(cv2.CAP_PROP_FPS)
        self.rate = rate if math.isfinite(rate) and 0 < rate <= _MOST_RATE else _DEFAULT_RATE

    def __iter__(self) -> Iterator[Image.Image]:
        """The frames, upright, until the file ends or cannot be decoded further."""
        while True:
            success, frame = self._video.read()  # BGR
            if not success:
                return
            yield Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1]))

    def close(self) -> None:
        self._video.release()


class VideoWriter:
    """A video file, which is opened with the first frame."""

    def __init__(self, path: str, rate: float):
        """
        Args:
            path: such as .mp4 or .avi, in a folder that exists.
            rate: frames a second.
        """
        self._cv2, self._path, self._rate, self._writer = import_cv2(), path, rate, None

    def write(self, image: Image.Image) -> None:
        """
        Args:
            image: RGB, of the same size each time.

        Raises:
            ValueError: OpenCV writes no such file. It says nothing where the disk is full (:func:`count_frames`).
        """
        if self._writer is None:
            codec = self._cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = self._cv2.VideoWriter(self._path, codec, self._rate, image.size)
            if not self._writer.isOpened():
                raise ValueError(f"{self._path}: cannot be written as a video; .mp4 and .avi can")
        self._writer.write(as_bgr(image))

    def close(self) -> None:
        """The file is whole up to here."""
        if self._writer is not None:
            self._writer.release()


def as_bgr(image: Image.Image) -> np.ndarray:
    """An RGB image as OpenCV has it: uint8 [H, W, 3], BGR."""
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def count_frames(path: str) -> int | None:
    """How many frames a video that was written has; None where its format does not say."""
    cv2 = import_cv2()
    video = cv2.VideoCapture(path)
    try:
        count = video.get(cv2.CAP_PROP_FRAME_COUNT) if video.isOpened() else 0
    finally:
        video.release()
    return int(count) if 0 <= count < _MOST_FRAMES else None
