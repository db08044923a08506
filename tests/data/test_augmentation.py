"""ScaleJitterCrop: the paper's resize by 0.25 n and crop, with the crop taken first; FaceCrop: a face at a scale."""

import math

import numpy as np
import pytest
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gs_d2.data import FaceCrop, ScaleJitterCrop

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


def old_view(image, scales, max_size):
    """The paper's view, written out once more, with the random numbers in the order that runs with a seed rely on."""
    height, width = image.shape[:2]
    scale = scales[np.random.randint(len(scales))]
    h, w = min(height, max(1, int(max_size / scale))), min(width, max(1, int(max_size / scale)))
    y = np.random.randint(height - h + 1)
    x = np.random.randint(width - w + 1)
    size = min(max_size, max(1, round(w * scale))), min(max_size, max(1, round(h * scale)))
    return np.asarray(Image.fromarray(image[y : y + h, x : x + w]).resize(size, Image.BILINEAR))


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (120, 90), (301, 400)])
def test_the_papers_views_are_those_of_earlier_versions(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    augmentation = ScaleJitterCrop(PAPER_SCALES, 150)
    for seed in range(30):
        np.random.seed(seed)
        expected, following = old_view(image, PAPER_SCALES, 150), np.random.rand()
        np.random.seed(seed)
        np.testing.assert_array_equal(augmentation.get_transform(image).apply_image(image), expected)
        assert np.random.rand() == following


class Elsewhere(T.Augmentation):
    """What FaceCrop falls back to, recognised by its crop."""

    def get_transform(self, image):
        return T.CropTransform(0, 0, 1, 1)


def face_crop(prob=1.0, scales=(16, 32, 64, 128), size=64, max_upscale=2.0):
    return FaceCrop(Elsewhere(), prob, scales, size, max_upscale)


def fell_back(transforms):
    return isinstance(transforms, T.CropTransform)


FACES = np.ones(1, bool)


@st.composite
def scenes(draw):
    """An image's height and width, with boxes: in it, across its border and beyond, small and large."""
    height, width = draw(st.integers(1, 900)), draw(st.integers(1, 900))
    quarter = st.integers(-400, 4000).map(lambda value: value / 4)  # exact in float32
    corners = draw(st.lists(st.tuples(quarter, quarter, quarter, quarter), min_size=1, max_size=5))
    boxes = [(x, y, x + abs(w) + 0.25, y + abs(h) + 0.25) for x, y, w, h in corners]
    is_face = draw(st.lists(st.booleans(), min_size=len(boxes), max_size=len(boxes)))
    return height, width, np.array(boxes, np.float32), np.array(is_face)


@settings(max_examples=400, deadline=None)
@given(
    scenes(),
    st.lists(st.sampled_from([8.0, 16.0, 24.0, 32.0, 100.0, 256.0]), min_size=1, max_size=4, unique=True),
    st.integers(1, 700),
    st.sampled_from([0.5, 1.0, 2.0, 3.5]),
    st.integers(0, 2**32 - 1),
)
def test_a_view_around_a_face(scene, scales, max_size, max_upscale, seed):
    height, width, boxes, is_face = scene
    image = np.broadcast_to(np.uint8(0), (height, width))
    np.random.seed(seed)
    transforms = face_crop(1.0, scales, max_size, max_upscale).get_transform(image, boxes, is_face)
    sizes = np.sqrt((boxes[:, 2] - boxes[:, 0]).astype(float) * (boxes[:, 3] - boxes[:, 1]))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    usable = is_face & (centres >= 0).all(axis=1) & (centres < [width, height]).all(axis=1)
    usable &= sizes * max_upscale > min(scales) / math.sqrt(2)
    assert fell_back(transforms) == (not usable.any())
    if fell_back(transforms):
        return
    crop, resize = parts(transforms)
    x, y, w, h = crop or (0, 0, width, height)
    assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height and min(w, h) >= 1
    new_h, new_w = resize[2:] if resize else (h, w)
    assert 1 <= min(new_h, new_w) and max(new_h, new_w) <= max_size
    # One face that could be chosen has its centre in the view, and a factor that goes with the view's whole pixels.
    explained = []
    for i in np.flatnonzero(usable):
        in_view = x <= centres[i, 0] < x + w and y <= centres[i, 1] < y + h
        for scale in scales:
            low = scale / math.sqrt(2) / sizes[i]
            high = min(2 * low, max_upscale)
            for new, old in ((new_w, w), (new_h, h)):
                low = max(low, 0 if new == 1 else (new - 0.5) / old)
                high = min(high, math.inf if old == 1 == new or new == max_size else (new + 0.5) / old)
            explained.append(in_view and low <= high * (1 + 1e-9))
    assert any(explained)


def chosen(augmentation, boxes, is_face, draws=4000, size=(600, 800)):
    """sqrt(w * h) of the first box in each of many views; the crop's place."""
    image = np.broadcast_to(np.uint8(0), size)
    found, places = [], []
    for _ in range(draws):
        transforms = augmentation.get_transform(image, boxes, is_face)
        w, h = (transforms.apply_box(boxes)[0].reshape(2, 2) * [[-1], [1]]).sum(axis=0)
        found.append(math.sqrt(w * h))
        places.append(parts(transforms)[0])
    return np.array(found), places


def chi_square(counts):
    expected = np.sum(counts) / len(counts)
    return ((np.asarray(counts) - expected) ** 2 / expected).sum()


def test_scales_up_to_the_next_larger_are_alike_and_sizes_log_uniform():
    boxes = np.array([[300, 200, 340, 240]], np.float32)  # 40 px: nearest to 32, the next is 64
    found, _ = chosen(face_crop(size=500), boxes, FACES)
    octaves = np.log2(found / 16) + 0.5  # [0, 1) is scale 16, [1, 2) is 32, [2, 3) is 64 up to 80 px
    assert found.min() > 11.2 and found.max() < 80.3
    assert chi_square(np.histogram(octaves, [0, 1, 2, 3])[0]) < 13.8  # 2 degrees of freedom, p = 0.001
    assert chi_square(np.histogram(octaves, np.linspace(0, 2, 11))[0]) < 27.9  # 9, p = 0.001
    assert chi_square(np.histogram(octaves, np.linspace(2, np.log2(80 / 16) + 0.5, 6))[0]) < 18.5  # 4


def test_faces_are_alike_and_the_ignored_never_chosen():
    corners = np.array([[0, 0], [700, 500], [350, 50], [100, 400], [500, 300]])
    sides = np.array([[20], [45], [40], [30], [20]])
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    is_face = np.array([True, True, True, True, False])
    _, places = chosen(face_crop(scales=[16], size=40), boxes, is_face, draws=2000)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = [[i for i, (cx, cy) in enumerate(centres) if x <= cx < x + w and y <= cy < y + h] for x, y, w, h in places]
    assert all(len(faces) == 1 for faces in inside)
    counts = np.bincount([faces[0] for faces in inside], minlength=5)
    assert counts[4] == 0 and chi_square(counts[:4]) < 16.3  # 3 degrees of freedom, p = 0.001


def test_all_places_with_the_centre_in_view_are_alike():
    boxes = np.array([[2, 296, 10, 304]], np.float32)  # centre (6, 300): seven places for x, all of them for y
    augmentation = face_crop(scales=[8], size=10, max_upscale=1e-9 + 1 / math.sqrt(2))  # always 5.66 of 8 px
    _, places = chosen(augmentation, boxes, FACES, draws=3000)
    assert {(w, h) for _, _, w, h in places} == {(14, 14)}
    for axis, expected in ((0, range(7)), (1, range(287, 301))):
        values, counts = np.unique([place[axis] for place in places], return_counts=True)
        assert values.tolist() == list(expected)
        assert chi_square(counts) < (22.5 if axis == 0 else 34.5)  # 6 and 13 degrees of freedom, p = 0.001


def test_probability():
    image, boxes = np.zeros((100, 100), np.uint8), np.array([[40, 40, 60, 60]], np.float32)
    for prob, low, high in ((0.0, 0, 0), (0.3, 500, 700), (1.0, 2000, 2000)):
        augmentation = face_crop(prob)
        views = sum(not fell_back(augmentation.get_transform(image, boxes, FACES)) for _ in range(2000))
        assert low <= views <= high


@pytest.mark.parametrize(
    ("boxes", "is_face"),
    [
        ([], []),
        ([[10, 10, 40, 40]], [False]),
        ([[10, 10, 15, 15]], [True]),  # 5 px: twice that is none of the scales
        ([[-30, 10, 20, 60]], [True]),  # its centre is outside
        ([[80, 10, 120, 60]], [True]),  # and on the first pixel outside
    ],
)
def test_without_a_usable_face_it_falls_back(boxes, is_face):
    boxes, image = np.array(boxes, np.float32).reshape(-1, 4), np.zeros((100, 100), np.uint8)
    for _ in range(20):
        assert fell_back(face_crop().get_transform(image, boxes, np.array(is_face, bool)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prob": -0.1}, r"FaceCrop: prob must be in \[0, 1\], got -0\.1"),
        ({"prob": math.nan}, "FaceCrop: prob must be"),
        ({"prob": 1.5}, "FaceCrop: prob must be"),
        ({"scales": []}, r"FaceCrop: scales must be positive pixels, at least one, got \[\]"),
        ({"scales": [16, 0]}, "FaceCrop: scales must be"),
        ({"scales": [math.inf]}, "FaceCrop: scales must be"),
        ({"size": 0}, "FaceCrop: size must be at least 1, got 0"),
        ({"max_upscale": 0}, "FaceCrop: max_upscale must be positive, got 0"),
        ({"max_upscale": math.inf}, "FaceCrop: max_upscale must be positive"),
    ],
)
def test_values_of_face_crop_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        face_crop(**arguments)
