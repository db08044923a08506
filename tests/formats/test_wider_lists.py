"""WIDER FACE's lists with all their traps, and the MATLAB files that lists of boxes take their labels from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from gs_d2.formats.wider_face import LABELS, add_labels, read_list

GOOD = "0--Parade/a.jpg\n2\n1 2 3 4 1 1 0 0 2 1\n10 20 30 40 0 0 0 1 0 0\n1--Crowd/b.jpg\n1\n5 6 7 8 2 0 1 0 1 0\n"


@pytest.fixture
def load(tmp_path):
    def load(text, mat_file=None):
        path = tmp_path / "list.txt"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        images = read_list(path)
        if mat_file:
            add_labels(images, mat_file)
        return images

    return load


def check_images(images):
    """What every image must be, whatever the list."""
    for image in images:
        n = len(image.boxes)
        assert image.boxes.shape == (n, 4) and image.boxes.dtype == np.float64
        assert image.ignore.shape == (n,) and image.ignore.dtype == bool
        assert tuple(image.labels) == LABELS
        assert all(v.shape == (n,) and v.dtype == np.uint8 for v in image.labels.values())
        assert np.isfinite(image.boxes).all()
        assert len(image.image_id.split("/")) == 2 and ".." not in image.image_id.split("/")


@pytest.mark.parametrize(
    "spelling",
    [
        GOOD.rstrip("\n"),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", " \n"),
        GOOD.replace(" ", "\t"),
        GOOD + "\n\n",
        "\n" + GOOD.replace("\n1--", "\n\n \n1--"),
        "\ufeff" + GOOD,
        GOOD.replace("1 2 3 4", "1.0 2e0 +3 4."),
    ],
    ids=["no last line end", "Windows", "trailing blanks", "tabs", "blank end", "blank lines", "BOM", "decimals"],
)
def test_spelling_does_not_matter(load, spelling):
    expected = load(GOOD)
    found = load(spelling)
    assert [r.path for r in found] == [r.path for r in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.ignore, b.ignore)


def test_an_image_of_count_0_may_have_a_dummy_row(load):
    dummy = "2--Empty/c.jpg\n0\n0 0 0 0 0 0 0 0 0 0\n"
    for text in (dummy + GOOD, "2--Empty/c.jpg\n0\n" + GOOD, dummy.replace(" 0" * 6 + "\n", "\n") + GOOD):
        images = load(text)
        check_images(images)
        assert [len(r.boxes) for r in images] == [0, 2, 1]
    assert [len(r.boxes) for r in load(dummy)] == [0]


def test_boxes_without_area_are_kept_and_ignored(load):
    """They count in the evaluation, as in the official tool; no anchor may learn from them."""
    (image,) = load(
        "e/a.jpg\n4\n1 2 0 5 0 0 0 0 0 0\n1 2 5 0 0 0 0 0 0 0\n9 9 -2 23 0 0 0 0 0 0\n1 1 1 1 0 0 0 0 0 0\n"
    )
    check_images([image])
    assert image.boxes.tolist() == [[1, 2, 1, 7], [1, 2, 6, 2], [9, 9, 7, 32], [1, 1, 2, 2]]
    assert image.ignore.tolist() == [True, True, True, False]


def test_an_empty_list(load):
    assert load("") == []
    assert load("\n \r\n") == []


def test_a_file_list_has_no_boxes(load):
    images = load("0--Parade/a.jpg\n\n1--Crowd/b.jpg\n\n")
    check_images(images)
    assert [r.image_id for r in images] == ["0--Parade/a", "1--Crowd/b"]
    assert [len(r.boxes) for r in images] == [0, 0]


ROW = "1 2 3 4 0 0 0 0 0 0\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("e/a.jpg\n" + ROW, 2, "expected a number of faces, got '1 2 3 4 0 0 0 0 0 0'"),
        ("e/a.jpg\n-1\n", 2, "expected a number of faces, got '-1'"),
        ("e/a.jpg\n1.5\n" + ROW, 2, "expected a number of faces, got '1.5'"),
        ("e/a.jpg\n²\n" + ROW * 2, 2, "expected a number of faces, got '²'"),
        ("e/a.jpg\nmany\n", 2, "expected a number of faces, got 'many'"),
        (GOOD + "e/c.jpg\n2\n" + ROW, 11, "expected 2 rows .*, and after 1 of them got the end of the file"),
        ("e/a.jpg\n2\n" + ROW + "e/b.jpg\n1\n" + ROW, 4, "expected 2 rows .*, and after 1 of them got 'e/b.jpg'"),
        ("e/a.jpg\n1\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n99999999999999999999\n" + ROW, 4, "expected 99999999999999999999 rows"),
        ("e/a.jpg\n" + "9" * 5000 + "\n" + ROW, 2, "expected a number of faces, got '9{80}'"),
        ("e/a.jpg\n3\n" + ROW * 2 + "1 2 3 -inf 0 0 0 0 0 0\n", 5, "after 2 of them got '1 2 3 -inf"),
        ("e/a.jpg\n1\n1_0 2 3 4\n", 3, "after 0 of them got '1_0 2 3 4'"),
        ("e/a.jpg\n1\n-1000000 2 3 4\n", 3, "expected 1 rows of numbers below 1e"),
        (GOOD + "0--Parade/a.jpg\n0\n", 8, "image '0--Parade/a' for the second time, after line 1"),
        (GOOD + "0--Parade/a.png\n0\n", 8, "image '0--Parade/a' for the second time, after line 1"),
        ("e/a.jpg\ne/b.jpg\ne/a.jpg\n", 3, "image 'e/a' for the second time, after line 1"),
        (r"e/..\..\a.jpg" + "\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("e/a\0.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("e/a.jpg\n1\n" + ROW * 2, 4, "expected an image path like event/name.jpg, got '1 2 3 4 0 0 0 0 0 0'"),
        ("e/a.jpg\n1\n1 2 3 x 0 0 0 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 3 nan 0 0 0 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 inf 4 0 0 0 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 1e60 4 0 0 0 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 3\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n1\n1 2 3 4 0 0 0\n", 3, "expected 1 rows of numbers below 1e"),
        ("e/a.jpg\n2\n1 2 3 4\n" + ROW, 4, "expected 2 rows of numbers below 1e"),
        ("e/a.jpg\n0\n" + ROW, 3, "expected 0 rows of numbers"),
        ("../a.jpg\n1\n" + ROW, 1, r"expected an image path like event/name.jpg, got '\.\./a\.jpg'"),
        ("e/../../a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("C:/a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("e/..\\..\\a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg"),
        ("/etc/passwd\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got '/etc/passwd'"),
        ("/a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got '/a.jpg'"),
        ("a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got 'a.jpg'"),
        ("1\n" + ROW, 1, "expected an image path like event/name.jpg, got '1'"),
        ("e/f/a.jpg\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got 'e/f/a.jpg'"),
        ("e/\n1\n" + ROW, 1, "expected an image path like event/name.jpg, got 'e/'"),
        ("e/a.jpg\ne/b.jpg\n1\n" + ROW, 1, "no number of faces"),
        ("e/a.jpg\n1\n" + ROW + "e/b.jpg\n", 4, "no number of faces"),
    ],
)
def test_errors_name_file_and_line(load, tmp_path, text, line, message):
    with pytest.raises(ValueError, match=message) as error:
        load(text)
    assert str(error.value).startswith(f"{tmp_path / 'list.txt'}:{line}: ")


def test_bytes_that_are_no_text(load):
    with pytest.raises(ValueError, match=r"list\.txt:4: not UTF-8 text"):
        load(b"e/a.jpg\n1\n1 2 3 4\ne/\xff\xfe.jpg\n1\n1 2 3 4\n")
    with pytest.raises(ValueError, match=r"list\.txt: not a text file"):
        load(bytes(100))


@given(text=st.text(alphabet="e/a.jpg 0123-\n\r\t\x0b²٣", max_size=40))
def test_any_text_is_read_or_refused_with_its_place(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode())
    try:
        images = read_list(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}:")
    else:
        check_images(images)


def test_a_crowd_is_read_whole(load):
    (image,) = load("e/a.jpg\n2000\n" + ROW * 2000)
    check_images([image])
    assert len(image.boxes) == 2000


def test_a_damaged_mat_is_named(load, tmp_path):
    mat = tmp_path / "wider_face_val.mat"
    mat.write_bytes(b"MATLAB 5.0" + bytes(200))
    with pytest.raises(ValueError, match=r"wider_face_val\.mat: cannot be read as a MATLAB file"):
        load("e/a.jpg\n1\n1 2 3 4\n", mat)


def cells(values):
    out = np.empty((len(values), 1), dtype=object)
    for i, value in enumerate(values):
        out[i, 0] = value
    return out


def write_attributes(path, labels):
    """An official wider_face_<split>.mat: labels is event -> image -> attribute -> values."""
    content = {
        "event_list": cells(list(labels)),
        "file_list": cells([cells(list(images)) for images in labels.values()]),
    }
    for key in LABELS:
        content[f"{key}_label_list"] = cells(
            [cells([np.array(image[key]).reshape(-1, 1) for image in images.values()]) for images in labels.values()]
        )
    savemat(path, content)


def test_lists_of_boxes_take_their_attributes_from_the_mat(load, tmp_path):
    def labels(n, **given):
        return {key: given.get(key, [0] * n) for key in LABELS}

    mat = tmp_path / "wider_face_val.mat"
    write_attributes(
        mat,
        {
            "0--Parade": {"a": labels(2, invalid=[0, 1], blur=[2, 1])},
            "1--Crowd": {"b": labels(3, pose=[1, 1, 1]), "unlisted": labels(1)},
        },
    )
    text = "0--Parade/a.jpg\n2\n1 2 3 4\n5 6 7 8\n1--Crowd/b.jpg\n1\n5 6 7 8\n2--New/c.jpg\n1\n1 1 1 1\n"
    a, b, c = load(text, mat)
    check_images([a, b, c])
    assert a.labels["blur"].tolist() == [2, 1]
    assert a.ignore.tolist() == [False, True]
    assert b.labels["pose"].tolist() == [0], "three labels for one box fit no box"
    assert c.ignore.tolist() == [False]
    mat.write_bytes(mat.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"wider_face_val\.mat: cannot be read as a MATLAB file"):
        load(text, mat)
    savemat(mat, {"event_list": 1})
    with pytest.raises(ValueError, match=r"wider_face_val\.mat: not of the layout"):
        load(text, mat)
    assert load(GOOD, mat)[0].labels["blur"].tolist() == [1, 0], "a list with labels of its own needs no .mat"
