"""Dataset dicts of the official lists, and the registration of the data sets."""

import builtins
import importlib
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

import gs_d2.data
from gs_d2.data import face_eval, fddb, load_wider_face, wider_face
from gs_d2.formats.wider_face import LABELS

GOOD = "0--Parade/a.jpg\n2\n1 2 3 4 1 1 0 0 2 1\n10 20 30 40 0 0 0 1 0 0\n1--Crowd/b.jpg\n1\n5 6 7 8 2 0 1 0 1 0\n"


@pytest.fixture
def load(tmp_path):
    def load(text, attributes_mat=None):
        path = tmp_path / "list.txt"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_wider_face(path, "/images", attributes_mat)

    return load


def check_records(records):
    """What every record must be, whatever the list."""
    for record in records:
        n = len(record["gt_boxes"])
        assert record["gt_boxes"].shape == (n, 4) and record["gt_boxes"].dtype == np.float32
        assert record["gt_ignore"].shape == (n,) and record["gt_ignore"].dtype == bool
        assert tuple(record["attributes"]) == LABELS
        assert all(v.shape == (n,) and v.dtype == np.uint8 for v in record["attributes"].values())
        assert np.isfinite(record["gt_boxes"]).all()
        assert len(record["image_id"].split("/")) == 2 and ".." not in record["image_id"].split("/")


def test_a_list(load):
    a, b = load(GOOD)
    check_records([a, b])
    assert (a["file_name"], a["image_id"]) == ("/images/0--Parade/a.jpg", "0--Parade/a")
    assert a["gt_boxes"].tolist() == [[1, 2, 4, 6], [10, 20, 40, 60]]
    assert a["gt_ignore"].tolist() == [False, True]
    assert {key: values.tolist() for key, values in a["attributes"].items()} == {
        "blur": [1, 0],
        "expression": [1, 0],
        "illumination": [0, 0],
        "invalid": [0, 1],
        "occlusion": [2, 0],
        "pose": [1, 0],
    }
    assert b["image_id"] == "1--Crowd/b" and b["gt_boxes"].tolist() == [[5, 6, 12, 14]]


def test_the_mat_is_read_for_lists_of_boxes_where_it_is_there(load, tmp_path):
    mat, boxes = tmp_path / "wider_face_val.mat", "e/a.jpg\n1\n1 2 3 4\n"
    assert load(boxes, mat)[0]["attributes"]["blur"].tolist() == [0]
    mat.write_bytes(b"MATLAB 5.0" + bytes(200))
    with pytest.raises(ValueError, match=r"wider_face_val\.mat: cannot be read as a MATLAB file"):
        load(boxes, mat)
    assert load(GOOD, mat)[0]["attributes"]["blur"].tolist() == [1, 0]


def test_no_list_says_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/my/data")
    with pytest.raises(FileNotFoundError, match=r"There is no list .*none\.txt.*DETECTRON2_DATASETS.*'/my/data'"):
        load_wider_face(tmp_path / "none.txt", "/images")


@pytest.mark.parametrize(
    ("split", "images", "boxes", "invalid", "without_area"),
    [("train", 12_880, 159_420, 2_399, 27), ("val", 3_226, 39_708, 585, 11)],
)
def test_official_counts(shared_data, split, images, boxes, invalid, without_area):
    records = load_wider_face(
        shared_data / "wider_face" / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt", "/images"
    )
    assert len(records) == len({r["image_id"] for r in records}) == images
    all_boxes = np.concatenate([r["gt_boxes"] for r in records])
    flagged = np.concatenate([r["attributes"]["invalid"] for r in records]) > 0
    empty = (all_boxes[:, 2:] <= all_boxes[:, :2]).any(axis=1)
    assert (len(all_boxes), flagged.sum(), empty.sum()) == (boxes, invalid, without_area)
    np.testing.assert_array_equal(np.concatenate([r["gt_ignore"] for r in records]), flagged | empty)


