"""WIDER FACE's prediction files: what is read, what is refused with which words, and what is written."""

import io
import zipfile

import numpy as np
import pytest

from gs_d2.formats import files
from gs_d2.formats.files import FileTree, quantize
from gs_d2.formats.wider_predictions import parse_wider_file, read_wider_predictions, write_wider_predictions

IDS = ["0--Parade/a_1", "0--Parade/a_2", "1--Hand/b_1"]
GOOD = "a_1\n2\n1 2 3 4 0.5\n5.25 6 7 8 -1e-3\n"


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return path


@pytest.mark.parametrize("top", ["", "results/", "a/b/"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_reads_folder_and_zip_alike(tmp_path, top, kind):
    files = {
        top + "0--Parade/a_1.txt": GOOD,
        top + "1--Hand/b_1.txt": "b_1\n0\n",
        top + "2--X/c.txt": "broken",
    }
    path = make_zip(tmp_path / "p.zip", files) if kind == "zip" else make_folder(tmp_path / "p", files)
    predictions = read_wider_predictions(path, IDS)
    np.testing.assert_array_equal(predictions.detections[IDS[0]], [[1, 2, 3, 4, 0.5], [5.25, 6, 7, 8, -1e-3]])
    assert predictions.detections[IDS[2]].shape == (0, 5)
    assert (predictions.missing, predictions.empty, predictions.num_unknown) == ([IDS[1]], [IDS[2]], 1)


@pytest.mark.parametrize("text", ["", "\n\n", "a_1\n0", "a_1\n0\n\n", "a_1\r\n0\r\n"])
def test_no_detections(text):
    assert parse_wider_file(text, "f").shape == (0, 5)


@pytest.mark.parametrize("text", ["a\r\n1\r\n1 2 3 4 5\r\n", "a\n1\n1\t2  3 4 5 ", "\ufeffa\n 1.0 \n+1 2. 3e0 4 5\n\n"])
def test_spelling_does_not_matter(text):
    assert parse_wider_file(text, "f").tolist() == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a_1\n", "f, line 2: missing"),
        ("a_1\nmany\n", "f, line 2: need the number of detections, got 'many'"),
        ("a_1\n-1\n", "f, line 2: need the number"),
        ("a_1\n1.5\n1 2 3 4 5\n", "f, line 2: need the number"),
        ("a_1\ninf\n1 2 3 4 5\n", "f, line 2: need the number"),
        ("a_1\n2\n1 2 3 4 5\n", "f, line 2: says 2 detections but 1 follow"),
        ("a_1\n1\n1 2 3 4 5\n1 2 3 4 5\n", "f, line 2: says 1 detections but 2 follow"),
        ("a_1\n2\n1 2 3 4 5\n1 2 3 4\n", "f, line 4: need 5 numbers, got 4: '1 2 3 4'"),
        ("a_1\n2\n1 2 3 4\n1 2 3 4\n", "f, line 3: need 5 numbers, got 4"),
        ("a_1\n1\n1 2 3 4 5 6\n", "f, line 3: need 5 numbers, got 6"),
        ("a_1\n1\n1,2,3,4,5\n", "f, line 3: need 5 numbers, got 1"),
        ("a_1\n1\n1 2 x 4 5\n", "f, line 3: not a number: '1 2 x 4 5'"),
        ("a_1\n1\n1 2 3 4 1_0\n", "f, line 3: not a number"),
        ("a_1\n2\n\n1 2 3 4 5\n1 2 nan 4 5\n", "f, line 5: NaN or infinity"),
        ("a_1\n1\n1 2 3 4 inf\n", "f, line 3: NaN or infinity"),
        ("a_1\n1\n1 2 3 1e999 1\n", "f, line 3: NaN or infinity"),
    ],
)
def test_malformed_files_name_the_line(text, message):
    with pytest.raises(ValueError) as error:
        parse_wider_file(text, "f")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_malformed_file_is_named(tmp_path, kind):
    files = {"0--Parade/a_1.txt": "a_1\n1\n1 2 3\n"}
    path = make_zip(tmp_path / "p.zip", files) if kind == "zip" else make_folder(tmp_path / "p", files)
    with pytest.raises(ValueError, match=r"0--Parade.a_1\.txt, line 3"):
        read_wider_predictions(path, IDS)


def test_nothing_that_fits(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_wider_predictions(tmp_path / "nowhere", IDS)
    with pytest.raises(ValueError, match=r"no prediction of any image.*0--Parade/a_1\.txt"):
        read_wider_predictions(make_folder(tmp_path / "p", {"0--Parade/other.txt": GOOD}), IDS)
    files = {"x/0--Parade/a_1.txt": GOOD, "y/0--Parade/a_1.txt": GOOD}
    with pytest.raises(ValueError, match=r"both x/0--Parade/a_1\.txt and y/0--Parade/a_1\.txt"):
        read_wider_predictions(make_folder(tmp_path / "q", files), IDS)


@pytest.mark.parametrize("name", ["../0--Parade/a_1.txt", "x/../../a_1.txt", "/0--Parade/a_1.txt", "C:/x/a_1.txt"])
def test_zip_that_leaves_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="unsafe path"):
        FileTree(make_zip(tmp_path / "p.zip", {name: GOOD}))


