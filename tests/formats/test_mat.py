"""MATLAB files: a bomb, and files that are cut short or are something else."""

import io
import pickle
import struct

import numpy as np
import pytest
from scipy.io import savemat

from gs_d2.formats import mat
from gs_d2.formats.mat import load_mat


def content_of(compressed=True, **variables):
    file = io.BytesIO()
    savemat(file, variables, do_compression=compressed)
    return file.getvalue()


def with_mark(content, mark):
    """With another byte-order mark, and the outermost elements' sizes in the order that scipy then assumes."""
    swapped, at = bytearray(content), 128
    swapped[126:128] = mark
    while at < len(content):
        kind, size = struct.unpack_from("<II", content, at)
        struct.pack_into("<II" if mark == b"IM" else ">II", swapped, at, kind, size)
        at += 8 + size
    return bytes(swapped)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_is_read(compressed):
    cells = np.empty((2, 1), object)
    cells[0, 0], cells[1, 0] = np.arange(3.0), np.zeros((0, 4))
    found = load_mat(content_of(compressed, boxes=cells, name="a"), "x.mat")
    assert found["boxes"][0, 0].tolist() == [[0, 1, 2]] and found["name"][0] == "a"


@pytest.mark.parametrize("cells", [1000, 20_000_000])
@pytest.mark.parametrize("nested", [False, True])
def test_cells_that_are_not_there_are_not_made(cells, nested, monkeypatch):
    array = np.empty((1, 7), object)
    array[:] = np.float64(1)
    if nested:
        outer = np.empty((1, 1), object)
        outer[0, 0] = array
        array = outer
    content = content_of(False, a=array)
    dims = np.array([1, 7], "<i4").tobytes()
    assert content.count(dims) == 1 and load_mat(content, "x.mat")["a"].size
    monkeypatch.setattr("scipy.io.loadmat", lambda file: pytest.fail("scipy was asked to make them"))
    with pytest.raises(ValueError, match=r"x\.mat: .*claims more cells than it has bytes"):
        load_mat(content.replace(dims, np.array([1, cells], "<i4").tobytes()), "x.mat")


@pytest.mark.parametrize("mark", [b"IM", b"XX"])
def test_a_bomb_is_not_unpacked(mark, monkeypatch):
    content = with_mark(content_of(a=np.zeros(50_000), b=np.zeros(50_000)), mark)
    assert len(content) < 10_000
    monkeypatch.setattr(mat, "_MAX_BYTES", 900_000)
    if mark == b"IM":
        assert load_mat(content, "x.mat")["a"].size == 50_000
    monkeypatch.setattr(mat, "_MAX_BYTES", 700_000)  # of both variables together

    def refuse(*args, **kwargs):
        raise AssertionError("scipy was asked to unpack it")

    monkeypatch.setattr("scipy.io.loadmat", refuse)
    with pytest.raises(ValueError, match=r"x\.mat: cannot be read as a MATLAB file \(unpacks to more than"):
        load_mat(content, "x.mat")


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
