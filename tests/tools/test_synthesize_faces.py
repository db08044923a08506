"""The generated data set: the same for one seed, complete, and what the readers of WIDER FACE expect."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from synthesize_faces import main

from gs_d2.data import generated_faces, load_wider_face
from gs_d2.evaluation import WiderGroundTruth

SUBSETS = ("easy", "medium", "hard", "all")


def records(root, split):
    base = root / "widerface"
    return load_wider_face(
        base / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt", base / f"WIDER_{split}" / "images"
    )


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_one_seed_gives_one_data_set(drawn_datasets, tmp_path):
    generated_faces.synthesize(tmp_path / "again", {"train": 6, "val": 4}, (128, 96), seed=0)
    again, first = contents(tmp_path / "again"), contents(drawn_datasets)
    assert set(again) == set(first) and len(first) == 10 + 2 + 4
    assert [name for name in first if first[name] != again[name]] == []
    generated_faces.synthesize(tmp_path / "other", {"train": 6, "val": 4}, (128, 96), seed=1)
    other = contents(tmp_path / "other")
    assert [name for name in first if name.endswith((".jpg", ".txt")) and first[name] == other[name]] == []


def test_more_images_keep_the_first_ones(drawn_datasets, tmp_path):
    generated_faces.synthesize(tmp_path, {"train": 2}, (128, 96), seed=0)
    images = {name: content for name, content in contents(tmp_path).items() if name.endswith(".jpg")}
    first = contents(drawn_datasets)
    assert len(images) == 2 and all(first[name] == content for name, content in images.items())


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 4)])
def test_boxes_lie_within_their_images(drawn_datasets, split, count):
    found = records(drawn_datasets, split)
    assert len(found) == count
    assert sum(len(record["gt_boxes"]) for record in found) > count
    for record in found:
        with Image.open(record["file_name"]) as image:
            assert image.size == (128, 96) and image.mode == "RGB"
        boxes = record["gt_boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all() and (boxes <= [128, 96, 128, 96]).all()
        scales = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
        assert (scales > 6).all(), "8 px, less what rounding takes off each side"
        assert not record["gt_ignore"].any()


def test_faces_of_every_scale_are_drawn():
    boxes = np.concatenate(
        [
            generated_faces.draw_scene(np.random.default_rng([0, i]), (384, 288), crowded=i % 4 == 0)[1]
            for i in range(24)
        ]
    )
    scales = np.sqrt(boxes[:, 2] * boxes[:, 3])
    for low, high in ((0, 12), (12, 24), (24, 48), (48, 96), (96, 170)):
        assert ((scales >= low) & (scales < high)).sum() >= 5
    assert scales.max() < 165


def test_faces_are_where_the_boxes_say():
    """The same scene with and without a face differs in its box and nowhere else."""
    plain = Image.new("RGB", (300, 300), (10, 200, 10))
    drawn = plain.copy()
    generated_faces.draw_face(
        np.random.default_rng(0), drawn, 20, 30, 40, 52
    )  # pixels of the image, a third of the canvas's
    rows, columns = np.nonzero((np.asarray(drawn) != np.asarray(plain)).any(axis=2))
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / generated_faces.SUPERSAMPLING
    np.testing.assert_allclose(found, [20, 30, 60, 82], atol=0.7)


def test_ground_truth_is_read_and_nested(drawn_datasets):
    truth = WiderGroundTruth.from_mat_files(drawn_datasets / "widerface" / "ground_truth")
    found = {record["image_id"]: record["gt_boxes"] for record in records(drawn_datasets, "val")}
    assert sorted(truth.image_ids) == sorted(found)
    for i, image_id in enumerate(truth.image_ids):
        np.testing.assert_array_equal(truth.boxes[truth.offsets[i] : truth.offsets[i + 1]], found[image_id])
    for smaller, larger in pairwise(SUBSETS):
        assert (truth.subsets[larger] | ~truth.subsets[smaller]).all(), f"{smaller} lies in {larger}"
    heights = truth.boxes[:, 3] - truth.boxes[:, 1]
    for subset, least in (("easy", 48), ("medium", 24), ("hard", 10)):
        np.testing.assert_array_equal(truth.subsets[subset], heights >= least)
    assert truth.subsets["all"].all() and truth.subsets["all_valid"].all()
    assert 0 < truth.subsets["easy"].sum() < len(truth.boxes)


def test_one_validation_image_is_enough(tmp_path):
    """One event is then without images."""
    generated_faces.synthesize(tmp_path, {"val": 1}, (96, 96), seed=0)
    truth = WiderGroundTruth.from_mat_files(tmp_path / "widerface" / "ground_truth")
    assert truth.image_ids == [record["image_id"] for record in records(tmp_path, "val")]


def test_images_too_small_for_any_face(tmp_path):
    generated_faces.synthesize(tmp_path, {"train": 2}, (8, 8), seed=0)
    assert [len(record["gt_boxes"]) for record in records(tmp_path, "train")] == [0, 0]


def test_command_line(tmp_path, run_command):
    command = f"--output {tmp_path} --train 1 --val 1 --seed 3 --size"
    assert run_command(main, *command.split(), 48, 64)[0] == 0
    (record,) = records(tmp_path, "train")
    with Image.open(record["file_name"]) as image:
        assert image.size == (64, 48)


@pytest.mark.parametrize("wrong", [["--train", "-1"], ["--size", "0", "64"], ["--seed", "-1"]])
def test_a_wrong_number(tmp_path, run_command, wrong):
    status, _, err = run_command(main, "--output", tmp_path / "out", *wrong)
    assert status == 2 and "--size at least 1" in err and not list(tmp_path.iterdir())
