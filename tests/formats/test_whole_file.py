"""Files that appear whole or not at all; tests/test_checkpoint.py has the crashes, at any byte."""

import os

import pytest

from gs_d2.formats.whole_file import write_text, write_whole


def failing(error):
    def write(file):
        file.write(b"half")
        raise error

    return write


def test_it_takes_the_old_ones_place(tmp_path):
    path = tmp_path / "a" / "b.json"
    for text in ("{}\n", "größer\n"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(path.parent) == ["b.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_keeps_the_old_one(tmp_path, error):
    path = tmp_path / "b.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as raised:
        write_whole(path, failing(error))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["b.bin"]
    if isinstance(error, OSError):
        assert raised.value.errno == 28
        assert f"cannot write {path} (No space left on device): it needs 0.0 MB, and " in str(raised.value)
        assert str(raised.value).endswith("what was there is kept")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_writer_that_hides_the_error_is_found_out(tmp_path):
    """Such as torch.save, which is told of no error and whose own message is about something else."""
    (tmp_path / "b.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(tmp_path / "b.bin", lambda file: [file.write(bytes(10**6)) for _ in range(3)])
    assert os.listdir(tmp_path) == []


def test_no_folder_is_made(tmp_path):
    with pytest.raises(OSError, match="there is none in its folder"):
        write_whole(tmp_path / "none" / "b.bin", lambda file: file.write(b"x"))
