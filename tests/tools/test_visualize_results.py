"""visualize_results.py: who is found, and a picture for each image."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from gs_d2.data import register_wider_face
from gs_d2.evaluation import write_wider_predictions

NAME = "test_visualize_results"


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/visualize_results.py")


@pytest.fixture(scope="module")
def records(drawn_datasets):
    base = drawn_datasets / "widerface"
    register_wider_face(NAME, base / "wider_face_split" / "wider_face_val_bbx_gt.txt", base / "WIDER_val" / "images")
    yield DatasetCatalog.get(NAME)
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def predictions(records, tmp_path):
    """Every face found, the last one of each image with a low score, and one false alarm an image."""
    detections = {}
    for record in records:
        boxes = record["gt_boxes"].astype(float)
        scores = np.linspace(0.9, 0.3, len(boxes))
        rows = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores[:, None]], axis=1)
        detections[record["image_id"]] = np.concatenate([rows, [[0, 0, 3, 3, 0.8]]])
    write_wider_predictions(detections, tmp_path / "predictions")
    return tmp_path / "predictions"


def test_matches_are_one_to_one(tool):
    faces = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]])
    detections = np.array([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 5], [21, 6, 30, 10], [50, 50, 60, 54.9]])
    found, hits = tool.match(faces, detections)
    assert found.tolist() == [True, True, False]
    assert hits.tolist() == [True, False, True, False, False]
    for some_faces, some_detections in ((3, 0), (0, 4), (0, 0)):
        found, hits = tool.match(faces[:some_faces], detections[:some_detections])
        assert found.tolist() == [False] * some_faces and hits.tolist() == [False] * some_detections


def run_tool(tool, monkeypatch, predictions, output, *arguments):
    command = ["--dataset", NAME, "--predictions", str(predictions), "--output", str(output), *arguments]
    monkeypatch.setattr("sys.argv", ["visualize_results.py", *command])
    tool.main()
    return sorted(path.name for path in output.iterdir())


def colour_count(image, colour):
    return int((np.abs(np.asarray(image, dtype=int) - colour).max(axis=2) < 60).sum())


def test_a_picture_for_each_image(tool, records, predictions, tmp_path, monkeypatch):
    written = run_tool(tool, monkeypatch, predictions, tmp_path / "out")
    assert written == sorted(record["image_id"].split("/")[1] + ".jpg" for record in records)
    for record in records:
        with Image.open(tmp_path / "out" / (record["image_id"].split("/")[1] + ".jpg")) as picture:
            assert picture.size == (128 * 2 + 4 + 4, 96 + 22 + 4)
            assert picture.mode == "RGB"


def test_colours_tell_hits_from_misses(tool, records, tmp_path):
    record = max(records, key=lambda r: len(r["gt_boxes"]))
    grey = Image.new("RGB", (128, 96), (90, 90, 90))
    boxes = record["gt_boxes"]
    for colour in (tool.HIT, tool.MISS, tool.FALSE_ALARM):
        drawn = tool.draw(grey, boxes, [colour] * len(boxes))
        assert colour_count(drawn, colour) > 0
        assert colour_count(grey, colour) == 0, "the image itself stays as it was"
    # Boxes without area, which the official lists have, are left out.
    assert tool.draw(grey, np.array([[5.0, 5, 5, 20], [9, 9, 7, 32]]), [tool.HIT] * 2) == grey


def test_how_many(tool, predictions, tmp_path, monkeypatch):
    assert len(run_tool(tool, monkeypatch, predictions, tmp_path / "two", "--num-images", "2")) == 2
    assert len(run_tool(tool, monkeypatch, predictions, tmp_path / "all", "--num-images", "0")) == 4


@pytest.mark.parametrize("case", ["no folder", "empty folder", "garbled"])
def test_predictions_that_cannot_be_read(tool, records, tmp_path, monkeypatch, case):
    folder = tmp_path / "predictions"
    message = "no such file or folder"
    if case == "empty folder":
        folder.mkdir()
        message = "no prediction of any image"
    elif case == "garbled":
        file = folder / (records[0]["image_id"] + ".txt")
        file.parent.mkdir(parents=True)
        file.write_text("x\n1\n1 2 3 four 0.5\n")
        message = "line 3: not a number"
    with pytest.raises(SystemExit, match=f"^visualize_results: .*{message}"):
        run_tool(tool, monkeypatch, folder, tmp_path / "out")


def test_an_unknown_data_set(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["visualize_results.py", "--dataset", "faces", "--predictions", str(tmp_path), "--output", "x"]
    )
    with pytest.raises(SystemExit, match=r"^visualize_results: .*faces.* is not registered"):
        tool.main()
