"""Regions of FDDB as sets of pixels: rectangles and ellipses, and the image that they are clipped to.

Shape shorthand in this module:
    n: regions of one image, H: rows of pixels of one image
"""

import math
import os
from dataclasses import dataclass

import numpy as np

from gs_d2.formats.fddb import bounding_boxes
from gs_d2.formats.folders import undoubled
from gs_d2.formats.progress import track

_LONGEST_SIDE = 450  # of every image of FDDB
_MAX_RADIUS = 4096  # of absurd detections; far more than any image

# A detection shows that the image ends if three of its sides are this near to those of an annotated ellipse,
# as a fraction of the ellipse's width or height, and the fourth stops that much short of the ellipse.
_SIDE_AGREES = 0.25
_SIDE_STOPS_SHORT = 0.2


@dataclass(frozen=True)
class Spans:
    """Sets of pixels that are one run in each row: region i covers columns left[i, y]..right[i, y] of row y.

    Attributes:
        left, right (ndarray[n, H]): int64, both inclusive; right < left where a row is empty.
    """

    left: np.ndarray
    right: np.ndarray

    @property
    def areas(self) -> np.ndarray:
        return np.maximum(self.right - self.left + 1, 0).sum(axis=1)

    def iou(self, other: "Spans") -> np.ndarray:
        """IoU of pixel counts, float64 (n, n of `other`); 0 where both are empty."""
        intersections = np.zeros((len(self.left), len(other.left)))
        for i in range(len(self.left)):
            left = np.maximum(self.left[i], other.left)
            right = np.minimum(self.right[i], other.right)
            intersections[i] = np.maximum(right - left + 1, 0).sum(axis=1)
        unions = self.areas[:, None] + other.areas - intersections
        return intersections / np.maximum(unions, 1)


def _rounded(values: np.ndarray) -> np.ndarray:
    """To pixels as the official tool: single precision, then the nearest integer, halves to even."""
    return np.rint(np.clip(values, -1e6, 1e6).astype(np.float32)).astype(np.int64)


def rectangle_spans(rectangles: np.ndarray, image_size: tuple[int, int]) -> Spans:
    """Pixels of filled rectangles: both rounded corners are inside.

    Args:
        rectangles (ndarray[n, 4]): `x y w h`.
        image_size: (width, height) to clip to.
    """
    x, y, w, h = np.asarray(rectangles, dtype=np.float64).reshape(-1, 4).T
    x1, x2 = np.sort([_rounded(x), _rounded(x + w)], axis=0)
    y1, y2 = np.sort([_rounded(y), _rounded(y + h)], axis=0)
    width, height = image_size
    rows = np.arange(height)
    inside = (rows >= y1[:, None]) & (rows <= y2[:, None])
    left, right = np.maximum(x1, 0)[:, None], np.minimum(x2, width - 1)[:, None]
    return Spans(np.where(inside, left, 0), np.where(inside, right, -1))


def ellipse_spans(ellipses: np.ndarray, image_size: tuple[int, int]) -> Spans:
    """Pixels of filled ellipses as the official tool's drawing library gives them.

    The radii are cut to integers, the centre is rounded to a pixel and the angle to a degree, and the outline
    is a polygon with a corner every 5 degrees (fewer for small ellipses) whose border pixels belong to it.
    The angle turns from the x axis towards the y axis, that is clockwise on the screen (the tool's source
    passes 180 degrees minus it to a library that counted anticlockwise then: the published ROC files tell the
    two apart).

    Args:
        ellipses (ndarray[n, 5]): (major radius, minor radius, angle in radians, centre x, centre y).
        image_size: (width, height) to clip to.
    """
    ellipses = np.asarray(ellipses, dtype=np.float64).reshape(-1, 5)
    spans = [_ellipse_rows(*ellipse) for ellipse in ellipses]
    width, height = image_size
    lefts, rights = np.zeros((len(spans), height), np.int64), np.full((len(spans), height), -1, np.int64)
    for i, (top, left, right) in enumerate(spans):
        first, last = max(top, 0), min(top + len(left), height)
        if first < last:
            lefts[i, first:last] = left[first - top : last - top]
            rights[i, first:last] = right[first - top : last - top]
    return Spans(np.maximum(lefts, 0), np.minimum(rights, width - 1))