def test_zip_with_backslashes_that_leaves_its_folder(tmp_path):
    path = make_zip(tmp_path / "p.zip", {"x!!!!y": GOOD})
    path.write_bytes(path.read_bytes().replace(b"x!!!!y", b"..\\..\\"))
    with pytest.raises(ValueError, match="unsafe path"):
        FileTree(path)


def test_zip_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PREDICTIONS", files.ZipLimits(entries=50, file_bytes=1000, total_bytes=5000))
    with pytest.raises(ValueError, match="unpacks to more"):
        FileTree(make_zip(tmp_path / "one.zip", {"0--Parade/a_1.txt": "0" * 1001}))
    with pytest.raises(ValueError, match="unpacks to more"):
        FileTree(make_zip(tmp_path / "sum.zip", {f"{i}.txt": "0" * 999 for i in range(6)}))
    with pytest.raises(ValueError, match="51 entries"):
        FileTree(make_zip(tmp_path / "many.zip", {f"{i}.txt": "" for i in range(51)}))


def test_zip_whose_header_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PREDICTIONS", files.ZipLimits(file_bytes=1000))
    path = make_zip(tmp_path / "p.zip", {"a.txt": "0" * 5000})
    true_size, small_size = (5000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(true_size, small_size))
    with FileTree(path) as tree, pytest.raises(ValueError, match=r"a\.txt"):
        tree.read_bytes("a.txt")


def test_damaged_zips(tmp_path):
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(ValueError, match="not a readable zip"):
        FileTree(tmp_path / "text.zip")
    path = tmp_path / "crc.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("0--Parade/a_1.txt", GOOD)
    path.write_bytes(path.read_bytes().replace(b"5.25", b"9.25"))
    with pytest.raises(ValueError, match=r"a_1\.txt: cannot be read"):
        read_wider_predictions(path, IDS)


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_written_files_are_read_back(tmp_path, name):
    rng = np.random.default_rng(0)
    boxes, scores = rng.random((7, 4)) * 300, rng.random((7, 1))
    rows = np.float32(np.concatenate([boxes, scores], axis=1)).astype(float)
    write_wider_predictions({IDS[0]: rows, IDS[2]: np.zeros((0, 5))}, tmp_path / name)
    predictions = read_wider_predictions(tmp_path / name, IDS)
    expected = quantize(rows[np.argsort(-rows[:, 4])])
    np.testing.assert_array_equal(predictions.detections[IDS[0]], expected)
    np.testing.assert_allclose(expected, rows[np.argsort(-rows[:, 4])], atol=6e-4)
    assert predictions.empty == [IDS[2]] and predictions.missing == [IDS[1]]


def test_layout_of_a_written_file(tmp_path):
    write_wider_predictions({IDS[0]: [[1, 2, 3.5, 4, 0.25], [0, 0, 1, 1, 0.75]]}, tmp_path / "s.zip")
    with zipfile.ZipFile(io.BytesIO((tmp_path / "s.zip").read_bytes())) as archive:
        assert archive.namelist() == ["0--Parade/a_1.txt"]
        lines = archive.read("0--Parade/a_1.txt").decode().splitlines()
    assert lines == ["a_1", "2", "0.000 0.000 1.000 1.000 0.75000000", "1.000 2.000 3.500 4.000 0.25000000"]


@pytest.mark.parametrize("image_id", ["", "../a_1", "/a_1", "a/..", "C:/a_1", "a/..\\..\\b", "a/b\n9"])
def test_ids_that_leave_the_folder(tmp_path, image_id):
    with pytest.raises(ValueError, match="image id"):
        write_wider_predictions({image_id: np.zeros((0, 5))}, tmp_path / "out")
    assert not list(tmp_path.rglob("*.txt"))


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"0--Parade/a_1.*NaN"):
        write_wider_predictions({IDS[0]: [[1, 2, 3, 4, np.nan]]}, tmp_path / "out")


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_images_of_ones_own_may_have_any_path_or_number(tmp_path, name):
    detections = {5: np.zeros((0, 5)), "plain": [[1, 2, 3, 4, 0.5]], "a/b/c": [[1, 2, 3, 4, 0.25]]}
    write_wider_predictions(detections, tmp_path / name)
    found = read_wider_predictions(tmp_path / name, detections)
    assert list(found.detections) == [5, "plain", "a/b/c"] and not found.missing
    assert [len(rows) for rows in found.detections.values()] == [0, 1, 1]
    assert found.detections["a/b/c"].tolist() == [[1, 2, 3, 4, 0.25]]
