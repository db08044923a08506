"""check_data_sets: what cannot be trained or tested on is refused in one line, before anything is started for it."""

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from gs_d2.data import check_data_sets, register_face_eval, register_fddb, register_wider_face

NAMES = ("checked_train", "checked_val", "checked_test", "checked_coco", "checked_fddb", "checked_afw")


@pytest.fixture
def base(drawn_datasets, tmp_path):
    """A copy of two splits and a file list, registered as the first three of NAMES, and of COCO's format the fourth."""
    base = tmp_path / "widerface"
    shutil.copytree(drawn_datasets / "widerface", base)
    for split, name in (("train", NAMES[0]), ("val", NAMES[1])):
        register_wider_face(
            name, base / f"wider_face_split/wider_face_{split}_bbx_gt.txt", base / f"WIDER_{split}/images"
        )
    images = base / "WIDER_val/images"
    (base / "files.txt").write_text("".join(f"{p.parent.name}/{p.name}\n" for p in sorted(images.rglob("*.jpg"))))
    register_wider_face(NAMES[2], base / "files.txt", images)
    first = sorted(images.rglob("*.jpg"))[0]
    content = {
        "images": [{"id": 1, "file_name": f"{first.parent.name}/{first.name}", "height": 96, "width": 128}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40]}],
        "categories": [{"id": 1, "name": "face"}],
    }
    (base / "coco.json").write_text(json.dumps(content))
    register_coco_instances(NAMES[3], {}, str(base / "coco.json"), str(images))
    register_fddb(NAMES[4], base / "FDDB-folds", base / "originalPics")
    register_face_eval(NAMES[5], "afw", base / "annotations", base / "testimages")
    yield base
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def refusal(train_names, test_names) -> str:
    with pytest.raises(ValueError) as error:
        check_data_sets(train_names, test_names)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_there_passes(base):
    train, val, test, coco, *_ = NAMES
    check_data_sets((train, val), (val, test))
    check_data_sets((train,), ())  # without an evaluation
    check_data_sets(None, (val,))
    check_data_sets((coco,), (coco,))
    next((base / "WIDER_train/images").rglob("*.jpg")).unlink()
    check_data_sets((train,), (val,))  # training goes on without a bad image


@pytest.mark.parametrize(("position", "others"), [(0, ()), (1, ("checked_val",)), (2, ("checked_val", "checked_test"))])
def test_each_of_several_is_looked_at(base, monkeypatch, position, others):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/my/data")
    path = base / "wider_face_split/wider_face_train_bbx_gt.txt"
    path.unlink()
    names = [*others[:position], "checked_train"]
    for key, arguments in (("TRAIN", (names, ())), ("TEST", (None, names)), ("TEST", (["checked_val"], names))):
        if "checked_test" in names and key == "TRAIN":
            continue
        said = refusal(*arguments)
        assert said.startswith(f"DATASETS.{key} checked_train: There is no list {path}. WIDER FACE belongs under ")
        assert "$DETECTRON2_DATASETS (now '/my/data')" in said and "tools/prepare_wider_face.py" in said


def test_missing_images(base):
    images = base / "WIDER_val/images"
    first = sorted(images.rglob("*.jpg"))[0]
    first.unlink()
    assert f"DATASETS.TEST checked_val: 1 of 4 images are missing, first {first}. WIDER FACE" in refusal(
        None, ["checked_val"]
    )
    shutil.rmtree(images)
    for train_names, test_names in ((["checked_val"], ()), (None, ["checked_val"]), (["checked_coco"], ())):
        assert f": There is no folder {images} with the images. " in refusal(train_names, test_names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"e/a.jpg\nmany\n", "wider_face_train_bbx_gt.txt:2: expected a number of faces, got 'many'"),
        (b"e/\xff.jpg\n", "wider_face_train_bbx_gt.txt:1: not UTF-8"),
        (b"", "DATASETS.TRAIN checked_train: it has no image"),
        (b"e/a.jpg\n0\n0 0 0 0\n", "DATASETS.TRAIN checked_train: it has no annotated faces to train on"),
    ],
)
def test_lists_that_cannot_be_used(base, content, message):
    (base / "wider_face_split/wider_face_train_bbx_gt.txt").write_bytes(content)
    assert message in refusal(["checked_train"], [])


def test_a_list_without_permission(base, monkeypatch):
    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    monkeypatch.setattr("builtins.open", denied)
    assert "Permission denied: '" + str(base / "wider_face_split") in refusal(["checked_train"], [])
    assert f"Permission denied: '{base / 'coco.json'}'" in refusal(None, ["checked_coco"])


def test_a_file_list_cannot_be_trained_on(base):
    assert refusal(["checked_test"], []) == "DATASETS.TRAIN checked_test: it has no annotated faces to train on"


def test_other_formats(base):
    (base / "coco.json").unlink()
    assert f"DATASETS.TRAIN checked_coco: There is no list {base / 'coco.json'}. checked_coco belongs under" in refusal(
        ["checked_coco"], []
    )
    for name in NAMES[4:]:
        said = refusal(None, [name])
        assert said.startswith(f"DATASETS.TEST {name}: ") and str(base) in said and "DETECTRON2_DATASETS" in said


def test_names(base):
    assert refusal(["checked_trian"], []).startswith(
        "DATASETS.TRAIN: no data set is registered as 'checked_trian'; did you mean checked_train"
    )
    assert "registered as 'q'; docs/data.md has those there are" in refusal(["checked_train"], ["q"])
    assert refusal([], ["checked_val"]) == "DATASETS.TRAIN is empty: name a data set, such as wider_face_train"
    assert refusal(None, []) == "DATASETS.TEST is empty: name a data set, such as wider_face_val"
