"""Found faces as JSON, crops and a table: exact values, names of their own, strict and whole files."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from gs_d2.formats.found_faces import TABLE, FoundFaces, free_path

BOXES = np.array([[20.1, 10, 60, 55.7], [70, 30, 118, 79]], np.float32)
SCORES = np.array([0.9, 0.6], np.float32)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))


def table(folder):
    with open(folder / TABLE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def refuse(text):
    raise AssertionError(f"{text} is no JSON")


def test_the_json(tmp_path):
    found = FoundFaces(json=tmp_path / "faces.json")
    found.add("a/b.jpg", picture(), BOXES, SCORES)
    found.add("none.jpg", picture(), np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    found.add("v.mp4", picture(), BOXES[:1], np.array([np.nan], np.float32), frame=7)
    assert not (tmp_path / "faces.json").exists()
    found.write()
    size = {"width": 120, "height": 80}
    boxes = [[20.1, 10, 60, 55.7], [70, 30, 118, 79]]
    assert json.loads((tmp_path / "faces.json").read_text(), parse_constant=refuse) == [
        {"file": "a/b.jpg", **size, "boxes": boxes, "scores": [0.9, 0.6]},
        {"file": "none.jpg", **size, "boxes": [], "scores": []},
        {"file": "v.mp4", "frame": 7, **size, "boxes": boxes[:1], "scores": [None]},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["faces.json"]
    FoundFaces(json=tmp_path / "faces.json").write()
    assert json.loads((tmp_path / "faces.json").read_text()) == []


def test_numbers_are_the_same_in_float32(tmp_path):
    boxes = np.random.default_rng(2).uniform(0, 4000, (200, 4)).astype(np.float32)
    found = FoundFaces(json=tmp_path / "x.json")
    found.add("x", picture(), boxes, boxes[:, 0] / 4000)
    found.write()
    (read,) = json.loads((tmp_path / "x.json").read_text())
    assert np.array_equal(np.float32(read["boxes"]), boxes)
    assert np.array_equal(np.float32(read["scores"]), boxes[:, 0] / 4000)


def test_the_crops(tmp_path):
    image = picture()
    image.info["icc_profile"] = b"x"
    found = FoundFaces(crops=tmp_path)
    outside = np.array([[200, 200, 240, 240]], np.float32)
    found.add("some/b.jpg", image, np.concatenate([BOXES, outside]), np.append(SCORES, np.float32(0.5)))
    found.write()
    rows = table(tmp_path)
    assert [row["crop"] for row in rows] == ["b_1.png", "b_2.png"]
    assert rows[0] == {
        **{"crop": "b_1.png", "file": "some/b.jpg", "frame": "", "score": "0.9"},
        **{"x1": "20.1", "y1": "10.0", "x2": "60.0", "y2": "55.7"},
    }
    # A fifth of 39.9 x 45.7 and of 48 x 49 on each side, whole pixels, as far as the picture goes.
    for row, (left, top, right, bottom) in zip(rows, [(12, 0, 68, 65), (60, 20, 120, 80)], strict=True):
        with Image.open(tmp_path / row["crop"]) as crop:
            assert np.array_equal(np.asarray(crop), np.asarray(image)[top:bottom, left:right])
            assert "icc_profile" not in crop.info


def test_no_two_crops_have_one_name(tmp_path):
    """Equal names in two folders, names that look like another's numbers, other cases; and what must be kept."""
    (tmp_path / "c_1.png").write_bytes(b"an input")
    found = FoundFaces(crops=tmp_path, keep=[tmp_path / "c_1.png"])
    for file in ("x/a.jpg", "y/a.jpg", "y/A.png", "y/a_1.jpg", "y/a_1_2.jpg", str(tmp_path / "c.png")):
        found.add(file, picture(), BOXES, SCORES)
    found.add("y/a.jpg", picture(), BOXES, SCORES, frame=1)
    found.write()
    rows = table(tmp_path)
    assert len({row["crop"].lower() for row in rows}) == 14
    assert {row["crop"] for row in rows} | {TABLE, "c_1.png"} == {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "c_1.png").read_bytes() == b"an input"
    assert rows[-1]["frame"] == "1" and rows[-1]["crop"] == "a_000001_2.png"


def test_names_that_are_no_text(tmp_path):
    found = FoundFaces(json=tmp_path / "x.json", crops=tmp_path)
    found.add('no,"text\udce9.jpg', picture(), np.zeros((0, 4)), [])
    found._table.append(("crop", "caf\udce9.jpg", *[""] * 6))
    found.write()
    assert json.loads((tmp_path / "x.json").read_text())[0]["file"] == 'no,"text\udce9.jpg'
    assert table(tmp_path)[0]["file"] == r"caf\udce9.jpg"


def test_a_json_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("old")
    found = FoundFaces(json=tmp_path / "x.json")
    found.add("a", picture(), BOXES, SCORES)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*x\.json .*what was there is kept"):
        found.write()
    assert (tmp_path / "x.json").read_text() == "old"


def test_free_path(tmp_path):
    taken = set()
    names = [free_path(tmp_path, stem, ".png", taken).name for stem in ("a", "A", "a_2", "b", "a")]
    assert names == ["a.png", "A_2.png", "a_2_2.png", "b.png", "a_3.png"]
