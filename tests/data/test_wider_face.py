"""The official lists with all their traps, and the registration of the data sets."""

import builtins
import importlib
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

import gs_d2.data
from gs_d2.data import face_eval, fddb, load_wider_face, wider_face

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
        assert set(record["attributes"]) == set(wider_face.ATTRIBUTES)
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


@pytest.mark.parametrize(
    "spelling",
    [
        GOOD.rstrip("\n"),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", " \n"),
        GOOD.replace(" ", "\t"),
        GOOD + "\n\n",
        "\n" + GOOD.replace("\n1--", "\n\n \n1--"),
        "\ufeff" + GOOD,
        GOOD.replace("1 2 3 4", "1.0 2e0 +3 4."),
    ],
    ids=["no last line end", "Windows", "trailing blanks", "tabs", "blank end", "blank lines", "BOM", "decimals"],
)
def test_spelling_does_not_matter(load, spelling):
    expected = load(GOOD)
    found = load(spelling)
    assert [r["file_name"] for r in found] == [r["file_name"] for r in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a["gt_boxes"], b["gt_boxes"])
        np.testing.assert_array_equal(a["gt_ignore"], b["gt_ignore"])


def test_an_image_of_count_0_may_have_a_dummy_row(load):
    dummy = "2--Empty/c.jpg\n0\n0 0 0 0 0 0 0 0 0 0\n"
    for text in (dummy + GOOD, "2--Empty/c.jpg\n0\n" + GOOD, dummy.replace(" 0" * 6 + "\n", "\n") + GOOD):
        records = load(text)
        check_records(records)
        assert [len(r["gt_boxes"]) for r in records] == [0, 2, 1]
    assert [len(r["gt_boxes"]) for r in load(dummy)] == [0]


def test_boxes_without_area_are_kept_and_ignored(load):
    """They count in the evaluation, as in the official tool; no anchor may learn from them."""
    (record,) = load(
        "e/a.jpg\n4\n1 2 0 5 0 0 0 0 0 0\n1 2 5 0 0 0 0 0 0 0\n9 9 -2 23 0 0 0 0 0 0\n1 1 1 1 0 0 0 0 0 0\n"
    )
    check_records([record])
    assert record["gt_boxes"].tolist() == [[1, 2, 1, 7], [1, 2, 6, 2], [9, 9, 7, 32], [1, 1, 2, 2]]
    assert record["gt_ignore"].tolist() == [True, True, True, False]


def test_an_empty_list(load):
    assert load("") == []
    assert load("\n \r\n") == []


def test_a_file_list_has_no_boxes(load):
    records = load("0--Parade/a.jpg\n\n1--Crowd/b.jpg\n\n")
    check_records(records)
    assert [r["image_id"] for r in records] == ["0--Parade/a", "1--Crowd/b"]
    assert [len(r["gt_boxes"]) for r in records] == [0, 0]


ROW = "1 2 3 4 0 0 0 0 0 0\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("e/a.jpg\n" + ROW, 2, "expected a number of faces, got '1 2 3 4 0 0 0 0 0 0'"),
        ("e/a.jpg\n-1\n", 2, "expected a number of faces, got '-1'"),
        ("e/a.jpg\n1.5\n" + ROW, 2, "expected a number of faces, got '1.5'"),
        ("e/a.jpg\n²\n" + ROW * 2, 2, "expected a number of faces, got '²'"),
        ("e/a.jpg\nmany\n", 2, "expected a number of faces, got 'many'"),
        (GOOD + "e/c.jpg\n2\n" + ROW, 11, "expected 2 rows .*, and after 1 of them got the end of the file"),
        ("e/a.jpg\n2\n" + ROW + "e/b.jpg\n1\n" + ROW, 4, "expected 2 rows .*, and after 1 of them got 'e/b.jpg'"),
        ("e/a.jpg\n1\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n99999999999999999999\n" + ROW, 4, "expected 99999999999999999999 rows"),
        ("e/a.jpg\n" + "9" * 5000 + "\n" + ROW, 2, "expected a number of faces, got '9{80}'"),
        ("e/a.jpg\n3\n" + ROW * 2 + "1 2 3 -inf 0 0 0 0 0 0\n", 5, "after 2 of them got '1 2 3 -inf"),
        ("e/a.jpg\n1\n1_0 2 3 4\n", 3, "after 0 of them got '1_0 2 3 4'"),
        ("e/a.jpg\n1\n-1000000 2 3 4\n", 3, "expected 1 rows of numbers below 1e"),
        (GOOD + "0--Parade/a.jpg\n0\n", 8, "image '0--Parade/a' for the second time, after line 1"),
        (GOOD + "0--Parade/a.png\n0\n", 8, "image '0--Parade/a' for the second time, after line 1"),
        ("e/a.jpg\ne/b.jpg\ne/a.jpg\n", 3, "image 'e/a' for the second time, after line 1"),
        (r"e/..\..\a.jpg" + "\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("e/a\0.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("e/a.jpg\n1\n" + ROW * 2, 4, "expected an image path like event/name.jpg, got '1 2 3 4 0 0 0 0 0 0'"),
        ("e/a.jpg\n1\n1 2 3 x 0 0 0 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 3 nan 0 0 0 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 inf 4 0 0 0 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 1e60 4 0 0 0 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 3\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 3 4 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n2\n1 2 3 4\n" + ROW, 4, "expected 2 rows of numbers below 1e"),
        ("e/a.jpg\n0\n" + ROW, 3, "expected 0 rows of numbers"),
        ("../a.jpg\n1\n" + ROW, 1, r"expected an image path like event/name.jpg, got '\.\./a\.jpg'"),
        ("e/../../a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("C:/a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("e/..\\..\\a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("/etc/passwd\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got '/etc/passwd'"),
        ("/a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got '/a.jpg'"),
        ("a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got 'a.jpg'"),
        ("1\n" + ROW, 1, "expected an image path like event/name.jpg, got '1'"),
        ("e/f/a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got 'e/f/a.jpg'"),
        ("e/\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got 'e/'"),
        ("e/a.jpg\ne/b.jpg\n1\n" + ROW, 1, "no number of faces"),
        ("e/a.jpg\n1\n" + ROW + "e/b.jpg\n", 4, "no number of faces"),
    ],
)
def test_errors_name_file_and_line(load, tmp_path, text, line, message):
    with pytest.raises(ValueError, match=message) as error:
        load(text)
    assert str(error.value).startswith(f"{tmp_path / 'list.txt'}:{line}: ")


def test_bytes_that_are_no_text(load):
    with pytest.raises(ValueError, match=r"list\.txt:4: not UTF-8 text"):
        load(b"e/a.jpg\n1\n1 2 3 4\ne/\xff\xfe.jpg\n1\n1 2 3 4\n")
    with pytest.raises(ValueError, match=r"list\.txt:1: not UTF-8 text"):
        load(GOOD.encode("utf-16"))


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="e/a.jpg 0123-\n\r\t\x0b²٣", max_size=40))
def test_any_text_is_read_or_refused_with_its_place(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode())
    try:
        records = load_wider_face(path, "/images")
    except ValueError as error:
        assert str(error).startswith(f"{path}:")
    else:
        check_records(records)


