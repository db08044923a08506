"""Anonymized faces: the whole box is covered, nothing else changes, and no more is left than the style promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gs_d2.anonymization import STYLES, anonymize
from gs_d2.inference import FaceDetector


def noise(width=160, height=120, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def changed(before, after) -> np.ndarray:
    return (pixels(before) != pixels(after)).any(axis=2)


@pytest.mark.parametrize("style", STYLES)
def test_faces_that_the_detector_finds(style):
    pytest.importorskip("timm")
    image = Image.new("RGB", (480, 320), (90, 110, 130))
    with Image.open("demo/astronaut.jpg") as file:
        image.paste(file.crop((640, 0, 960, 320)).convert("RGB").resize((200, 200)), (20, 20))  # one face of many
    boxes, scores = FaceDetector(confidence_threshold=0.15).detect(image)
    assert len(boxes) and scores[0] > 0.8
    covered = anonymize(image, boxes, style)
    x1, y1, x2, y2 = boxes[0].astype(int)
    assert changed(image, covered)[y1:y2, x1:x2].mean() > 0.9
    assert changed(image, covered).mean() < 0.5


boxes_in_and_out = st.tuples(
    st.floats(-50, 150), st.floats(-50, 110), st.floats(0.5, 120), st.floats(0.5, 120), st.sampled_from(STYLES)
)


@given(boxes_in_and_out)
@settings(max_examples=60, deadline=None)
def test_the_whole_box_and_its_surroundings_only(place):
    """solid shows what is covered: every pixel of the box, and none beyond an ellipse of 0.85 x its size (+ 2 px)."""
    x, y, width, height, style = place
    white = Image.new("RGB", (160, 120), (255, 255, 255))
    covered = pixels(anonymize(white, [[x, y, x + width, y + height]], "solid")).max(axis=2) == 0
    rows, columns = np.mgrid[:120, :160]
    touched = (columns + 1 > x) & (columns < x + width) & (rows + 1 > y) & (rows < y + height)
    assert covered[touched].all()
    dx = np.abs(columns + 0.5 - x - width / 2) - 0.85 * width - 2
    dy = np.abs(rows + 0.5 - y - height / 2) - 0.85 * height - 2
    assert not covered[(dx > 0) | (dy > 0)].any()
    image = noise()
    assert not (changed(image, anonymize(image, [[x, y, x + width, y + height]], style)) & ~covered).any()


@pytest.mark.parametrize("box", [[40, 30, 100, 90], [-30, -20, 70, 60], [0, 0, 160, 120], [60, 40, 66, 47]])
def test_a_mosaic_has_at_most_eight_by_eight_colours(box):
    image = noise()
    inside = changed(image, anonymize(image, [box], "solid"))
    colours = np.unique(pixels(anonymize(image, [box], "mosaic"))[inside], axis=0)
    assert 1 <= len(colours) <= 64
    width = np.ptp(np.flatnonzero(inside.any(axis=0))) + 1
    assert len(colours) <= max(width / 4 + 1, 1) ** 2 * 2, "cells of at least 4 px"


def test_strength_grows_with_the_face():
    image = noise(900, 700)
    for size in (100, 300, 500):
        left = pixels(anonymize(image, [[100, 80, 100 + size, 80 + size]], "mosaic"))
        row = left[80 + size // 2, 100 : 100 + size]
        assert (np.diff(row, axis=0) != 0).any(axis=1).sum() <= 6  # 1.7 x the box is eight cells


def test_blur_depends_on_the_cells_only():
    """Two faces of equal cells have equal blurs: nothing but the mosaic can be told from it."""
    rng = np.random.default_rng(1)
    image = noise(200, 200)
    box = [50, 50, 150, 150]
    reach = round(np.sqrt(2) * 60)  # of the ellipse, from its centre
    left, size = 100 - reach, 2 * reach
    other = pixels(image)
    edges = np.linspace(left, left + size, 9)
    for (y1, y2), (x1, x2) in itertools.product(itertools.pairwise(edges), repeat=2):
        ys, xs = slice(int(np.ceil(y1)), int(y2)), slice(int(np.ceil(x1)), int(x2))  # pixels wholly inside of a cell
        block = other[ys, xs].reshape(-1, 3)
        other[ys, xs] = rng.permutation(block).reshape(other[ys, xs].shape)
    other = Image.fromarray(other.astype(np.uint8))
    covered = changed(image, anonymize(image, [box], "solid"))
    assert changed(image, other)[covered].mean() > 0.7
    one, two = (pixels(anonymize(x, [box], "blur"))[covered] for x in (image, other))
    assert np.abs(one - two).max() <= 1
    assert one.std() < 0.25 * pixels(image)[covered].std()
    steps = np.abs(np.diff(pixels(anonymize(image, [box], "blur"))[100, 60:140], axis=0))
    assert steps.max() <= 6, "no edges of cells"


def test_several_and_none_and_without_area():
    image = noise()
    assert not changed(image, anonymize(image, np.zeros((0, 4)))).any()
    empty = [[20, 20, 20, 60], [50, 50, 40, 60], [500, 500, 600, 600], [-90, -90, -40, -40]]
    assert not changed(image, anonymize(image, empty, "solid")).any()
    both = anonymize(image, [[10, 10, 30, 40], [100, 50, 140, 100]], "solid")
    assert pixels(both)[25, 20].max() == pixels(both)[75, 120].max() == 0
    assert changed(image, both).any() and not changed(image, noise()).any(), "the image itself is kept"


@pytest.mark.parametrize(
    ("boxes", "style", "message"),
    [([[0, 0, 9, np.nan]], "blur", "finite"), ([[0, 0, np.inf, 9]], "solid", "finite"), ([], "pixel", "mosaic, solid")],
)
def test_what_is_refused(boxes, style, message):
    with pytest.raises(ValueError, match=message):
        anonymize(noise(), boxes, style)


def test_no_metadata_is_handed_on():
    image = noise()
    image.info.update(exif=b"Exif\0\0thumbnail", xmp=b"<x/>", comment=b"who", icc_profile=b"damaged")
    assert anonymize(image, [[10, 10, 30, 30]]).info == {}
