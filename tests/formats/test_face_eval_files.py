"""face-eval's files: annotations and detections, what is read and what is refused."""

import numpy as np
import pytest
from scipy.io import savemat

from gs_d2.formats.face_eval import read_annotations, read_detections


@pytest.mark.parametrize(("benchmark", "images", "faces"), [("afw", 205, 473), ("pascal_face", 851, 1341)])
def test_counts_of_the_annotations(shared_data, benchmark, images, faces):
    annotations = read_annotations(shared_data / "afw_pascal", benchmark)
    assert (len(annotations.boxes), annotations.num_faces) == (images, faces)


def test_reading_detections(tmp_path):
    (tmp_path / "d.txt").write_text("a.jpg -0.5 1 2 3 4\nb  0.25 1 2 3 4\n\na 2 5 6 7 8.5\n")
    detections = read_detections(tmp_path / "d.txt")
    assert detections["a"].tolist() == [[1, 2, 3, 4, -0.5], [5, 6, 7, 8.5, 2]]
    assert detections["b"].tolist() == [[1, 2, 3, 4, 0.25]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 0.5 1 2 3 4\na 0.5 1 2 3\n", r"d\.txt, line 2: need 5 numbers, got 4"),
        ("a 0.5 1 2 3 4\n\na\n", r"d\.txt, line 3: need `image score"),
        ("a 0.5 1 2 3 inf\n", r"d\.txt, line 1: NaN or infinity"),
    ],
)
def test_malformed_detections(tmp_path, text, message):
    (tmp_path / "d.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_detections(tmp_path / "d.txt")


def test_results_of_two_detectors(tmp_path):
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_text("a 0.5 1 2 3 4\n")
    with pytest.raises(ValueError, match="another file too"):
        read_detections(tmp_path)


def test_annotation_file(tmp_path):
    records = np.zeros((2, 1), dtype=[("imgname", "O"), ("objects", "O")])
    records[0, 0] = (
        "a.jpg",
        np.array([[0, 0, 30, 30, 0, 0], [0, 0, 29, 90, 0, 0], [0, 0, 90, 90, 0, 1]], np.uint8),
    )
    records[1, 0] = ("b.jpg", np.zeros((0, 6)))
    savemat(tmp_path / "new_annotations_AFW.mat", {"Annotations": records})
    for path in (tmp_path, tmp_path / "new_annotations_AFW.mat"):
        annotations = read_annotations(path, "afw")
        assert annotations.ignore["a"].tolist() == [False, True, True]
        assert annotations.boxes["b"].shape == (0, 4) and annotations.num_faces == 1
    with pytest.raises(FileNotFoundError, match="Annotations_Face_PASCAL"):
        read_annotations(tmp_path, "pascal_face")
    with pytest.raises(ValueError, match="benchmark must be"):
        read_annotations(tmp_path, "wider")
    (tmp_path / "new_annotations_AFW.mat").write_bytes(b"x" * 200)
    with pytest.raises(ValueError, match=r"new_annotations_AFW\.mat: cannot be read"):
        read_annotations(tmp_path, "afw")