def test_official_file_list(shared_data):
    records = load_wider_face(
        shared_data / "wider_face" / "wider_face_split" / "wider_face_test_filelist.txt", "/images"
    )
    assert len(records) == 16_097
    assert all(len(r["gt_boxes"]) == 0 for r in records)


@pytest.mark.parametrize(("split", "count"), [("train", 450), ("val", 130)])
def test_mini_wider_has_its_images(shared_data, split, count):
    base = shared_data / "mini_wider" / "widerface"
    records = load_wider_face(
        base / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt", base / f"WIDER_{split}" / "images"
    )
    assert len(records) == count
    assert all(os.path.isfile(record["file_name"]) for record in records)


class Catalog(dict):
    """Stands in for Detectron2's catalogs, which hold the real names already."""

    def register(self, name, function):
        self[name] = function

    def get(self, name):
        return self.setdefault(name, Metadata())


class Metadata(dict):
    def set(self, **values):
        self.update(values)


@pytest.fixture
def catalogs(monkeypatch):
    datasets, metadata = Catalog(), Catalog()
    for module in (wider_face, fddb, face_eval):
        monkeypatch.setattr(module, "DatasetCatalog", datasets)
        monkeypatch.setattr(module, "MetadataCatalog", metadata)
    return datasets, metadata


def test_registration_touches_no_file(catalogs, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"touches {args}")

    with monkeypatch.context() as patch:
        for module, name in ((builtins, "open"), (os, "stat"), (os, "listdir"), (os, "scandir"), (os, "open")):
            patch.setattr(module, name, refuse)
        with pytest.raises(AssertionError, match="touches"):  # the trap works
            os.path.exists("/")
        wider_face.register_all_wider_face("/nowhere/at/all")
        fddb.register_all_fddb("/nowhere/at/all")
        face_eval.register_all_face_eval("/nowhere/at/all")
    datasets, metadata = catalogs
    names = ["afw", "fddb", "pascal_face", "wider_face_test", "wider_face_train", "wider_face_val"]
    assert sorted(datasets) == names
    assert metadata.get("wider_face_val") == {
        "thing_classes": ["face"],
        "thing_dataset_id_to_contiguous_id": {1: 0},
        "evaluator_type": "wider_face",
        "list_file": "/nowhere/at/all/widerface/wider_face_split/wider_face_val_bbx_gt.txt",
        "image_root": "/nowhere/at/all/widerface/WIDER_val/images",
        "ground_truth_dir": "/nowhere/at/all/widerface/ground_truth",
    }
    with pytest.raises(FileNotFoundError, match=r"wider_face_train_bbx_gt\.txt"):
        datasets["wider_face_train"]()


@pytest.mark.parametrize(("root", "expected"), [("/my/data", "/my/data"), (None, "datasets")])
def test_import_registers_below_detectron2_datasets(catalogs, monkeypatch, root, expected):
    if root is None:
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    else:
        monkeypatch.setenv("DETECTRON2_DATASETS", root)
    importlib.reload(gs_d2.data)
    assert catalogs[1].get("wider_face_test")["list_file"] == (
        f"{expected}/widerface/wider_face_split/wider_face_test_filelist.txt"
    )
    assert catalogs[1].get("fddb")["annotations"] == f"{expected}/fddb/FDDB-folds"
    assert catalogs[1].get("afw")["image_root"] == f"{expected}/afw/testimages"
    assert catalogs[1].get("pascal_face")["image_root"] == f"{expected}/pascal_face/images"


def test_own_data_sets_can_be_registered(tmp_path):
    (tmp_path / "list.txt").write_text(GOOD)
    name = "test_own_faces"
    gs_d2.data.register_wider_face(name, tmp_path / "list.txt", tmp_path)
    try:
        assert [len(r["gt_boxes"]) for r in DatasetCatalog.get(name)] == [2, 1]
        assert MetadataCatalog.get(name).ground_truth_dir is None
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
