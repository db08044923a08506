"""Faces made unrecognisable in the pixels of a picture."""

import math

import numpy as np
from PIL import Image, ImageFilter

from gs_d2.formats.images import pixels_only

STYLES = ("blur", "mosaic", "solid")
THRESHOLD = (
    0.15  # lowest score of what is covered: a false alarm costs a patch of background, a missed face stays visible
)

_MARGIN = 0.1  # of a box's width and height, on each side; hair and ears are outside of a box
_CELLS = 8  # along the longer side of the covered place, which leaves about five across the face
_MIN_CELL = 4  # pixels; smaller cells would leave a small face as it is


def anonymize(image: Image.Image, boxes, style: str = "blur") -> Image.Image:
    """A copy of an image on which the faces in boxes cannot be recognised. It has pixels only, no metadata
    (:func:`gs_d2.formats.images.pixels_only`).

    A face is covered by an ellipse. The box grows by a tenth of its size on each side (at least one pixel), and the
    ellipse goes through its four corners, so the whole box is covered. Pixels outside of the ellipses stay the same.

    - "mosaic": at most 8 x 8 cells, each of at least 4 px, with the mean colour of its pixels.
    - "blur": these cells, blurred until their edges are gone. The result depends on the cells only, so sharpening
      brings back no more than a mosaic shows.
    - "solid": black. Nothing of the face is left.

    Mosaic and blur keep the rough colours of a face. Whoever has photographs of all candidates may find the right one
    by these, above all with many frames of a video. "solid" is safe from this.

    Args:
        image: RGB.
        boxes (array [n, 4]): XYXY, in pixels; boxes without area and boxes outside of the image are left out.
        style: one of STYLES.

    Raises:
        ValueError: there is no such style, or a box is not finite.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise ValueError("boxes must be finite: a face at an unknown place cannot be covered")
    image = pixels_only(image)
    for x1, y1, x2, y2 in boxes.tolist():
        if x2 > x1 and y2 > y1:
            _cover(image, x1, y1, x2, y2, style)
    return image


def _cover(image: Image.Image, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    rx, ry = (math.sqrt(2) * (size / 2 + max(_MARGIN * size, 1)) for size in (x2 - x1, y2 - y1))
    left, right = (min(max(round(x), 0), image.width) for x in (cx - rx, cx + rx))
    top, bottom = (min(max(round(y), 0), image.height) for y in (cy - ry, cy + ry))
    if left >= right or top >= bottom:
        return
    dx = (np.arange(left, right) + 0.5 - cx) / rx
    dy = (np.arange(top, bottom) + 0.5 - cy) / ry
    mask = Image.fromarray((dy[:, None] ** 2 + dx**2 <= 1).astype(np.uint8) * 255)
    place = left, top, right, bottom
    image.paste(_unrecognisable(image.crop(place), max(2 * max(rx, ry) / _CELLS, _MIN_CELL), style), place, mask)


def _unrecognisable(patch: Image.Image, cell: float, style: str) -> Image.Image:
    """A patch of the same size, in cells of about `cell` pixels."""
    if style == "solid":
        return Image.new("RGB", patch.size)
    cells = patch.resize([min(max(round(size / cell), 1), _CELLS) for size in patch.size], Image.Resampling.BOX)
    if style == "mosaic":
        return cells.resize(patch.size, Image.Resampling.NEAREST)
    return cells.resize(patch.size, Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(cell / 2))
