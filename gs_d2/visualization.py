"""Boxes drawn on images, for the tools that make pictures."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

FACE = HIT = (60, 220, 80)
MISS = (255, 60, 60)
FALSE_ALARM = (255, 170, 0)
IGNORED = (150, 150, 150)

_LABEL_WIDTH = 28  # pixels; labels would hide smaller faces


@cache
def _font(size: int):
    return ImageFont.load_default(size)


def draw(image: Image.Image, boxes, colours, scores=None, crossed=None) -> Image.Image:
    """A copy of an image with boxes on it: lines and scores are as thick and large as each box allows, so that a crowd
    stays visible.

    Args:
        image: RGB.
        boxes (array [n, 4]): XYXY, in pixels; those without area are left out.
        colours: n triples of 0..255.
        scores (array [n]): written into boxes that are large enough to stay visible; None writes none.
        crossed (bool array [n]): boxes that also get their diagonals; None for none.
    """
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    limit = max(1, round(max(image.size) / 400))
    for i, (box, colour) in enumerate(zip(np.asarray(boxes).tolist(), colours, strict=True)):
        x1, y1, x2, y2 = box
        if x2 <= x1 or y2 <= y1:
            continue
        width = min(limit, max(1, round(min(x2 - x1, y2 - y1) / 20)))
        canvas.rectangle([x1, y1, x2, y2], outline=colour, width=width)
        if crossed is not None and crossed[i]:
            canvas.line([x1, y1, x2, y2], fill=colour, width=width)
            canvas.line([x1, y2, x2, y1], fill=colour, width=width)
        if scores is not None and x2 - x1 >= _LABEL_WIDTH:
            size = min(max(10, round((x2 - x1) / 5)), 10 * limit)
            at = x1 + width + 1, y1 + width
            canvas.text(at, f"{scores[i]:.2f}", colour, _font(size), stroke_width=1, stroke_fill=(0, 0, 0))
    return image


def draw_annotations(image: Image.Image, faces, ignore_boxes) -> Image.Image:
    """Faces and, crossed out, regions to ignore, under a line that counts them.

    Args:
        image: RGB.
        faces, ignore_boxes (arrays [n, 4], [m, 4]): XYXY, in pixels.
    """
    boxes = np.concatenate([np.reshape(faces, (-1, 4)), np.reshape(ignore_boxes, (-1, 4))])
    ignore = np.arange(len(boxes)) >= len(faces)
    drawn = draw(image, boxes, [IGNORED if x else FACE for x in ignore], crossed=ignore)
    return beside([drawn], [f"{len(faces)} faces (green), {len(ignore_boxes)} ignored (grey, crossed)"])


def beside(images: list[Image.Image], titles: list[str], bar: int = 22, gap: int = 4) -> Image.Image:
    """Images in a row, each under its title, on white; `bar` and `gap` are in pixels."""
    size = sum(image.width for image in images) + gap * (len(images) - 1), max(image.height for image in images) + bar
    picture = Image.new("RGB", size, (255, 255, 255))
    canvas = ImageDraw.Draw(picture)
    x = 0
    for image, title in zip(images, titles, strict=True):
        picture.paste(image, (x, bar))
        canvas.text((x + 4, 5), title, fill=(0, 0, 0))
        x += image.width + gap
    return ImageOps.expand(picture, 2, (255, 255, 255))
