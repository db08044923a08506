"""Folders with links, loops, files of the system's own, and doubled by unpacking."""

import os

import pytest

from gs_d2.formats import folders
from gs_d2.formats.folders import files_below, is_system_file, undoubled, walk


def make(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")


def found(root, **options):
    return [
        (folder / name).relative_to(root).as_posix() for folder, _, names in walk(root, **options) for name in names
    ]


def test_links_to_folders_are_followed(tmp_path):
    make(tmp_path, "store/a/x.txt", "store/b/y.txt", "root/c/z.txt")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "root" / "c" / "b").symlink_to("../../store/b")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "store" / "a")
    assert found(tmp_path / "root") == ["a/x.txt", "again/x.txt", "c/z.txt", "c/b/y.txt"]
    assert found(tmp_path / "root", max_depth=1) == ["a/x.txt", "again/x.txt", "c/z.txt"]
    assert found(tmp_path / "root", max_depth=0) == []
    (tmp_path / "link").symlink_to("root")
    assert len(files_below(tmp_path / "link")) == 4


def test_loops_end(tmp_path):
    make(tmp_path, "a/x.txt", "b/y.txt")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "a" / "b").symlink_to("../b")
    (tmp_path / "b" / "a").symlink_to("../a")
    assert found(tmp_path) == ["a/self", "a/x.txt", "a/b/y.txt", "b/y.txt", "b/a/self", "b/a/x.txt"]


def test_links_that_lead_to_each_other_are_not_followed_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_MAX_FOLDERS", 50)
    for i in range(6):
        make(tmp_path, f"{i}/x")
        for j in range(6):
            (tmp_path / str(i) / f"to_{j}").symlink_to(f"../{j}")
    with pytest.raises(ValueError, match="more than 50 folders; do links"):
        files_below(tmp_path)


def test_what_may_not_be_read_is_passed_over(tmp_path):
    make(tmp_path, "a/x.txt", "b/y.txt")
    (tmp_path / "gone").symlink_to("nowhere")
    assert found(tmp_path) == ["gone", "a/x.txt", "b/y.txt"]


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("._a.txt", True),
        ("x/._a/b.txt", True),
        ("__MACOSX/a.txt", True),
        ("a/.DS_Store", True),
        ("Thumbs.db", True),
        ("THUMBS.DB", True),
        ("desktop.ini", True),
        ("a.txt", False),
        (".hidden", False),
        ("a._b", False),
    ],
)
def test_the_systems_own_files(tmp_path, name, system):
    assert is_system_file(name) == system
    make(tmp_path, name)
    assert found(tmp_path) == ([] if system else [name])


def test_a_caller_can_leave_folders_out(tmp_path):
    make(tmp_path, "a/x", "b/y")
    for _, names, _ in walk(tmp_path):
        if "a" in names:
            names.remove("a")
    seen = []
    for folder, names, _ in walk(tmp_path):
        names[:] = [name for name in names if name != "a"]
        seen.append(os.path.basename(folder))
    assert seen == [tmp_path.name, "b"]


def test_doubled_folders(tmp_path):
    make(tmp_path, "V/V/V/images/x", "V/.DS_Store", "L/L/list.txt", "P/images/x", "Q/Q/x", "Q/other", "W/W.txt")
    assert undoubled(tmp_path / "V") == tmp_path / "V/V/V"
    assert undoubled(tmp_path / "V/images") == tmp_path / "V/V/V/images"
    assert undoubled(tmp_path / "L/list.txt") == tmp_path / "L/L/list.txt"
    for as_it_is in ("P", "P/images", "Q", "W", "W/W.txt", "none", "none/images", "V/nothing"):
        assert undoubled(tmp_path / as_it_is) == tmp_path / as_it_is
