"""MATLAB files: a bomb, and files that are cut short or are something else."""

import io
import pickle
import struct

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import csc_array

from gs_d2.formats import mat
from gs_d2.formats.mat import load_mat


def content_of(compressed=True, **variables):
    file = io.BytesIO()
    savemat(file, variables, do_compression=compressed)
    return file.getvalue()


def of_big_end(content):
    """A file of numbers alone as machines of the other byte order write it."""
    swapped, at = bytearray(content), 128
    swapped[124:128] = b"\1\0MI"

    def swap(at, dtype, count):
        swapped[at : at + count * np.dtype(dtype).itemsize] = (
            np.frombuffer(swapped, dtype, count, at).byteswap().tobytes()
        )

    while at < len(content):
        _, size = struct.unpack_from("<II", content, at)
        swap(at, "<u4", 2 + 2 + 2 + 2 + 2)  # the matrix, its flags, and the dimensions
        name = at + 8 + 16 + 16
        small = struct.unpack_from("<I", content, name)[0] >> 16
        assert small == 1
        swap(name, "<u4", 1)
        swap(name + 8, "<u4", 2)
        swap(name + 16, "<f8", (at + 8 + size - name - 16) // 8)
        at += 8 + size
    return bytes(swapped)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_is_read(compressed):
    cells = np.empty((2, 1), object)
    cells[0, 0], cells[1, 0] = np.arange(3.0), np.zeros((0, 4))
    found = load_mat(content_of(compressed, boxes=cells, name="a"), "x.mat")
    assert found["boxes"][0, 0].tolist() == [[0, 1, 2]] and found["name"][0] == "a"


def test_it_is_as_scipy_has_it():
    struct_array = np.zeros((2, 1), dtype=[("name", object), ("boxes", object)])
    struct_array["name"][:, 0] = "a.jpg", "b"
    struct_array["boxes"][:, 0] = np.ones((2, 6)), np.zeros((0, 0))
    cells = np.empty((2, 3), object)
    inner = np.empty((1, 1), object)
    inner[0, 0] = "in a cell"
    for i, value in enumerate([np.arange(6).reshape(2, 3), "text", np.zeros((0, 4)), "", np.uint8(7), inner]):
        cells.flat[i] = value
    variables = {"cells": cells, "struct": struct_array, "text": "äö", "rows": np.array(["ab", "c "]), "f": np.eye(3)}
    for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4"):
        variables[dtype] = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for compressed in (False, True):
        content = content_of(compressed, **variables)
        found, expected = load_mat(content, "x.mat"), loadmat(io.BytesIO(content))
        assert found.keys() == variables.keys()
        for name in variables:
            assert_same(found[name], expected[name])


def assert_same(found, expected):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if found.dtype.names:
        for name in found.dtype.names:
            assert_same(found[name], expected[name])
    elif found.dtype == object:
        for one, other in zip(found.flat, expected.flat, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_array_equal(found, expected)


def test_the_other_byte_order():
    numbers = np.arange(12.0).reshape(3, 4)
    content = of_big_end(content_of(False, a=numbers, b=2 * numbers))
    found = load_mat(content, "x.mat")
    np.testing.assert_array_equal(found["a"], numbers)
    np.testing.assert_array_equal(found["b"], 2 * numbers)


@pytest.mark.parametrize("cells", [1000, 20_000_000])
@pytest.mark.parametrize("nested", [False, True])
def test_cells_that_are_not_there_are_not_made(cells, nested):
    array = np.empty((1, 7), object)
    array[:] = np.float64(1)
    if nested:
        outer = np.empty((1, 1), object)
        outer[0, 0] = array
        array = outer
    content = content_of(False, a=array)
    dims = np.array([1, 7], "<i4").tobytes()
    assert content.count(dims) == 1 and load_mat(content, "x.mat")["a"].size
    with pytest.raises(ValueError, match=r"x\.mat: .*claims more cells than it has bytes"):
        load_mat(content.replace(dims, np.array([1, cells], "<i4").tobytes()), "x.mat")


def test_a_bomb_is_not_unpacked(monkeypatch):
    content = content_of(a=np.zeros(50_000), b=np.zeros(50_000))
    assert len(content) < 10_000
    monkeypatch.setattr(mat, "_MAX_BYTES", 900_000)
    assert load_mat(content, "x.mat")["a"].size == 50_000
    monkeypatch.setattr(mat, "_MAX_BYTES", 700_000)  # of both variables together
    with pytest.raises(ValueError, match=r"x\.mat: cannot be read as a MATLAB file \(unpacks to more than"):
        load_mat(content, "x.mat")


@pytest.mark.parametrize("kind", [0, 8, 10, 11, 15, 19, 20, 255, 2**31])
def test_types_that_there_are_not(kind):
    """With which scipy ends the program."""
    content = bytearray(content_of(False, a=np.arange(50.0)))
    at = content.index(struct.pack("<II", 9, 400))
    content[at : at + 4] = struct.pack("<I", kind)
    with pytest.raises(ValueError, match=r"x\.mat: cannot be read as a MATLAB file"):
        load_mat(bytes(content), "x.mat")


def test_text_of_billions_of_empty_rows():
    content = bytearray(content_of(False, a=""))
    at = content.index(struct.pack("<II", 5, 8)) + 8
    content[at : at + 8] = np.array([2**31 - 1, 0], "<i4").tobytes()
    with pytest.raises(ValueError, match=r"x\.mat: .*a text of 0 letters has the shape"):
        load_mat(bytes(content), "x.mat")


@pytest.mark.parametrize(
    ("value", "message"), [(1j * np.eye(2), "is complex"), (csc_array(np.eye(3)), "or of class 5")]
)
def test_what_no_file_of_faces_has(value, message):
    with pytest.raises(ValueError, match=rf"x\.mat: .*{message}"):
        load_mat(content_of(a=value), "x.mat")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"MATLAB 5.0",
        content_of(a=np.arange(1000.0))[:200],
        content_of(False, a=np.arange(1000.0))[:300],
        pickle.dumps({"a": 1}),
        b"\x89HDF\r\n\x1a\n" + bytes(600),
    ],
    ids=["empty", "short", "cut compressed", "cut", "pickle", "7.3"],
)
def test_what_is_no_such_file_is_named(content):
    with pytest.raises(ValueError, match=r"x\.mat: cannot be read as a MATLAB file"):
        load_mat(content, "x.mat")