def test_a_crowd_is_read_whole(load):
    (record,) = load("e/a.jpg\n2000\n" + ROW * 2000)
    check_records([record])
    assert len(record["gt_boxes"]) == 2000


def test_a_damaged_mat_is_named(load, tmp_path):
    mat = tmp_path / "wider_face_val.mat"
    mat.write_bytes(b"MATLAB 5.0" + bytes(200))
    with pytest.raises(ValueError, match=r"wider_face_val\.mat: cannot be read as a MATLAB file"):
        load("e/a.jpg\n1\n1 2 3 4\n", mat)


def test_no_list_says_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/my/data")
    with pytest.raises(FileNotFoundError, match=r"There is no list .*none\.txt.*DETECTRON2_DATASETS.*'/my/data'"):
        load_wider_face(tmp_path / "none.txt", "/images")


def cells(values):
    out = np.empty((len(values), 1), dtype=object)
    for i, value in enumerate(values):
        out[i, 0] = value
    return out


def write_attributes(path, labels):
    """An official wider_face_<split>.mat: labels is event -> image -> attribute -> values."""
    content = {
        "event_list": cells(list(labels)),
        "file_list": cells([cells(list(images)) for images in labels.values()]),
    }
    for key in wider_face.ATTRIBUTES:
        content[f"{key}_label_list"] = cells(
            [cells([np.array(image[key]).reshape(-1, 1) for image in images.values()]) for images in labels.values()]
        )
    savemat(path, content)


def test_lists_of_boxes_take_their_attributes_from_the_mat(load, tmp_path):
    def labels(n, **given):
        return {key: given.get(key, [0] * n) for key in wider_face.ATTRIBUTES}

    mat = tmp_path / "wider_face_val.mat"
    write_attributes(
        mat,
        {
            "0--Parade": {"a": labels(2, invalid=[0, 1], blur=[2, 1])},
            "1--Crowd": {"b": labels(3, pose=[1, 1, 1]), "unlisted": labels(1)},
        },
    )
    text = "0--Parade/a.jpg\n2\n1 2 3 4\n5 6 7 8\n1--Crowd/b.jpg\n1\n5 6 7 8\n2--New/c.jpg\n1\n1 1 1 1\n"
    a, b, c = load(text, mat)
    check_records([a, b, c])
    assert a["attributes"]["blur"].tolist() == [2, 1]
    assert a["gt_ignore"].tolist() == [False, True]
    assert b["attributes"]["pose"].tolist() == [0], "three labels for one box fit no box"
    assert c["gt_ignore"].tolist() == [False]
    mat.write_bytes(mat.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"wider_face_val\.mat: cannot be read as a MATLAB file"):
        load(text, mat)
    savemat(mat, {"event_list": 1})
    with pytest.raises(ValueError, match=r"wider_face_val\.mat: not of the layout"):
        load(text, mat)
    # A list with attributes of its own needs no .mat, and one without does not need it to be there.
    assert load(GOOD, mat)[0]["attributes"]["blur"].tolist() == [1, 0]
    assert load(text, tmp_path / "none.mat")[0]["attributes"]["blur"].tolist() == [0, 0]


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
