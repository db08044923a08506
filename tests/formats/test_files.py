"""Folders, zips and rows of numbers that somebody made to do harm, or that broke on the way."""

import os
import stat
import struct
import zipfile

import pytest

from gs_d2.data.wider_face_layout import find_parts
from gs_d2.formats.files import FileTree, ZipLimits, is_inside, open_zip, parse_rows
from gs_d2.weights import read_weights


def make_zip(path, entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def linked(path):
    info = zipfile.ZipInfo("a.txt")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return make_zip(path, {info: "/etc/passwd"})


def encrypted(path):
    make_zip(path, {"a.txt": "x"})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(bytes(content))


def twice(path):
    make_zip(path, {"a.txt": "x", "b.txt": "y"})
    path.write_bytes(path.read_bytes().replace(b"b.txt", b"a.txt"))


def without_directory(path):
    make_zip(path, {"a.txt": "x"})
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x09\x09"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (linked, r"a\.txt is a link"),
        (encrypted, r"a\.txt is encrypted"),
        (twice, r"a\.txt is in the zip twice"),
        (without_directory, "not a readable zip"),
        (lambda path: make_zip(path, {"a.txt": bytes(2 * 2**20)}), r"a\.txt unpacks to more than 100 times its size"),
        (lambda path: make_zip(path, {"a.txt": "x"}, zipfile.ZIP_LZMA), r"a\.txt is compressed by method 14"),
        (lambda path: make_zip(path, {"a.txt": "x"}, zipfile.ZIP_BZIP2), r"a\.txt is compressed by method 12"),
    ],
    ids=["link", "encrypted", "twice", "no directory", "ratio", "lzma", "bzip2"],
)
def test_zips_that_are_refused(tmp_path, make, message):
    path = tmp_path / "p.zip"
    make(path)
    with pytest.raises(ValueError, match=message) as error:
        FileTree(path)
    assert str(path) in str(error.value)


OUTSIDE = ("", "../a", "a/../../b", "a/..", "/a", "//a/b", "a//b", "C:/a", "C:a", "c:", "..\\a", "a\\b", "a\0b", "a\nb")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_their_folder(name):
    assert not is_inside(name)


def test_names_that_stay():
    assert all(map(is_inside, ("a", "a/b.txt", "a/", ".hidden/b", "0--Parade/0_Parade_a..b", "Ähre/ü 1")))


@pytest.mark.parametrize("name", ["../a.txt", "/a.txt", "C:a.txt", "C:\\a.txt", "a\\..\\..\\b.txt"])
def test_zips_with_paths_out_of_them(tmp_path, name):
    placeholder = "x" * len(name)  # zipfile itself would write another name
    path = make_zip(tmp_path / "p.zip", {placeholder: "1"})
    path.write_bytes(path.read_bytes().replace(placeholder.encode(), name.encode()))
    with pytest.raises(ValueError, match=r"unsafe path .* in the zip"):
        FileTree(path)


def test_limits_are_those_asked_for(tmp_path):
    path = make_zip(tmp_path / "p.zip", {"a.txt": "0123456789", "b.txt": "0123456789", "folder/": ""})
    for limits, message in (
        (ZipLimits(entries=2), "3 entries, more than 2"),
        (ZipLimits(file_bytes=9), "unpacks to more than"),
        (ZipLimits(total_bytes=19), "unpacks to more than"),
    ):
        with pytest.raises(ValueError, match=message):
            open_zip(path, limits)
    archive, members = open_zip(path, ZipLimits(entries=3, file_bytes=10, total_bytes=20))
    with archive:
        assert sorted(members) == ["a.txt", "b.txt"]


def test_damaged_contents_are_named(tmp_path):
    path = make_zip(tmp_path / "p.zip", {"a.txt": os.urandom(3000).hex()})
    content = bytearray(path.read_bytes())
    content[100:1100] = bytes(range(250)) * 4
    path.write_bytes(bytes(content))
    with FileTree(path) as tree, pytest.raises(ValueError, match=r"p\.zip:a\.txt: cannot be read"):
        tree.read_bytes("a.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    with FileTree(tmp_path) as tree:
        for name in ("a.txt", "b.txt"):
            with pytest.raises(ValueError, match=rf"{name[0]}\.txt: not a regular file"):
                tree.read_bytes(name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1 nan 3", "line 8: NaN or infinity: '1 nan 3'"),
        ("1 -inf 3", "line 8: NaN or infinity"),
        ("1 1e999 3", "line 8: NaN or infinity"),
        ("1 1e9 3", r"line 8: beyond 1e\+09: '1 1e9 3'"),
        ("1 -1e308 3", r"line 8: beyond 1e\+09"),
        ("1 0x10 3", "line 8: not a number"),
        ("1 1_0 3", "line 8: not a number"),
        ("1 2", "line 8: need 3 numbers, got 2"),
    ],
)
def test_rows_of_no_use_are_named(row, message):
    with pytest.raises(ValueError, match=rf"p\.txt, {message}"):
        parse_rows(["1 2 3", row, "4 5 6"], 7, 3, "p.txt")
    assert parse_rows(["1 2 9.9e8", "", "4 5 -6"], 7, 3, "p.txt").tolist() == [[1, 2, 9.9e8], [4, 5, -6]]


def test_a_zip_at_which_python_raises_when_it_is_asked_whether_it_is_one(tmp_path):
    """One that says that there are other parts of it."""
    path = make_zip(tmp_path / "a.zip", {"a.txt": "x"})
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    path.write_bytes(content[:end] + b"PK\6\7" + struct.pack("<LQL", 0, 0, 2) + content[end:])
    with pytest.raises(zipfile.BadZipFile):
        zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match=r"a\.zip: not a readable zip file \(zipfiles that span multiple disks"):
        FileTree(path)
    with pytest.raises(ValueError, match=r"a\.zip cannot be read as weights \(zipfiles that span multiple disks"):
        read_weights(path)
    assert find_parts([path]) == [("zip", path)]
