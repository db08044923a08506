"""FaceDatasetMapper: boxes land on the right pixels, and each goes to the faces, to the ignored, or nowhere."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from PIL import Image

from gs_d2.config import add_gs_config
from gs_d2.data import FaceDatasetMapper, ScaleJitterCrop

BACKGROUND = 110


@pytest.fixture(autouse=True)
def seed():
    state = np.random.get_state()
    np.random.seed(0)
    yield
    np.random.set_state(state)


@pytest.fixture
def record(tmp_path):
    """A dataset dict of a grey image in which each box is filled with its colour."""

    def record(boxes, *, ignore=None, colours=None, size=(300, 400)):
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        image = np.full((*size, 3), BACKGROUND, np.uint8)
        for box, colour in zip(boxes.astype(int), colours or [(255, 0, 0)] * len(boxes), strict=True):
            image[box[1] : box[3], box[0] : box[2]] = colour
        path = tmp_path / "0--Parade_a.png"
        Image.fromarray(image).save(path)
        return {
            "file_name": str(path),
            "image_id": "0--Parade/a",
            "gt_boxes": boxes,
            "gt_ignore": np.zeros(len(boxes), bool) if ignore is None else np.asarray(ignore, bool),
        }

    return record


def mapper(*augmentations, is_train=True, min_face_size=8.0, image_format="RGB"):
    return FaceDatasetMapper(
        is_train=is_train,
        augmentations=list(augmentations),
        image_format=image_format,
        min_face_size=min_face_size,
    )


def crop(x, y, w, h):
    """An augmentation that crops at a given place."""

    class Crop(T.Augmentation):
        def get_transform(self, image):
            return T.CropTransform(x, y, w, h)

    return Crop()


def faces_and_ignored(output):
    return output["instances"].gt_boxes.tensor.tolist(), output["ignore_boxes"].tensor.tolist()


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    "flips",
    [(), (T.RandomFlip(prob=0.5),), (T.RandomFlip(prob=0.5, horizontal=False, vertical=True),)],
    ids=["no flip", "horizontal", "vertical"],
)
def test_boxes_land_on_their_pixels(record, flips):
    boxes = [[40, 30, 120, 130], [200, 150, 260, 190], [310, 20, 380, 280]]
    source = record(boxes, colours=COLOURS)
    augment = mapper(ScaleJitterCrop([0.5, 1.0, 1.5, 2.0], 350), *flips)
    seen, dropped, clipped = 0, 0, 0
    for _ in range(40):
        output = augment(source)
        image = output["image"].numpy().astype(int)
        height, width = image.shape[1:]
        found = output["instances"].gt_boxes.tensor.numpy()
        assert (found >= 0).all() and (found <= [width, height] * 2).all()
        used = set()
        for colour in COLOURS:
            rows, columns = np.nonzero(np.abs(image - np.reshape(colour, (3, 1, 1))).max(axis=0) < 100)
            if len(rows) == 0:
                continue
            drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            near = [i for i, box in enumerate(found) if np.abs(box - drawn).max() <= 1.5]
            at_border = drawn[0] == 0 or drawn[1] == 0 or drawn[2] == width or drawn[3] == height
            if near:
                used.update(near)
                seen += 1
                clipped += at_border
            else:  # its centre is outside: then the border cuts off half of it or more
                assert at_border
                dropped += 1
        assert used == set(range(len(found))), "a box without its colour"
    assert seen > 40 and dropped > 5 and clipped > 5  # all three happen


def test_flip_alone_is_exact(record):
    source = record([[40, 30, 120, 130]])
    output = mapper(T.RandomFlip(prob=1.0))(source)
    assert faces_and_ignored(output)[0] == [[280, 30, 360, 130]]
    assert (output["image"][:, 30:130, 280:360] == torch.tensor([255, 0, 0])[:, None, None]).all()
    assert (output["image"][:, 30:130, 279] == BACKGROUND).all()


def test_tiny_and_flagged_faces_are_ignored(record):
    boxes = [[10, 10, 40, 40], [60, 10, 67, 19], [80, 10, 88, 18], [100, 10, 140, 50]]
    source = record(boxes, ignore=[False, False, False, True])
    faces, ignored = faces_and_ignored(mapper()(source))
    assert faces == [boxes[0], boxes[2]]  # sqrt(8 * 8) = 8 is not below 8
    assert ignored == [boxes[1], boxes[3]]  # sqrt(7 * 9) = 7.94


def test_size_counts_after_resizing(record):
    source = record([[10, 10, 22, 22], [40, 40, 80, 80]])
    half = mapper(T.Resize((150, 200)))
    assert faces_and_ignored(half(source)) == ([[20, 20, 40, 40]], [[5, 5, 11, 11]])
    double = mapper(T.Resize((600, 800)))
    assert faces_and_ignored(double(source)) == ([[20, 20, 44, 44], [80, 80, 160, 160]], [])
    all_faces = mapper(T.Resize((150, 200)), min_face_size=0)
    assert faces_and_ignored(all_faces(source)) == ([[5, 5, 11, 11], [20, 20, 40, 40]], [])


def test_boxes_without_area_vanish(record):
    source = record([[10, 10, 10, 40], [10, 10, 40, 10], [50, 50, 48, 73], [60, 60, 90, 90]], ignore=[1, 1, 1, 0])
    assert faces_and_ignored(mapper()(source)) == ([[60, 60, 90, 90]], [])
    assert faces_and_ignored(mapper(T.RandomFlip(prob=1.0))(source)) == ([[310, 60, 340, 90]], [])


def test_a_crop_drops_by_centre_and_clips(record):
    boxes = [
        [90, 120, 130, 160],  # a quarter outside on the left: clipped
        [60, 120, 130, 160],  # its centre x = 95 outside: dropped
        [280, 120, 320, 160],  # its centre x = 300 is the first pixel outside: dropped
        [279, 120, 319, 160],  # its centre x = 299: clipped
        [120, 60, 160, 130],  # its centre y = 95 outside: dropped
        [0, 0, 400, 300],  # larger than the crop: clipped to all of it
        [0, 0, 20, 20],  # far outside: dropped
    ]
    output = mapper(crop(100, 100, 200, 150))(record(boxes))
    faces, ignored = faces_and_ignored(output)
    assert faces == [[0, 20, 30, 60], [179, 20, 200, 60], [0, 0, 200, 150]]
    assert ignored == []
    assert output["instances"].image_size == (150, 200) == tuple(output["image"].shape[1:])


def test_ignored_regions_count_wherever_they_are_seen(record):
    boxes = [[60, 120, 130, 160], [0, 0, 20, 20], [95, 120, 102, 127]]
    source = record(boxes, ignore=[True, True, False])  # the last is a tiny face
    faces, ignored = faces_and_ignored(mapper(crop(100, 100, 200, 150))(source))
    assert faces == []
    assert ignored == [[0, 20, 30, 60], [0, 20, 2, 27]]


def test_an_image_without_faces_is_a_valid_negative(record):
    for boxes in ([], [[10, 10, 10, 40]]):
        output = mapper(ScaleJitterCrop([0.5, 2.0], 200), T.RandomFlip())(record(boxes))
        instances = output["instances"]
        assert len(instances) == 0
        assert instances.gt_boxes.tensor.shape == (0, 4) and instances.gt_boxes.tensor.dtype == torch.float32
        assert instances.gt_classes.shape == (0,)
        assert output["ignore_boxes"].tensor.shape == (0, 4)


def test_a_crowd_of_two_thousand(record, monkeypatch):
    rng = np.random.default_rng(0)
    corners = rng.integers(0, (1900, 1400), size=(2000, 2))
    sizes = rng.integers(2, 40, size=(2000, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1)
    source = record(boxes, size=(1440, 1940))
    calls = []
    apply_coords = T.HFlipTransform.apply_coords

    def counted(self, coords):
        calls.append(len(coords))
        return apply_coords(self, coords)

    monkeypatch.setattr(T.HFlipTransform, "apply_coords", counted)
    output = mapper(T.Resize((1440, 1940)), T.RandomFlip(prob=1.0))(source)
    assert calls == [4 * 2000], "the corners of all boxes are transformed all at once"
    tiny = np.sqrt(sizes.prod(axis=1)) < 8
    mirrored = np.stack([1940 - boxes[:, 2], boxes[:, 1], 1940 - boxes[:, 0], boxes[:, 3]], axis=1)
    faces, ignored = faces_and_ignored(output)
    np.testing.assert_allclose(faces, mirrored[~tiny], atol=1e-3)
    np.testing.assert_allclose(ignored, mirrored[tiny], atol=1e-3)


def test_what_a_training_input_holds(record):
    source = record([[10, 10, 40, 40], [50, 50, 90, 90]], ignore=[False, True])
    before = {key: np.copy(value) for key, value in source.items()}
    output = mapper(ScaleJitterCrop([2.0], 10_000))(source)
    assert set(output) == {"file_name", "image_id", "height", "width", "image", "instances", "ignore_boxes"}
    assert (output["height"], output["width"]) == (300, 400), "of the file"
    image = output["image"]
    assert image.dtype == torch.uint8 and image.shape == (3, 600, 800) and image.is_contiguous()
    assert output["instances"].image_size == (600, 800)
    assert output["instances"].gt_classes.tolist() == [0] and output["instances"].gt_classes.dtype == torch.int64
    assert output["instances"].gt_boxes.tensor.dtype == torch.float32
    assert output["ignore_boxes"].tensor.dtype == torch.float32
    for key, value in before.items():  # the data set is shared by all epochs
        np.testing.assert_array_equal(source[key], value)


def test_channel_order(record):
    source = record([[0, 0, 400, 300]], colours=[(250, 120, 10)])
    assert mapper(image_format="RGB")(source)["image"][:, 0, 0].tolist() == [250, 120, 10]
    assert mapper(image_format="BGR")(source)["image"][:, 0, 0].tolist() == [10, 120, 250]


def config(*opts):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


def test_test_mode_keeps_the_image_as_it_is(record):
    source = record([[10, 10, 40, 40]])
    output = FaceDatasetMapper(config("INPUT.MIN_SIZE_TEST", 0, "INPUT.FORMAT", "RGB"), is_train=False)(source)
    assert set(output) == {"file_name", "image_id", "height", "width", "image"}
    np.testing.assert_array_equal(output["image"].permute(1, 2, 0), np.asarray(Image.open(source["file_name"])))
    # Test images need no annotations at all.
    del source["gt_boxes"], source["gt_ignore"]
    FaceDatasetMapper(config(), is_train=False)(source)


def test_test_size(record):
    cfg = config("INPUT.MIN_SIZE_TEST", 150, "INPUT.MAX_SIZE_TEST", 1000)
    output = FaceDatasetMapper(cfg, is_train=False)(record([]))
    assert output["image"].shape == (3, 150, 200)
    assert (output["height"], output["width"]) == (300, 400)


def test_training_follows_the_config(record):
    source = record([[10, 10, 30, 40]])
    keys = ("INPUT.GS.SCALES", [0.5], "INPUT.GS.MAX_CROP_SIZE", 160, "INPUT.FORMAT", "RGB")
    output = FaceDatasetMapper(config(*keys, "INPUT.RANDOM_FLIP", "none"), is_train=True)(source)
    assert output["image"].shape == (3, 150, 160)
    whole = ("INPUT.GS.SCALES", [1.0], "INPUT.GS.MAX_CROP_SIZE", 999)
    for flip, expected in (
        ("none", [[10, 10, 30, 40]]),
        ("horizontal", [[370, 10, 390, 40]]),
        ("vertical", [[10, 260, 30, 290]]),
    ):
        augment = FaceDatasetMapper(config(*whole, "INPUT.RANDOM_FLIP", flip), is_train=True)
        results = [faces_and_ignored(augment(source))[0] for _ in range(20)]
        assert expected in results
        assert all(result in (expected, [[10, 10, 30, 40]]) for result in results)
    augment = FaceDatasetMapper(config(*whole, "INPUT.GS.MIN_FACE_SIZE", 25.0), is_train=True)
    assert faces_and_ignored(augment(source))[0] == [], "sqrt(20 * 30) = 24.5"


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_sides_of_one_pixel_can_be_flipped(record, size, image_format):
    augment = mapper(ScaleJitterCrop([0.25, 1.0], 30), T.RandomFlip(prob=1.0), image_format=image_format)
    for _ in range(5):
        output = augment(record([[5, 5, 20, 20]], size=size))
        assert min(output["image"].shape[1:]) == 1 and (output["height"], output["width"]) == size
        assert output["image"].is_contiguous()


def test_a_missing_image_is_named(record):
    source = record([]) | {"file_name": "/nowhere/a.jpg"}
    with pytest.raises(FileNotFoundError, match=r"/nowhere/a\.jpg"):
        mapper()(source)


FACE_CROPS = ("INPUT.GS.FACE_CROP_PROB", 1.0, "INPUT.GS.FACE_CROP_SIZE", 64, "INPUT.RANDOM_FLIP", "horizontal")


def test_views_around_a_face_follow_the_config(record):
    boxes = [[150, 100, 190, 150], [10, 10, 40, 40], [300, 200, 300, 220], [390, 10, 500, 200]]
    source = record(boxes, ignore=[False, True, False, False])  # flagged, without area, mostly off the image
    keys = ("INPUT.GS.FACE_CROP_SCALES", [16, 64], "INPUT.GS.FACE_CROP_SIZE", 200)
    augment = FaceDatasetMapper(config(*FACE_CROPS, *keys), is_train=True)
    sizes = []
    for _ in range(60):
        output = augment(source)
        assert max(output["image"].shape[1:]) <= 200
        ((x1, y1, x2, y2),) = output["instances"].gt_boxes.tensor.tolist()
        height, width = output["image"].shape[1:]
        if x1 > 0 and y1 > 0 and x2 < width and y2 < height:  # not cut off
            sizes.append(np.sqrt((x2 - x1) * (y2 - y1)))
    assert len(sizes) > 20
    near_16, near_64 = (np.abs(np.log2(np.divide(sizes, scale))) < 0.51 for scale in (16, 64))
    assert (near_16 | near_64).all() and near_16.any() and near_64.any()


def test_views_around_a_face_fall_back_to_the_papers(record):
    keys = ("INPUT.GS.SCALES", [0.5], "INPUT.GS.MAX_CROP_SIZE", 160)
    for boxes, ignore in (([], None), ([[10, 10, 40, 40]], [True])):
        output = FaceDatasetMapper(config(*FACE_CROPS, *keys), is_train=True)(record(boxes, ignore=ignore))
        assert output["image"].shape == (3, 150, 160)


def test_augmentations_get_the_faces_by_name(record):
    seen = []

    class Look(T.Augmentation):
        def get_transform(self, image, boxes, is_face):
            seen.append((image.shape, boxes.tolist(), is_face.tolist()))
            return T.HFlipTransform(image.shape[1])

    boxes = [[10, 10, 40, 40], [50, 50, 90, 90], [60, 60, 60, 90], [390, 10, 500, 200], [100, 100, 103, 103]]
    augment = mapper(Look(), Look())
    augment(record(boxes, ignore=[False, True, False, False, False]))
    is_face = [True, False, False, False, True]  # flagged, without area, mostly off the image; tiny is not known yet
    mirrored = [[400 - x2, y1, 400 - x1, y2] for x1, y1, x2, y2 in boxes]
    assert seen == [((300, 400, 3), boxes, is_face), ((300, 400, 3), mirrored, is_face)]


def test_color_jitter(record):
    source = record([[100, 100, 200, 200]], colours=[(60, 130, 90)])
    keys = ("INPUT.GS.SCALES", [1.0], "INPUT.GS.MAX_CROP_SIZE", 999, "INPUT.FORMAT", "RGB", "INPUT.RANDOM_FLIP", "none")
    plain = FaceDatasetMapper(config(*keys), is_train=True)(source)
    augment = FaceDatasetMapper(config(*keys, "INPUT.GS.COLOR_JITTER", 0.3), is_train=True)
    views = [augment(source) for _ in range(60)]
    backgrounds = [int(view["image"][0, 0, 0]) for view in views]
    assert len(set(backgrounds)) > 15
    for view in views:
        assert view["image"].dtype == torch.uint8 and view["image"].shape == plain["image"].shape
        assert faces_and_ignored(view) == faces_and_ignored(plain)
    assert min(backgrounds) >= 0.7 * BACKGROUND - 3 and max(backgrounds) <= 1.3 * BACKGROUND + 3
    faces = np.array([view["image"][:, 150, 150].tolist() for view in views])
    assert len(set((faces[:, 1] - faces[:, 0]).tolist())) > 10, "saturation"
    test_view = FaceDatasetMapper(config(*keys, "INPUT.GS.COLOR_JITTER", 0.3, "INPUT.MIN_SIZE_TEST", 0), is_train=False)
    assert torch.equal(test_view(source)["image"], plain["image"])


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_color_jitter_that_makes_no_sense(strength):
    with pytest.raises(ValueError, match=r"INPUT\.GS\.COLOR_JITTER must be in \[0, 1\], got"):
        FaceDatasetMapper(config("INPUT.GS.COLOR_JITTER", strength), is_train=True)