def _ellipse_rows(major: float, minor: float, angle: float, cx: float, cy: float):
    """First row of one ellipse, and the first and last columns of each of its rows."""
    major, minor = (min(abs(int(radius)), _MAX_RADIUS) for radius in (major, minor))
    cx, cy = (int(_rounded(np.array(value))) for value in (cx, cy))
    radius = max(major, minor)
    step = 90 if radius < 3 else 30 if radius < 10 else 18 if radius < 15 else 5
    around, turn = np.deg2rad(np.arange(0, 360, step)), math.radians(round(math.degrees(angle)))
    px, py = major * np.cos(around), minor * np.sin(around)
    x = px * math.cos(turn) - py * math.sin(turn)
    y = px * math.sin(turn) + py * math.cos(turn)

    # Fill each row between the polygon's sides, then add the border's pixels: the nearest row in each column.
    top, bottom, first, last = (int(np.rint(v)) for v in (y.min(), y.max(), x.min(), x.max()))
    rows, columns = np.arange(top, bottom + 1), np.arange(first, last + 1)
    left, right = (np.rint(side) for side in _crossings(y, x, rows))
    for border in _crossings(x, y, columns):
        row = (np.rint(border) - top).astype(np.int64)
        np.minimum.at(left, row, columns)
        np.maximum.at(right, row, columns)
    return top + cy, left.astype(np.int64) + cx, right.astype(np.int64) + cx


def _crossings(u: np.ndarray, v: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest v of a convex polygon (u, v) at each u of `at`, held within its ends."""
    at = np.clip(at, u.min(), u.max())[:, None]
    u2, v2 = np.roll(u, -1), np.roll(v, -1)
    reached = (np.minimum(u, u2) <= at) & (at <= np.maximum(u, u2))
    slope = np.divide(v2 - v, u2 - u, out=np.zeros_like(v), where=u2 != u)
    values = v + (at - u) * slope
    return np.where(reached, values, np.inf).min(axis=1), np.where(reached, values, -np.inf).max(axis=1)


def estimate_image_size(ellipses: np.ndarray, regions: np.ndarray) -> tuple[int, int]:
    """The size of an image of FDDB from what is known of its content, for use without the images.

    No side is longer than 450. A side is shorter where an annotated face is cut by the border: some detection
    agrees with the ellipse on three sides but stops short of it on the right (or at the bottom), and no
    detection and no centre of a face lies beyond. The limits were set on the official ROC files of two
    detectors: rates at all false positives then agree to 0.0006, against 0.0035 if nothing is clipped on the
        right and at the bottom.

    Args:
        ellipses (ndarray[n, 5]): the annotated faces.
        regions (ndarray[n, 4 or 5]): all detections, rectangles or ellipses.

    Returns:
        (width, height) in pixels.
    """
    size = [_LONGEST_SIDE, _LONGEST_SIDE]
    if not len(regions) or not len(ellipses):
        return tuple(size)
    if regions.shape[1] == 4:
        detected = np.concatenate([regions[:, :2], regions[:, :2] + regions[:, 2:]], axis=1)
    else:
        detected = bounding_boxes(regions)
    faces = np.clip(bounding_boxes(ellipses), 0, _LONGEST_SIDE - 1)
    extents = np.maximum(faces[:, 2:] - faces[:, :2], 1)
    for axis in (0, 1):
        beyond = max(detected[:, 2 + axis].max(), ellipses[:, 3 + axis].max())
        for face, extent in zip(faces, extents, strict=True):
            if face[2 + axis] - beyond > _SIDE_STOPS_SHORT * extent[axis]:
                agrees = np.abs(detected - face) < _SIDE_AGREES * np.tile(extent, 2)
                agrees[:, 2 + axis] = True
                if agrees.all(axis=1).any():
                    size[axis] = min(_LONGEST_SIDE, round(beyond) + 1)
    return tuple(size)


def image_sizes_of(folder: str | os.PathLike, images: list[str]) -> dict[str, tuple[int, int]]:
    """Sizes (width, height) of those images whose `<image>.jpg` is below a folder; needs Pillow."""
    from PIL import Image

    sizes, folder = {}, undoubled(folder)
    for image in track(images, "image sizes"):
        path = os.path.join(folder, f"{image}.jpg")
        if os.path.exists(path):
            with Image.open(path) as picture:
                sizes[image] = picture.size
    return sizes
