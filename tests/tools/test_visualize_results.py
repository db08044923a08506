"""visualize_results.py: who is found, and a picture for each image."""

import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from visualize_results import main

from gs_d2.analysis.hits import match_detections
from gs_d2.data import register_face_eval, register_fddb, register_wider_face
from gs_d2.evaluation import write_wider_predictions
from gs_d2.visualization import FALSE_ALARM, HIT, MISS, draw

NAME = "test_visualize_results"


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


def run_tool(predictions, output, *arguments):
    main(["--dataset", NAME, "--predictions", str(predictions), "--output", str(output), *arguments])
    return sorted(path.name for path in output.iterdir())


def colour_count(image, colour):
    return int((np.abs(np.asarray(image, dtype=int) - colour).max(axis=2) < 60).sum())


def test_a_picture_for_each_image(records, predictions, tmp_path):
    written = run_tool(predictions, tmp_path / "out")
    assert written == sorted(record["image_id"].split("/")[1] + ".jpg" for record in records)
    for record in records:
        with Image.open(tmp_path / "out" / (record["image_id"].split("/")[1] + ".jpg")) as picture:
            assert picture.size == (128 * 2 + 4 + 4, 96 + 22 + 4)
            assert picture.mode == "RGB"


def test_colours_tell_hits_from_misses(records, tmp_path):
    record = max(records, key=lambda r: len(r["gt_boxes"]))
    grey = Image.new("RGB", (128, 96), (90, 90, 90))
    boxes = record["gt_boxes"]
    for colour in (HIT, MISS, FALSE_ALARM):
        drawn = draw(grey, boxes, [colour] * len(boxes))
        assert colour_count(drawn, colour) > 0
        assert colour_count(grey, colour) == 0, "the image itself stays as it was"
    # Boxes without area, which the official lists have, are left out.
    assert draw(grey, np.array([[5.0, 5, 5, 20], [9, 9, 7, 32]]), [HIT] * 2) == grey


def test_how_many(predictions, tmp_path):
    assert len(run_tool(predictions, tmp_path / "two", "--num-images", "2")) == 2
    assert len(run_tool(predictions, tmp_path / "all", "--num-images", "0")) == 4


@pytest.mark.parametrize("case", ["no folder", "empty folder", "garbled"])
def test_predictions_that_cannot_be_read(records, tmp_path, capsys, case):
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
    with pytest.raises(SystemExit) as end:
        run_tool(folder, tmp_path / "out")
    assert end.value.code == 2 and re.search(f"error: .*{message}", capsys.readouterr().err)


def test_an_unknown_data_set(tmp_path, run_command):
    status, _, err = run_command(main, "--dataset", "faces", "--predictions", tmp_path, "--output", "x")
    assert status == 2 and re.search(r"error: .*faces.* is not registered", err)


@pytest.mark.parametrize("benchmark", ["fddb", "fddb ellipses", "afw"])
def test_other_benchmarks(made_up_benchmarks, tmp_path, monkeypatch, benchmark):
    """Their own result files, with every face found, as pictures whose names do not hide each other."""
    name = f"{NAME}_2"
    if benchmark == "afw":
        register_face_eval(name, "afw", made_up_benchmarks / "afw", made_up_benchmarks / "afw" / "testimages")
    else:
        register_fddb(name, made_up_benchmarks / "fddb/FDDB-folds", made_up_benchmarks / "fddb/originalPics")
    try:
        records, lines = DatasetCatalog.get(name), []
        for record in records:
            if benchmark == "afw":
                lines += [f"{record['image_id']} 0.9 {x1} {y1} {x2} {y2}" for x1, y1, x2, y2 in record["gt_boxes"]]
                continue
            rows = [f"{x1} {y1} {x2 - x1} {y2 - y1} 0.9" for x1, y1, x2, y2 in record["gt_boxes"]]
            if benchmark == "fddb ellipses":
                rows = [" ".join(map(str, [*ellipse, 0.9])) for ellipse in record["gt_ellipses"]]
            lines += [record["image_id"], str(len(rows)), *rows]
        (tmp_path / "detections.txt").write_text("\n".join(lines) + "\n")
        matches = []
        monkeypatch.setattr(
            "visualize_results.match_detections",
            lambda *boxes: matches.append(match_detections(*boxes)) or matches[-1],
        )
        written = run_tool(tmp_path / "detections.txt", tmp_path / "out", "--dataset", name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert len(written) == len(records) == len(matches)
    assert all(found.all() and hits.all() for found, hits in matches)
    assert ("2002_07_19_big_img_1.jpg" in written) == (benchmark != "afw")


def test_a_warning_where_no_picture_has_a_detection(records, predictions, tmp_path, capsys):
    def warning(*arguments):
        capsys.readouterr()
        assert len(run_tool(*arguments)) == len(records)
        return [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]

    assert warning(predictions, tmp_path / "out") == []
    (line,) = warning(predictions, tmp_path / "out", "--confidence-threshold", "0.95")
    assert "no score reaches 0.95, the highest is 0.9; lower --confidence-threshold" in line
    write_wider_predictions({record["image_id"]: np.zeros((0, 5)) for record in records}, tmp_path / "empty")
    (line,) = warning(tmp_path / "empty", tmp_path / "out")
    assert line.startswith(
        f"visualize_results: WARNING: {tmp_path / 'empty'}: the predictions of the 4 images are empty"
    )


def test_a_warning_where_no_image_has_predictions(made_up_benchmarks, tmp_path, capsys):
    name = f"{NAME}_fddb"
    register_fddb(name, made_up_benchmarks / "fddb" / "FDDB-folds", made_up_benchmarks / "fddb" / "originalPics")
    try:
        (tmp_path / "other.txt").write_text("another/image\n1\n1 2 3 4 0.9\n")
        arguments = ["--dataset", name, "--predictions", tmp_path / "other.txt", "--output", tmp_path / "out"]
        main([str(argument) for argument in arguments])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert "WARNING" in (err := capsys.readouterr().err)
    assert "none of the 5 images has predictions; names like 2002/07/19/big/img_1 are needed" in err
