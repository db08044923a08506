"""WIDER FACE's MATLAB files of annotated faces: the official ones, and what is refused."""

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from gs_d2.formats.wider_face import WiderGroundTruth

SUBSETS = ("easy", "medium", "hard")


@pytest.fixture(scope="module")
def official(shared_data):
    return WiderGroundTruth.from_mat_files(shared_data / "wider_face" / "ground_truth")


def test_counts_of_the_ground_truth(official):
    counts = {name: int(mask.sum()) for name, mask in official.subsets.items()}
    assert len(official.image_ids) == 3226
    assert len(official.boxes) == 39708
    assert {name: counts[name] for name in (*SUBSETS, "all")} == {
        "easy": 7211,
        "medium": 13319,
        "hard": 31958,
        "all": 39708,
    }
    easy, medium, hard, valid = (official.subsets[name] for name in (*SUBSETS, "all_valid"))
    assert not (easy & ~medium).any() and not (medium & ~hard).any()
    empty = (official.boxes[:, 2:] <= official.boxes[:, :2]).any(axis=1)
    assert empty.sum() == 11 and (empty & hard).sum() == 1
    assert 39708 - 585 - 11 <= valid.sum() <= 39708 - 585 and not (valid & empty).any()
    for attribute in ("blur", "expression", "illumination", "occlusion", "pose"):
        assert sum(n for name, n in counts.items() if name.startswith(attribute + ".")) == 39708


def cell(items):
    """A MATLAB cell array of shape (n, 1)."""
    array = np.empty((len(items), 1), dtype=object)
    for i, item in enumerate(items):
        array[i, 0] = item
    return array


def write_ground_truth(folder, *, images=("a_1", "a_2"), kept=((1,), ())):
    folder.mkdir(parents=True, exist_ok=True)
    lists = {"event_list": cell(["0--Parade"]), "file_list": cell([cell(list(images))])}
    boxes = [np.array([[1, 2, 3, 4], [10, 10, 0, 5]]), np.array([[5, 5, 5, 5]])]
    labels = {
        f"{name}_label_list": cell([cell([np.array([[0], [1]]), np.array([[1 if name == "invalid" else 0]])])])
        for name in ("blur", "expression", "illumination", "invalid", "occlusion", "pose")
    }
    savemat(folder / "wider_face_val.mat", lists | labels | {"face_bbx_list": cell([cell(boxes)])})
    for name in SUBSETS:
        gt_list = cell([cell([np.array(k, float).reshape(-1, 1) for k in kept])])
        savemat(folder / f"wider_{name}_val.mat", lists | {"gt_list": gt_list})


def test_official_layout(tmp_path):
    write_ground_truth(tmp_path / "eval_tools" / "ground_truth")
    for path in (tmp_path, tmp_path / "eval_tools" / "ground_truth"):
        ground_truth = WiderGroundTruth.from_mat_files(path)
        assert ground_truth.image_ids == ["0--Parade/a_1", "0--Parade/a_2"]
        assert ground_truth.boxes.tolist() == [[1, 2, 4, 6], [10, 10, 10, 15], [5, 5, 10, 10]]
        assert ground_truth.offsets.tolist() == [0, 2, 3]
        assert ground_truth.subsets["hard"].tolist() == [True, False, False]
        assert ground_truth.subsets["all_valid"].tolist() == [True, False, False]
        assert ground_truth.subsets["blur.normal"].tolist() == [False, True, False]


def test_missing_and_wrong_ground_truth(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wider_face_val\.mat"):
        WiderGroundTruth.from_mat_files(tmp_path)
    write_ground_truth(tmp_path / "a")
    (tmp_path / "a" / "wider_hard_val.mat").unlink()
    assert "hard" not in WiderGroundTruth.from_mat_files(tmp_path / "a").subsets
    write_ground_truth(tmp_path / "b", kept=((3,), ()))
    with pytest.raises(ValueError, match=r"wider_easy_val\.mat: 0--Parade/a_1 has no box 3"):
        WiderGroundTruth.from_mat_files(tmp_path / "b")
    with pytest.raises(ValueError, match=r"both a/wider_face_val\.mat and b/"):
        WiderGroundTruth.from_mat_files(tmp_path)
    (tmp_path / "a" / "wider_face_val.mat").write_bytes(b"x" * 300)
    with pytest.raises(ValueError, match=r"a.wider_face_val\.mat: cannot be read"):
        WiderGroundTruth.from_mat_files(tmp_path / "a")
    savemat(tmp_path / "a" / "wider_face_val.mat", {"other": 1})
    with pytest.raises(ValueError, match=r"a.wider_face_val\.mat: not of the layout"):
        WiderGroundTruth.from_mat_files(tmp_path / "a")


def test_an_event_without_images_is_of_another_layout(tmp_path):
    write_ground_truth(tmp_path)
    content = loadmat(tmp_path / "wider_face_val.mat")
    content["event_list"] = cell(["0--Parade", "1--Crowd"])
    savemat(tmp_path / "wider_face_val.mat", {name: v for name, v in content.items() if not name.startswith("__")})
    with pytest.raises(ValueError, match=r"wider_face_val\.mat: not of the layout"):
        WiderGroundTruth.from_mat_files(tmp_path)


def test_subsets_of_other_images(tmp_path):
    write_ground_truth(tmp_path / "a")
    write_ground_truth(tmp_path / "b", images=("a_1", "a_3"))
    (tmp_path / "b" / "wider_easy_val.mat").replace(tmp_path / "a" / "wider_easy_val.mat")
    with pytest.raises(ValueError, match=r"wider_easy_val\.mat: lists other images"):
        WiderGroundTruth.from_mat_files(tmp_path / "a")


def test_a_dataset_list_equals_the_official_file(official, shared_data):
    """The fallback of the evaluator: boxes and labels as data registration gives them."""
    mat = loadmat(shared_data / "wider_face" / "ground_truth" / "wider_face_val.mat")
    invalid = np.concatenate([np.concatenate([i[0] for i in e[0]]) for e in mat["invalid_label_list"]]).ravel()
    parts = [slice(a, b) for a, b in zip(official.offsets[:-1], official.offsets[1:], strict=True)]
    from_list = WiderGroundTruth.from_boxes(
        official.image_ids, [official.boxes[p] for p in parts], [{"invalid": invalid[p]} for p in parts]
    )
    assert set(from_list.subsets) == {"all", "all_valid"}
    np.testing.assert_array_equal(from_list.subsets["all_valid"], official.subsets["all_valid"])


def test_from_boxes_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="twice"):
        WiderGroundTruth.from_boxes(["e/i", "e/i"], [[], []])
    with pytest.raises(ValueError, match="blur"):
        WiderGroundTruth.from_boxes(["e/i"], [np.zeros((2, 4))], [{"blur": np.zeros(3)}])
