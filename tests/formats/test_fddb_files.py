"""FDDB's lists of ellipses and of detections: what is read and what is refused."""

import numpy as np
import pytest

from gs_d2.formats.fddb import bounding_boxes, read_annotations, read_detections


def test_counts_of_the_annotations(shared_data):
    annotations = read_annotations(shared_data / "fddb" / "folds")
    assert len(annotations) == 2845
    assert sum(map(len, annotations.values())) == 5171


def test_bounding_boxes_touch_the_outline():
    ellipse = np.array([30.0, 20.0, 0.7, 50.0, 60.0])
    t = np.linspace(0, 2 * np.pi, 100_000)
    x = 50 + 30 * np.cos(t) * np.cos(0.7) - 20 * np.sin(t) * np.sin(0.7)
    y = 60 + 30 * np.cos(t) * np.sin(0.7) + 20 * np.sin(t) * np.cos(0.7)
    np.testing.assert_allclose(bounding_boxes(ellipse), [[x.min(), y.min(), x.max(), y.max()]], atol=1e-6)


def test_reading_folds_and_one_file(tmp_path):
    (tmp_path / "fold-01-out.txt").write_text("2002/a\n1\n1 2 3 4 0.5\n\n2002/b\n0\n")
    (tmp_path / "fold-02-out.txt").write_text("2002/c.jpg\r\n2\r\n1 2 3 4 0.5\r\n5 6 7 8 0.25\r\n")
    detections = read_detections(tmp_path)
    assert {image: len(rows) for image, rows in detections.items()} == {"2002/a": 1, "2002/b": 0, "2002/c": 2}
    assert read_detections(tmp_path / "fold-02-out.txt")["2002/c"].tolist()[1] == [5, 6, 7, 8, 0.25]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n1\n1 2 3 4\n", r"d\.txt, line 3: need 5 or 6 numbers, got 4"),
        ("a\n1\n1 2 3 4 5\nb\n1\n1 2 3 4 5 6\n", r"d\.txt, line 6: need 5 numbers, got 6"),
        ("a\n2\n1 2 3 4 5\n", r"d\.txt, line 2: says 2 but 1 follow"),
        ("a\n1\n1 2 3 x 5\n", r"d\.txt, line 3: not a number"),
        ("a\n1\n1 2 3 nan 5\n", r"d\.txt, line 3: NaN"),
        ("a\nb\n", r"d\.txt, line 2: need the number"),
        ("a\n", r"d\.txt, line 2: missing"),
        ("a\n0\na\n0\n", r"d\.txt, line 3: image a for the second time"),
        ("a\n2\n1 2 3 4 5\n\nb\n0\n", r"d\.txt, line 5: need 5 numbers, got 1: 'b'"),
    ],
)
def test_malformed_detections(tmp_path, text, message):
    (tmp_path / "d.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_detections(tmp_path / "d.txt")


def test_no_ellipse_lists(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="ellipseList"):
        read_annotations(tmp_path)
