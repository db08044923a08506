"""prepare_wider_face.py: from zips and folders to the layout, and no further."""

import io
import os
import re
import stat
import zipfile

import pytest
from PIL import Image
from prepare_wider_face import main

from gs_d2.data import load_wider_face
from gs_d2.formats.files import ZipLimits

EVENT = "0--Parade"


@pytest.fixture
def run(monkeypatch, run_command):
    """Calls the tool for a data set of two training images, one validation image and one test image."""
    monkeypatch.setattr("prepare_wider_face.SPLITS", {"train": (2, 3), "val": (1, 1), "test": (1, 0)})

    def run(*arguments):
        status, out, err = run_command(main, *arguments)
        assert len(err.strip().splitlines()) == (1 if status else 0) or "%" in err
        return status, out, err

    return run


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (90, 90, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


LISTS = {
    "train": f"{EVENT}/a.jpg\n2\n1 2 10 10 0 0 0 0 0 0\n3 4 9 9 0 0 0 0 0 0\n{EVENT}/b.jpg\n1\n5 5 8 8 0 0 0 0 0 0\n",
    "val": f"{EVENT}/c.jpg\n1\n1 2 10 10 0 0 0 0 0 0\n",
    "test": f"{EVENT}/d.jpg\n",
}
CONTENT = {
    "WIDER_train.zip": {
        f"WIDER_train/images/{EVENT}/a.jpg": jpeg(),
        f"WIDER_train/images/{EVENT}/b.jpg": jpeg(),
        f"__MACOSX/WIDER_train/images/{EVENT}/._a.jpg": b"x",
    },
    "WIDER_val.zip": {f"WIDER_val/images/{EVENT}/c.jpg": jpeg()},
    "WIDER_test.zip": {f"WIDER_test/images/{EVENT}/d.jpg": jpeg()},
    "wider_face_split.zip": {
        "wider_face_split/wider_face_train_bbx_gt.txt": LISTS["train"],
        "wider_face_split/wider_face_val_bbx_gt.txt": LISTS["val"],
        "wider_face_split/wider_face_test_filelist.txt": LISTS["test"],
        "wider_face_split/readme.html": "no part of the layout",
    },
    "eval_tools.zip": {
        "eval_tools/wider_eval.m": "no part of the layout",
        **{f"eval_tools/ground_truth/wider_{subset}_val.mat": b"mat" for subset in ("face", "easy", "medium", "hard")},
    },
}
LAYOUT = sorted(
    name.removeprefix("eval_tools/")
    for files in CONTENT.values()
    for name in files
    if not name.startswith("__MACOSX") and not name.endswith((".html", ".m"))
)


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def downloads(tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name, files in CONTENT.items():
        write_zip(folder / name, files)
    return folder


def tree(base):
    return sorted(p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file())


def test_from_zips(run, downloads, tmp_path):
    status, out, _ = run(downloads, "--output", tmp_path / "data")
    base = tmp_path / "data" / "widerface"
    assert status == 0 and tree(base) == LAYOUT
    assert "wider_face_train: 2 images, 3 boxes: whole" in out
    assert f"export DETECTRON2_DATASETS={tmp_path / 'data'}" in out
    (record,) = load_wider_face(base / "wider_face_split" / "wider_face_val_bbx_gt.txt", base / "WIDER_val" / "images")
    assert Image.open(record["file_name"]).size == (40, 30)


def test_again_changes_nothing(run, downloads, tmp_path):
    arguments = downloads, "--output", tmp_path / "data"
    run(*arguments)
    image = tmp_path / "data/widerface/WIDER_val/images" / EVENT / "c.jpg"
    os.utime(image, (1, 1))
    status, out, _ = run(*arguments)
    assert status == 0 and image.stat().st_mtime == 1
    assert "WIDER_val.zip: 0 files unpacked, 1 were there" in out


def test_a_half_written_file_is_written_again(run, downloads, tmp_path):
    arguments = downloads, "--output", tmp_path / "data"
    run(*arguments)
    image = tmp_path / "data/widerface/WIDER_val/images" / EVENT / "c.jpg"
    image.write_bytes(jpeg()[:50])
    assert run(*arguments)[0] == 0
    assert image.read_bytes() == jpeg()


@pytest.mark.parametrize("copy", [False, True])
def test_from_folders(run, downloads, tmp_path, copy):
    run(downloads, "--output", tmp_path / "first")
    source, flags = tmp_path / "first" / "widerface", ["--copy"] if copy else []
    for _ in range(2):
        status, _, _ = run(source, "--output", tmp_path / "second", *flags)
        assert status == 0
    target = tmp_path / "second" / "widerface" / "WIDER_train"
    assert target.is_symlink() != copy
    assert (target / "images" / EVENT / "a.jpg").read_bytes() == jpeg()


def test_unpacking_does_not_write_into_what_is_linked(run, downloads, tmp_path):
    run(downloads, "--output", tmp_path / "first")
    run(tmp_path / "first", "--output", tmp_path / "second")
    image = tmp_path / "first/widerface/WIDER_val/images" / EVENT / "c.jpg"
    image.write_bytes(b"mine")
    run(downloads, "--output", tmp_path / "second")
    assert image.read_bytes() == b"mine"


def test_zips_inside_the_layout_are_found(run, downloads, tmp_path):
    (tmp_path / "data").mkdir()
    downloads.rename(tmp_path / "data" / "widerface")
    assert run("--output", tmp_path / "data")[0] == 0


def test_what_is_missing_is_said(run, downloads, tmp_path):
    (downloads / "eval_tools.zip").unlink()
    (downloads / "WIDER_val.zip").unlink()
    status, out, err = run(downloads, "--output", tmp_path)
    assert status == 2
    assert "val: 1 of 1 images missing, first WIDER_val/images/0--Parade/c.jpg (from WIDER_val.zip)" in err
    assert "ground_truth: no wider_face_val.mat, " in err and "(from eval_tools.zip)" in err
    assert "http://shuoyang1213.me/WIDERFACE/" in out
    assert run("--check-only", "--splits", "train", "--output", tmp_path)[0] == 0


def test_check_only_changes_nothing(run, downloads, tmp_path):
    status, out, err = run(downloads, "--check-only", "--output", tmp_path / "data")
    assert status == 2 and not (tmp_path / "data").exists()
    assert "no wider_face_train_bbx_gt.txt (from wider_face_split.zip)" in err and "PAGE" not in out


def test_images_are_read_to_their_end_on_demand(run, run_command, downloads, tmp_path):
    arguments = downloads, "--output", tmp_path / "data"
    assert run(*arguments, "--read-images")[0] == 0
    image = tmp_path / "data/widerface/WIDER_train/images" / EVENT / "b.jpg"
    image.write_bytes(image.read_bytes()[:-100])
    assert run_command(main, *arguments[1:], "--check-only")[0] == 0
    status, _, err = run_command(main, *arguments[1:], "--check-only", "--read-images")
    assert status == 2
    assert f"{image}: cannot be read as an image" in err
    assert f"train: 1 images cannot be read, first WIDER_train/images/{EVENT}/b.jpg" in err


def test_another_list_is_noticed(run, downloads, tmp_path, monkeypatch):
    monkeypatch.setattr("prepare_wider_face.SPLITS", {"train": (2, 4), "val": (3226, 1), "test": (1, 0)})
    status, _, err = run(downloads, "--output", tmp_path)
    assert status == 2
    assert "wider_face_train_bbx_gt.txt has 3 boxes, the official one 4" in err
    assert "wider_face_val_bbx_gt.txt has 1 images, the official one 3,226" in err


@pytest.mark.parametrize(
    "name",
    ["../WIDER_val/images/x.jpg", "/WIDER_val/images/x.jpg", "WIDER_val/../../x.jpg", "C:/WIDER_val/images/x.jpg"],
)
def test_paths_that_leave_the_archive(run, tmp_path, name):
    archive = write_zip(tmp_path / "WIDER_val.zip", {name: jpeg(), f"WIDER_val/images/{EVENT}/c.jpg": jpeg()})
    status, _, err = run(archive, "--output", tmp_path / "data")
    assert status == 2 and "which leaves the archive; refused" in err
    assert not (tmp_path / "data").exists()


def link_entry(path):
    info = zipfile.ZipInfo(f"WIDER_val/images/{EVENT}/c.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "/etc/passwd")


def damaged(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"WIDER_val/images/{EVENT}/c.jpg", os.urandom(4000))
    data = bytearray(path.read_bytes())
    data[200:1200] = bytes(1000)
    path.write_bytes(bytes(data))


def bomb(path):
    write_zip(path, {f"WIDER_val/images/{EVENT}/c.jpg": bytes(3000)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (link_entry, "c.jpg is a link; refused"),
        (damaged, r"damaged \(.*\); download it again"),
        (bomb, "unpacks to more than"),
        (lambda path: path.write_bytes(b"<html>quota exceeded</html>"), "not a zip, or damaged; download it again"),
        (lambda path: write_zip(path, {"cats/a.jpg": jpeg()}), "is it one of the official zips"),
        (lambda path: None, "no such file or folder"),
    ],
    ids=["link", "damaged", "bomb", "html", "other", "absent"],
)
def test_zips_that_are_refused(run, tmp_path, monkeypatch, make, message):
    if make is bomb:
        monkeypatch.setattr("prepare_wider_face.LIMITS", ZipLimits(total_bytes=2999))
    archive = tmp_path / "WIDER_val.zip"
    make(archive)
    status, _, err = run(archive, "--output", tmp_path / "data")
    assert status == 2
    assert re.search(message, err), err
    assert not list((tmp_path / "data").rglob("*.jpg"))


def test_the_official_lists(run_command, shared_data, tmp_path):
    """Without images: the lists and their counts are the official ones, and only images are missing."""
    source = shared_data / "wider_face"
    status, out, err = run_command(main, source, "--output", tmp_path)
    assert status == 2
    assert "12,880 of 12,880 images missing" in err and "3,226 of 3,226 images missing" in err
    assert "the official one" not in err and "ground_truth: whole" in out


def unpacked(root, downloads, twice):
    """The zips unpacked as Windows does: each into a folder of its name, or twice so."""
    for path in downloads.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(root / path.stem if twice else root)
    return root


@pytest.mark.parametrize("twice", [False, True])
def test_doubled_and_linked_folders(run, downloads, tmp_path, twice):
    source = unpacked(tmp_path / "unpacked", downloads, twice)
    (source / "WIDER_val" / ".DS_Store").write_text("x")
    links = tmp_path / "links"
    links.mkdir()
    for path in source.iterdir():
        (links / path.name).symlink_to(path)
    (links / "loop").symlink_to(links)
    for flags in ([], ["--copy"]):
        output = tmp_path / f"out{len(flags)}"
        status, out, _ = run(links, "--output", output, *flags)
        assert status == 0 and "ground_truth: whole" in out
        assert (output / "widerface/WIDER_train/images" / EVENT / "a.jpg").is_file()


def test_a_layout_with_doubled_folders_is_whole(run, downloads, tmp_path):
    base = unpacked(tmp_path / "data" / "widerface", downloads, True)
    (base / "eval_tools" / "eval_tools" / "ground_truth").rename(base / "ground_truth")
    status, out, _ = run("--output", tmp_path / "data", "--check-only")
    assert status == 0 and "wider_face_val: 1 images, 1 boxes: whole" in out
    assert run("--output", tmp_path / "data")[0] == 0


def test_a_second_call_moves_links_that_were_wrong(run, downloads, tmp_path):
    source, base = unpacked(tmp_path / "unpacked", downloads, False), tmp_path / "data" / "widerface"
    base.mkdir(parents=True)
    partly = tmp_path / "wrong" / "WIDER_train" / "images" / EVENT
    partly.mkdir(parents=True)
    (partly / "a.jpg").write_bytes(jpeg())
    (base / "WIDER_train").symlink_to(tmp_path / "wrong" / "WIDER_train")  # some of the images
    (base / "WIDER_val").symlink_to(tmp_path / "gone")
    (base / "wider_face_split").symlink_to(tmp_path / "wrong")  # another folder
    (base / "ground_truth").mkdir()
    status, out, _ = run(source, "--output", tmp_path / "data")
    assert status == 0
    assert f"WIDER_train was linked to {tmp_path / 'wrong' / 'WIDER_train'}, which has fewer of its files" in out
    assert (partly / "a.jpg").is_file() and (base / "WIDER_train").resolve() == source / "WIDER_train"
    # Zips take the place of such links, too, and a link that is as good stays.
    (base / "WIDER_train").unlink()
    (base / "WIDER_train").symlink_to(tmp_path / "wrong" / "WIDER_train")
    status, out, _ = run(downloads, "--output", tmp_path / "data")
    assert status == 0 and not (base / "WIDER_train").is_symlink() and (base / "WIDER_val").is_symlink()
    assert sorted(path.name for path in partly.iterdir()) == ["a.jpg"]


def test_a_folder_without_the_files_is_not_linked(run, downloads, tmp_path):
    (downloads / "WIDER_val.zip").unlink()
    (downloads / "WIDER_val" / "images").mkdir(parents=True)
    status, _, err = run(downloads, "--output", tmp_path / "data")
    assert status == 2 and "1 of 1 images missing" in err
    assert not (tmp_path / "data" / "widerface" / "WIDER_val").exists()


def test_zips_with_doubled_folders_and_other_capitals(run, downloads, tmp_path):
    for path in list(downloads.glob("*.zip")):
        files = {f"{path.stem.lower()}/{name}": data for name, data in CONTENT[path.name].items()}
        path.unlink()
        write_zip(path.with_suffix(".ZIP"), files)
    (downloads / "._WIDER_val.zip").write_bytes(b"x")
    status, _, _ = run(downloads, "--output", tmp_path / "data")
    assert status == 0 and tree(tmp_path / "data" / "widerface") == LAYOUT


@pytest.mark.parametrize("below", ["", "x"])
def test_an_output_that_is_a_file(run, downloads, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    status, _, err = run(downloads, "--output", tmp_path / "file" / below)
    assert status == 2 and re.search("--output .*file.*: cannot be made a folder .*: name another", err)


def test_a_good_link_stays_beside_a_zip_with_more_of_its_own(run, downloads, tmp_path):
    """The official zip of lists has .mat files and a readme as well."""
    files = {**CONTENT["wider_face_split.zip"], "wider_face_split/wider_face_train.mat": b"mat"}
    write_zip(downloads / "wider_face_split.zip", {**files, "wider_face_split/readme.txt": b"text"})
    source, base = unpacked(tmp_path / "unpacked", downloads, False), tmp_path / "data" / "widerface"
    for _ in range(2):
        assert run(source, "--output", tmp_path / "data")[0] == 0
        assert run(downloads, "--output", tmp_path / "data")[0] == 0
        assert (base / "wider_face_split").is_symlink() and (base / "ground_truth").is_symlink()
