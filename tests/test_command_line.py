"""What scripts share: bad input is one line and exit code 2, as argparse has it; anything else is a traceback."""

import io

import pytest

from gs_d2.command_line import bad_input_ends, file_for, folder_for, parser_of, picture_for


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a.yaml:\n  wrong"), "error: a.yaml: wrong"),
        (FileNotFoundError("no such config: a.yaml"), "error: no such config: a.yaml"),
        (KeyError("Dataset 'x' is not registered"), "not registered"),
        (ImportError("this needs timm"), "error: this needs timm"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, error, line):
    monkeypatch.setattr("sys.argv", ["tools/evaluate.py", "--predictions", "x"])

    @bad_input_ends()
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("evaluate.py: error: ") and line in printed.err


def test_anything_else_goes_through():
    with pytest.raises(ZeroDivisionError), bad_input_ends():
        print(1 / 0)
    with bad_input_ends():
        done = True
    assert done


def test_help_begins_with_the_scripts_words():
    text = "Does it.\n\n    tools/do.py --it"
    assert text in parser_of(text).format_help()


def test_folders_and_files_to_write(tmp_path):
    assert folder_for("--output", tmp_path / "a" / "b").is_dir()
    assert folder_for("--output", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert file_for("--json", tmp_path / "c" / "x.json") == tmp_path / "c" / "x.json" and (tmp_path / "c").is_dir()
    assert picture_for("--output", tmp_path / "x.PDF") == tmp_path / "x.PDF"
    assert picture_for("--output", tmp_path / "x") == tmp_path / "x.png", "as matplotlib would name it"
    (tmp_path / "file").touch()
    for make, path, message in (
        (folder_for, "file", r"--flag .*file: cannot be made a folder \(.*\): name another"),
        (folder_for, "file/x", r"--flag .*file/x: cannot be made a folder"),
        (folder_for, "a\0b", r"--flag .*: cannot be made a folder"),
        (file_for, "file/x", r"--flag .*file: cannot be made a folder"),
        (file_for, "a", r"--flag .*a: is a folder: name a file"),
        (picture_for, "a", r"--flag .*a: is a folder: name a file"),
        (picture_for, "x.json", r"--flag .*x\.json: must end in \.png"),
    ):
        with pytest.raises(ValueError, match=message):
            make("--flag", tmp_path / path)


def test_any_name_can_be_printed(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    parser_of(None)
    print("\u9854 caf\udce9.jpg", flush=True)
    assert stream.buffer.getvalue() == b"\\u9854 caf\\udce9.jpg\n"
