"""The loaders: bad images are reported once for all workers and replaced, and no test image is ever dropped."""

import logging
import re

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from gs_d2.config import add_gs_config
from gs_d2.data import build_test_loader, register_wider_face
from gs_d2.data.dataset_mapper import FaceDatasetMapper, off_the_image
from gs_d2.data.loaders import TrainingViews
from gs_d2.engine import Trainer

NAME = "test_loaders"
LOGGER = "gs_d2.data.loaders"


@pytest.fixture
def data_set(tmp_path):
    """Registers e/0.png, e/1.png, ... of 60 x 40, of which some are broken."""

    def make(num_images, broken=(), boxes="10 10 20 20"):
        (tmp_path / "e").mkdir()
        lines = []
        for i in range(num_images):
            Image.new("RGB", (60, 40), (i, i, i)).save(tmp_path / f"e/{i}.png")
            lines += [f"e/{i}.png", "1", boxes]
        for i in broken:
            (tmp_path / f"e/{i}.png").write_bytes(b"")
        (tmp_path / "list.txt").write_text("\n".join(lines))
        register_wider_face(NAME, tmp_path / "list.txt", tmp_path)
        return tmp_path

    yield make
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def config(*opts):
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_list(
        ["DATASETS.TRAIN", (NAME,), "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 4, "SEED", 1, *opts]
    )
    cfg.merge_from_list(["INPUT.GS.SCALES", [1.0], "INPUT.FORMAT", "RGB", "INPUT.MIN_SIZE_TEST", 0])
    return cfg


def take(loader, num_batches):
    """image_id of the views of so many batches."""
    iterator = iter(loader)
    return [view["image_id"] for _ in range(num_batches) for view in next(iterator)]


def reports(text):
    return [line for line in text.splitlines() if "Left out of training" in line]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_reported_once_and_replaced(data_set, num_workers, tmp_path):
    data_set(10, broken=(3, 7))
    log = tmp_path / "log.txt"
    handler = logging.FileHandler(log)  # workers are forks and write into it, too
    logging.getLogger(LOGGER).addHandler(handler)
    try:
        taken = take(Trainer.build_train_loader(config("DATALOADER.NUM_WORKERS", num_workers)), 30)
    finally:
        logging.getLogger(LOGGER).removeHandler(handler)
    assert len(taken) == 120 and set(taken) == {f"e/{i}" for i in range(10) if i not in (3, 7)}
    lines = reports(log.read_text())  # twelve epochs
    assert len(lines) == 2
    assert sum("e/3.png: cannot be read as an image (the file is empty)" in line for line in lines) == 1
    assert sum("e/7.png: cannot be read as an image (the file is empty)" in line for line in lines) == 1


def test_what_replaces_does_not_depend_on_what_is_known(data_set):
    data_set(12, broken=(0, 1, 2, 3))
    records = DatasetCatalog.get(NAME)
    mapper = FaceDatasetMapper(config(), is_train=True)
    knows = TrainingViews(records, mapper)
    for i in range(12):
        knows[i]
    for seed in range(8):
        np.random.seed(seed)
        first = [TrainingViews(records, mapper)[i]["image_id"] for i in (0, 5, 1, 2)]
        np.random.seed(seed)
        assert [knows[i]["image_id"] for i in (0, 5, 1, 2)] == first


def test_replacements_are_spread(data_set):
    data_set(8, broken=(0,))
    views = TrainingViews(DatasetCatalog.get(NAME), FaceDatasetMapper(config(), is_train=True))
    assert {views[0]["image_id"] for _ in range(100)} == {f"e/{i}" for i in range(1, 8)}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_bad_images_is_an_error(data_set, num_workers):
    root = data_set(6, broken=range(6))
    with pytest.raises(RuntimeError, match="6 images tried in a row cannot be used") as error:
        take(Trainer.build_train_loader(config("DATALOADER.NUM_WORKERS", num_workers)), 1)
    assert f"such as {root}/e/" in str(error.value) and "6 of the 6 images" in str(error.value)
    assert "DETECTRON2_DATASETS" in str(error.value)


def test_a_wrong_folder_is_noticed_after_a_hundred_images(data_set, caplog):
    data_set(250)
    records = [record | {"file_name": f"/nowhere/{record['image_id']}"} for record in DatasetCatalog.get(NAME)]
    with pytest.raises(RuntimeError, match=r"101 images .* 101 of the 250 images|100 images .* 100 of the 250 images"):
        TrainingViews(records, FaceDatasetMapper(config(), is_train=True))[0]


def test_errors_of_the_program_are_not_bad_images(data_set):
    data_set(3)
    records = DatasetCatalog.get(NAME)
    del records[1]["gt_boxes"], records[1]["annotations"]
    mapper = FaceDatasetMapper(config(), is_train=True)
    with pytest.raises(ValueError, match="it has neither gt_boxes nor annotations"):
        TrainingViews(records, mapper)[1]
    mapper.augmentations = lambda image: np.zeros(3).reshape(2)  # raises ValueError, as bad images do
    with pytest.raises(ValueError, match="reshape"):
        TrainingViews(records, mapper)[0]


BAD_RECORDS = {
    "of another size": ({"width": 61, "height": 40}, r"(?s)e/1\.png.*\(60, 40\).*\(61, 40\)"),
    "NaN": ({"gt_boxes": np.float32([[1, 1, np.nan, 9]])}, r"e/1\.png: its annotated boxes have NaN or infinity"),
    "infinite": ({"gt_boxes": np.float32([[1, 1, np.inf, 9]])}, r"e/1\.png: its annotated boxes have NaN or infinity"),
    "missing": ({"file_name": "/nowhere/1.png"}, r"no such image: /nowhere/1\.png"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_replaced(data_set, caplog, name):
    change, message = BAD_RECORDS[name]
    data_set(3)
    records = DatasetCatalog.get(NAME)
    records[1].update(change)
    views = TrainingViews(records, FaceDatasetMapper(config(), is_train=True))
    with caplog.at_level(logging.WARNING):
        assert {views[1]["image_id"] for _ in range(20)} == {"e/0", "e/2"}
    (report,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert re.search(message, report)


def test_the_right_size_in_a_dict_is_no_error(data_set):
    data_set(1)
    (record,) = DatasetCatalog.get(NAME)
    record |= {"width": 60, "height": 40}
    assert FaceDatasetMapper(config(), is_train=True)(record)["image_id"] == "e/0"


def test_off_the_image():
    boxes = {
        "in it": ([10, 10, 30, 30], False),
        "cut by the corner at its centre": ([-10, -10, 10, 10], False),  # a quarter is shown
        "cut by more": ([-12, -12, 10, 10], True),
        "beyond": ([70, 10, 90, 30], True),
        "at negative places": ([-30, -30, -10, -10], True),
        "as large as the image": ([0, 0, 60, 40], False),
        "far larger": ([-1000, -1000, 1000, 1000], True),
        "without area": ([5, 5, 5, 20], False),
        "inside out": ([30, 30, 10, 10], False),
    }
    found = off_the_image(np.float32([box for box, _ in boxes.values()]), height=40, width=60)
    assert dict(zip(boxes, found.tolist(), strict=True)) == {name: off for name, (_, off) in boxes.items()}
    assert off_the_image(np.zeros((0, 4), np.float32), 40, 60).shape == (0,)


def test_boxes_off_the_image_are_reported_once_and_left_out(data_set, caplog):
    data_set(2)
    records = DatasetCatalog.get(NAME)
    records[0]["gt_boxes"] = np.float32([[10, 10, 30, 30], [70, 10, 90, 30], [-1e5, -1e5, 1e5, 1e5], [-30, 5, -9, 20]])
    records[0]["gt_ignore"] = np.array([False, False, True, False])
    views = TrainingViews(records, FaceDatasetMapper(config("INPUT.RANDOM_FLIP", "none"), is_train=True))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            view = views[0]
            assert view["instances"].gt_boxes.tensor.tolist() == [[10, 10, 30, 30]]
            assert len(view["ignore_boxes"]) == 0
            views[1]
    (report,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert "3 of 4 boxes of" in report and "e/0.png, which is 60 x 40 pixels; the first is" in report
    assert report.endswith("x1, y1, x2, y2 = 70, 10, 90, 30")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_test_image_stops_the_evaluation_by_name(data_set, num_workers):
    data_set(5, broken=(3,))
    with pytest.raises(ValueError, match=r"e/3\.png: cannot be read as an image"):
        list(build_test_loader(config("DATALOADER.NUM_WORKERS", num_workers), NAME))


def test_missing_test_images_are_said_before_the_first(data_set):
    root = data_set(5)
    assert len(list(build_test_loader(config(), NAME))) == 5
    (root / "e/3.png").unlink()
    (root / "e/4.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 5 images are missing, first .*e/3\.png"):
        build_test_loader(config(), NAME)
