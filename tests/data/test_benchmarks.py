"""FDDB, AFW and PASCAL faces as data sets: the official annotations, their traps, and missing files."""

import shutil

import numpy as np
import pytest
from detectron2.config import get_cfg
from scipy.io import savemat

from gs_d2.config import add_gs_config
from gs_d2.data import FaceDatasetMapper, load_face_eval, load_fddb
from gs_d2.formats.face_eval import read_annotations
from gs_d2.formats.fddb import read_annotations as read_ellipses


def check_records(records):
    """What every record must be, as of WIDER FACE."""
    assert len({record["image_id"] for record in records}) == len(records)
    for record in records:
        n = len(record["gt_boxes"])
        assert record["gt_boxes"].shape == (n, 4) and record["gt_boxes"].dtype == np.float32
        assert (record["gt_boxes"][:, 2:] > record["gt_boxes"][:, :2]).all()
        assert record["gt_ignore"].shape == (n,) and record["gt_ignore"].dtype == bool
        assert record["attributes"] == {}
        assert record["file_name"].endswith(f"/{record['image_id']}.jpg")


def with_empty_images(root, names):
    """No images of these data sets can be had here; the loaders only look whether they are there."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_official_fddb(shared_data, tmp_path):
    folds = shared_data / "fddb" / "folds"
    images = with_empty_images(tmp_path, [f"{image}.jpg" for image in read_ellipses(folds)])
    records = load_fddb(folds, images)
    check_records(records)
    assert len(records) == 2845 and sum(len(r["gt_boxes"]) for r in records) == 5171
    first = records[0]
    assert first["image_id"] == "2002/08/11/big/img_591"
    assert first["gt_ellipses"].tolist() == [[123.5833, 85.5495, 1.265839, 269.6934, 161.7812]]
    # The longer axis is nearly upright, so the box is nearly as high as it is long.
    x1, y1, x2, y2 = first["gt_boxes"][0]
    assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((269.6934, 161.7812), abs=1e-3)
    assert 2 * 85 < x2 - x1 < y2 - y1 < 2 * 123.6
    assert not any(r["gt_ignore"].any() for r in records)


@pytest.mark.parametrize(
    ("benchmark", "mat", "num_images", "num_boxes", "num_faces"),
    [
        ("afw", "new_annotations_AFW.mat", 205, 545, 473),
        ("pascal_face", "Annotations_Face_PASCALLayout_large_fixed.mat", 851, 1635, 1341),
    ],
)
def test_official_afw_and_pascal(shared_data, tmp_path, benchmark, mat, num_images, num_boxes, num_faces):
    with pytest.raises(FileNotFoundError, match=f"{num_images} of {num_images} images") as error:
        load_face_eval(benchmark, shared_data / "afw_pascal" / mat, tmp_path)
    assert str(tmp_path) in str(error.value)

    faces = read_annotations(shared_data / "afw_pascal" / mat, benchmark)
    images = with_empty_images(tmp_path, [f"{name}.jpg" for name in faces.boxes])
    records = load_face_eval(benchmark, shared_data / "afw_pascal" / mat, images)
    check_records(records)
    assert len(records) == num_images and sum(len(r["gt_boxes"]) for r in records) == num_boxes
    assert sum((~r["gt_ignore"]).sum() for r in records) == num_faces
    # The evaluator takes the faces from the dicts: nothing may be lost on the way to float32.
    assert all((r["gt_boxes"] == faces.boxes[r["image_id"]]).all() for r in records)


def test_made_up_sets_give_views(made_up_benchmarks):
    """Dicts, images and the mapper: height and width are those of the file, boxes lie around the ellipses."""
    cfg = get_cfg()
    add_gs_config(cfg)
    root = made_up_benchmarks
    sets = {
        "fddb": load_fddb(root / "fddb" / "FDDB-folds", root / "fddb" / "originalPics"),
        "afw": load_face_eval("afw", root / "afw", root / "afw" / "testimages"),
        "pascal_face": load_face_eval(
            "pascal_face", root / "pascal_face" / "annotations", root / "pascal_face" / "images"
        ),
    }
    assert [len(records) for records in sets.values()] == [5, 4, 4]
    for records in sets.values():
        check_records(records)
        for is_train in (True, False):
            view = FaceDatasetMapper(cfg, is_train=is_train)(records[0])
            assert view["image"].shape[0] == 3 and view["image_id"] == records[0]["image_id"]
    view = FaceDatasetMapper(cfg, is_train=False)(sets["afw"][0])
    assert (view["height"], view["width"]) == (96, 128)
    assert len(sets["afw"][3]["gt_boxes"]) == 0
    for record in sets["fddb"]:
        major, minor, _, cx, cy = record["gt_ellipses"].T
        sides = record["gt_boxes"][:, 2:] - record["gt_boxes"][:, :2]
        assert (sides <= 2 * major[:, None] + 1e-3).all() and (sides >= 2 * minor[:, None] - 1e-3).all()
        centres = (record["gt_boxes"][:, 2:] + record["gt_boxes"][:, :2]) / 2
        np.testing.assert_allclose(centres, np.stack([cx, cy], axis=1), atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n2\n9 8 0.1 30 30 1\n", r"ellipseList\.txt, line 2: says 2 but 1 follow"),
        ("a\n1\n9 8 0.1 30 30\n", r"ellipseList\.txt, line 3: need 6 numbers, got 5"),
        ("a\n1\n9 8 nan 30 30 1\n", r"ellipseList\.txt, line 3: NaN"),
        ("a\n0\na\n0\n", r"ellipseList\.txt, line 3: image a for the second time"),
        ("a\n1\n9 8 0 3 3 1\nb/../../c\n0\n", r"ellipseList\.txt, line 4: expected an image path like"),
        ("../../etc/a\n0\n", r"ellipseList\.txt, line 1: expected an image path like"),
        ("/etc/a\n0\n", r"ellipseList\.txt, line 1: expected an image path like"),
        ("..\\\\a\n0\n", r"ellipseList\.txt, line 1: expected an image path like"),
        ("a\n-1\n", r"ellipseList\.txt, line 2: need the number of detections, got '-1'"),
        ("a\nmany\n", r"ellipseList\.txt, line 2: need the number of detections, got 'many'"),
        ("a\n1e300\n", r"ellipseList\.txt, line 2: need the number of detections, got '1e300'"),
        ("a\n1_0\n", r"ellipseList\.txt, line 2: need the number of detections, got '1_0'"),
        ("a\n1\n9 8 0 3 3 1\n9 8 0 3 3 1\n", r"ellipseList\.txt, line 5: missing"),
        ("a\n2\n9 8 0 3 3 1\n9 -8 0 3 3 1\n", r"ellipseList\.txt, line 4: need radii above 0 .* got '9 -8 0 3 3 1'"),
        ("a\n1\n0 0 0 3 3 1\n", r"ellipseList\.txt, line 3: need radii above 0"),
        ("a\n1\n9 8 0 3e7 3 1\n", r"ellipseList\.txt, line 3: need radii above 0 and numbers below 1e"),
    ],
)
def test_malformed_lists(tmp_path, text, message):
    (tmp_path / "FDDB-fold-01-ellipseList.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_fddb(tmp_path, tmp_path)


def test_spelling_of_lists_does_not_matter(tmp_path):
    """The official lists have two blanks before the last column; some copies have CR LF or .jpg."""
    text = "2002/a\n1\n9 8 0.1 30 30  1\n2002/b\n0\n"
    with_empty_images(tmp_path, ["2002/a.jpg", "2002/b.jpg"])
    for spelling in (text, text.replace("\n", "\r\n"), text.replace("1\n", "1 \n"), text.replace("/b", "/b.jpg")):
        (tmp_path / "FDDB-fold-01-ellipseList.txt").write_bytes(spelling.encode())
        (tmp_path / "FDDB-fold-01.txt").write_text("2002/a\n2002/b\n")  # the list of names is none of ellipses
        records = load_fddb(tmp_path, tmp_path)
        check_records(records)
        assert [(r["image_id"], len(r["gt_boxes"])) for r in records] == [("2002/a", 1), ("2002/b", 0)]


def test_what_is_missing_is_named(made_up_benchmarks, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    shutil.copytree(made_up_benchmarks, tmp_path, dirs_exist_ok=True)
    loaders = {
        "fddb": lambda: load_fddb(tmp_path / "fddb/FDDB-folds", tmp_path / "fddb/originalPics"),
        "afw": lambda: load_face_eval("afw", tmp_path / "afw/annotations", tmp_path / "afw/testimages"),
        "pascal_face": lambda: load_face_eval(
            "pascal_face", tmp_path / "pascal_face/annotations", tmp_path / "pascal_face/images"
        ),
    }
    steps = [
        ("fddb", "fddb/originalPics/a.jpg", "1 of 5 images are missing"),
        ("fddb", "fddb/originalPics", "no folder"),
        ("fddb", "fddb/FDDB-folds/FDDB-fold-01-ellipseList.txt", "no folder"),  # a part of the folds is a set too
        ("fddb", "fddb/FDDB-folds/FDDB-fold-02-ellipseList.txt", "no FDDB-fold"),
        ("fddb", "fddb/FDDB-folds", "no such file or folder"),
        ("afw", "afw/testimages/0_afw.jpg", "1 of 4 images are missing"),
        ("afw", "afw/annotations/new_annotations_AFW.mat", r"no new_annotations_AFW\.mat"),
        ("pascal_face", "pascal_face/images", "no folder"),
        ("pascal_face", "pascal_face/annotations", "no such file or folder"),
    ]
    for name, path, message in steps:
        target = tmp_path / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        with pytest.raises(FileNotFoundError, match=message) as error:
            loaders[name]()
        text = str(error.value)
        assert f"$DETECTRON2_DATASETS (now {str(tmp_path)!r}) as {name}/" in text and str(tmp_path / name) in text


@pytest.mark.parametrize(
    ("objects_of", "message"),
    [
        ({"a.jpg": [[1, 2, 50, 60, 0, 0]], "x/a.png": []}, "image 'a' has no name, or comes a second time"),
        ({"..": []}, "image '' has no name"),
        ({"a.jpg": [[1, 2, np.nan, 60, 0, 0]]}, "a box of image 'a' is not of numbers below 1e"),
        ({"a.jpg": [[1, 2, 5e7, 60, 0, 0]]}, "a box of image 'a' is not of numbers below 1e"),
    ],
    ids=["twice", "climbing name", "NaN", "huge"],
)
def test_malformed_face_eval_annotations(tmp_path, objects_of, message):
    path = tmp_path / "new_annotations_AFW.mat"
    records = np.zeros((len(objects_of), 1), dtype=[("imgname", "O"), ("objects", "O")])
    for i, (name, objects) in enumerate(objects_of.items()):
        records[i, 0] = (name, np.asarray(objects, dtype=float).reshape(-1, 6))
    savemat(path, {"Annotations": records})
    with pytest.raises(ValueError, match=message) as error:
        load_face_eval("afw", path, tmp_path)
    assert str(path) in str(error.value)


def test_a_link_that_leads_to_itself_is_a_missing_image(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "FDDB-fold-01-ellipseList.txt").write_text("a\n0\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images are missing, first .*a\.jpg"):
        load_fddb(tmp_path, tmp_path)


def test_an_unknown_benchmark(tmp_path):
    with pytest.raises(ValueError, match="benchmark must be one of afw, pascal_face, got 'wider'"):
        load_face_eval("wider", tmp_path, tmp_path)
