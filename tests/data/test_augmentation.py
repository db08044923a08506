"""ScaleJitterCrop: the paper's resize by 0.25 n and crop, with the crop taken first."""

import math

import numpy as np
import pytest
from detectron2.data import transforms as T

from gs_d2.data import ScaleJitterCrop

PAPER_SCALES = [0.25 * n for n in range(1, 9)]


@pytest.fixture(autouse=True)
def seed():
    state = np.random.get_state()
    np.random.seed(0)
    yield
    np.random.set_state(state)


def smooth_image(height, width):
    """Waves much longer than a pixel, different along each side and in each channel."""
    y, x = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(x / 31 + c) + np.cos(y / 23 - c) for c in range(3)]
    return (127.5 + 60 * np.stack(waves, axis=2)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 1), (3, 5), (480, 640), (1365, 1024), (64, 2500)])
@pytest.mark.parametrize("max_size", [1, 7, 320, 1200])
def test_no_side_exceeds_max_size(size, max_size):
    image = np.zeros((*size, 3), np.uint8)
    augmentation = ScaleJitterCrop(PAPER_SCALES, max_size)
    for _ in range(20):
        view = augmentation.get_transform(image).apply_image(image)
        assert view.dtype == np.uint8 and view.shape[2] == 3
        assert 1 <= min(view.shape[:2]) and max(view.shape[:2]) <= max_size


def parts(transforms):
    """(crop x, y, w, h), (from h, w, to h, w) of a transform list; None for what it does not have."""
    crop = next(((t.x0, t.y0, t.w, t.h) for t in transforms.transforms if isinstance(t, T.CropTransform)), None)
    resize = next(
        ((t.h, t.w, t.new_h, t.new_w) for t in transforms.transforms if isinstance(t, T.ResizeTransform)), None
    )
    return crop, resize


@pytest.mark.parametrize("size", [(480, 640), (1365, 1024), (90, 1800)])
@pytest.mark.parametrize("scale", PAPER_SCALES)
def test_the_factor_is_the_one_asked_for(size, scale):
    height, width = size
    image = np.zeros((*size, 3), np.uint8)
    for _ in range(5):
        transforms = ScaleJitterCrop([scale], 1200).get_transform(image)
        crop, resize = parts(transforms)
        if resize is None:
            assert scale == 1
        else:
            h, w, new_h, new_w = resize
            assert abs(new_h - h * scale) <= 0.5 and abs(new_w - w * scale) <= 0.5
        # As much as fits is kept: all where the resized image fits, else max_size but for a source pixel's share.
        out_h, out_w = transforms.apply_image(image).shape[:2]
        for out, side in ((out_h, height), (out_w, width)):
            assert min(1200, side * scale) - max(scale, 1) <= out <= min(1200, side * scale + 0.5)
        if max(size) * scale <= 1200:
            assert crop is None


def test_factors_and_crops_are_uniform():
    scales, draws = [0.25, 0.5, 1.0, 1.5, 2.0], 5000
    image = np.zeros((40, 40, 3), np.uint8)
    augmentation = ScaleJitterCrop(scales, 1000)
    sides = [augmentation.get_transform(image).apply_box(np.array([[0.0, 0, 40, 40]]))[0, 2] for _ in range(draws)]
    values, counts = np.unique(sides, return_counts=True)
    assert values.tolist() == [40 * scale for scale in scales]
    expected = draws / len(scales)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001

    augmentation = ScaleJitterCrop([1.0], 31)  # ten places each way
    crops = [parts(augmentation.get_transform(image))[0] for _ in range(draws)]
    for axis in (0, 1):
        values, counts = np.unique([crop[axis] for crop in crops], return_counts=True)
        assert values.tolist() == list(range(10))
        expected = draws / 10
        assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75, 1.0, 1.5, 2.0])
def test_crop_then_resize_sees_what_resize_then_crop_sees(scale):
    height, width, max_size = 360, 500, 80
    image = smooth_image(height, width)
    transforms = ScaleJitterCrop([scale], max_size).get_transform(image)
    (x, y, _, _), _ = parts(transforms)
    view = transforms.apply_image(image).astype(int)
    resized = T.ResizeTransform(height, width, round(height * scale), round(width * scale)).apply_image(image)
    left, top = round(x * scale), round(y * scale)
    other = resized[top : top + view.shape[0], left : left + view.shape[1]].astype(int)
    assert view.shape == other.shape and min(view.shape[:2]) >= 75
    # The two may lie half a pixel apart, over which the image changes by half of 60 / 23 / scale at most.
    difference = np.abs(view - other)[3:-3, 3:-3]
    assert difference.max() <= 2 + 60 / 23 / scale
    # The same view shifted by a tenth of its size is not taken for it.
    assert np.abs(view - np.roll(other, 15, axis=1))[3:-3, 18:-3].max() > 2 * (2 + 60 / 23 / scale)


def test_boxes_go_with_the_pixels():
    image = np.zeros((300, 400, 3), np.uint8)
    image[100:140, 200:260] = 255
    for _ in range(20):
        transforms = ScaleJitterCrop([0.5, 1.0, 2.0], 200).get_transform(image)
        view = transforms.apply_image(image)
        (box,) = np.clip(transforms.apply_box(np.array([[200.0, 100, 260, 140]])), 0, 10**6)
        box = np.minimum(box, [view.shape[1], view.shape[0]] * 2)
        rows, columns = np.nonzero(view[:, :, 0] > 127)
        if len(rows) == 0:
            assert min(box[2] - box[0], box[3] - box[1]) < 1
        else:
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(found, box, atol=1)


@pytest.mark.parametrize(
    ("scales", "max_size"),
    [([], 100), ([0.0], 100), ([1.0, -0.5], 100), ([1.0], 0), ([math.nan], 100), ([math.inf], 100)],
)
def test_values_that_make_no_sense(scales, max_size):
    with pytest.raises(ValueError, match="scales must be positive and max_size at least 1, got"):
        ScaleJitterCrop(scales, max_size)
