"""visualize_data.py: a picture for each annotated image, and for each view that the loader makes."""

import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from visualize_data import main

from gs_d2.data import register_wider_face
from gs_d2.visualization import FACE, IGNORED, beside, draw, draw_annotations

NAME = "test_visualize_data"
OPTS = ("DATASETS.TRAIN", f"('{NAME}',)", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2")


@pytest.fixture(scope="module", autouse=True)
def records(drawn_datasets):
    base = drawn_datasets / "widerface"
    register_wider_face(
        NAME, base / "wider_face_split" / "wider_face_train_bbx_gt.txt", base / "WIDER_train" / "images"
    )
    yield DatasetCatalog.get(NAME)
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def has_colour(image, colour):
    return bool((np.abs(np.asarray(image.convert("RGB"), dtype=int) - colour).max(axis=2) < 60).any())


def test_annotations(records, tmp_path):
    main(["--source", "annotation", "--output-dir", str(tmp_path), "--num-images", "0", *OPTS])
    names = sorted(record["image_id"].split("/")[1] + ".jpg" for record in records)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (128 + 4, 96 + 22 + 4)
            assert has_colour(picture, FACE)


def test_views_of_the_loader(records, tmp_path):
    options = [*OPTS, "INPUT.GS.SCALES", "[1.0]", "INPUT.GS.MAX_CROP_SIZE", "64", "SEED", "3"]
    main(["--source", "dataloader", "--output-dir", str(tmp_path), "--num-images", "9", *options])
    written = sorted(tmp_path.iterdir())
    assert len(written) == 9, "an image that comes again does not overwrite its first view"
    stems = {record["image_id"].split("/")[1] for record in records}
    assert {path.stem for path in written if path.stem in stems} and all(
        any(path.stem in (stem, f"{stem}_2", f"{stem}_3", f"{stem}_4") for stem in stems) for path in written
    )
    for path in written:
        with Image.open(path) as picture:
            assert picture.size == (64 + 4, 64 + 22 + 4)


@pytest.mark.parametrize("source", ["annotation", "dataloader"])
def test_bad_images_are_named_and_left_out(records, tmp_path, capfd, caplog, monkeypatch, source):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    changed = [records[0] | {"file_name": str(bad)}, *records[1:]]
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: changed)
    main(["--source", source, "--output-dir", str(tmp_path / "out"), "--num-images", "0", *OPTS])
    first = records[0]["image_id"].split("/")[1]
    names = {path.stem.removesuffix("_2") for path in (tmp_path / "out").iterdir()}
    assert names and first not in names
    assert (capfd.readouterr().err + caplog.text).count(f"{bad}: cannot be read as an image") == 1


@pytest.mark.parametrize("source", ["annotation", "dataloader"])
def test_coco_is_drawn(coco_toy, tmp_path, source):
    options = ["--config-file", "configs/coco/fpn.yaml", "--num-images", "2", "--output-dir", str(tmp_path)]
    options = [*options, *OPTS, "DATASETS.TRAIN", "('coco_toy_train',)", "INPUT.GS.MAX_CROP_SIZE", "130"]
    main(["--source", source, *options])
    written = sorted(tmp_path.iterdir())
    assert len(written) == 2 and all(path.stem.split("_")[0].isdigit() for path in written)
    if source == "annotation":
        with Image.open(tmp_path / "1.jpg") as picture:
            assert has_colour(picture, FACE) and has_colour(picture, IGNORED), "objects, and a crowd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "configs/none.yaml"], "none.yaml"),
        (["DATASETS.TRAIN", "('faces',)"], "faces.* is not registered"),
        (["INPUT.GS.SIZES", "1"], "INPUT.GS.SIZES"),
    ],
)
def test_errors_are_one_line(run_command, tmp_path, arguments, message):
    status, _, err = run_command(main, "--source", "annotation", "--output-dir", tmp_path, *arguments)
    assert status == 2 and re.search(f"error: .*{message}", err) and err.count("\n") == 1


def test_ignore_regions_look_different():
    grey = Image.new("RGB", (60, 50), (20, 20, 20))
    box = np.array([[10.0, 10, 40, 40]])
    face, ignored = draw_annotations(grey, box, box[:0]), draw_annotations(grey, box[:0], box)
    assert has_colour(face.crop((0, 24, 64, 76)), FACE) and not has_colour(face.crop((0, 24, 64, 76)), IGNORED)
    assert has_colour(ignored.crop((0, 24, 64, 76)), IGNORED) and not has_colour(ignored.crop((0, 24, 64, 76)), FACE)
    # Crossed: there is colour in the middle of the box, where the outline of a face has none.
    middle = (2 + 20, 24 + 20, 2 + 30, 24 + 30)
    assert has_colour(ignored.crop(middle), IGNORED) and not has_colour(face.crop(middle), FACE)


def test_boxes_without_area_are_left_out():
    grey = Image.new("RGB", (60, 50), (20, 20, 20))
    assert draw(grey, [[5, 5, 5, 20], [9, 9, 7, 32]], [FACE] * 2, crossed=[True, True]) == grey


def test_pictures_of_different_height_stand_beside_each_other():
    pictures = [Image.new("RGB", size) for size in ((30, 20), (40, 50), (10, 10))]
    assert beside(pictures, ["a", "b", "c"]).size == (30 + 40 + 10 + 2 * 4 + 4, 50 + 22 + 4)
