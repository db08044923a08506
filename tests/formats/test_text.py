"""Text as editors and systems write it: every list is read alike, and what is no text is named."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gs_d2.formats import face_eval, fddb
from gs_d2.formats.text import decoded, end_of, lines_of
from gs_d2.formats.wider_face import read_list
from gs_d2.formats.wider_predictions import read_wider_predictions

LISTS = {  # name of the file -> text, and what reads the file's folder into an array
    "list.txt": ("0--P/ä.jpg\n2\n1 2 3 4\n5 6 7 8\n", lambda path: read_list(path / "list.txt")[0].boxes),
    "FDDB-fold-01-ellipseList.txt": (
        "2002/ä\n2\n1 2 3 4 5 1\n5 6 7 8 9 1\n",
        lambda path: fddb.read_annotations(path)["2002/ä"],
    ),
    "fold.txt": ("2002/ä.jpg\n2\n1 2 3 4 0.5\n5 6 7 8 0.25\n", lambda path: fddb.read_detections(path)["2002/ä"]),
    "afw.txt": ("ä.jpg 0.5 1 2 3 4\nä.jpg 0.25 5 6 7 8\n", lambda path: face_eval.read_detections(path)["ä"]),
    "0--P/ä.txt": (
        "ä\n2\n1 2 3 4 0.5\n5 6 7 8 0.25\n",
        lambda path: read_wider_predictions(path, ["0--P/ä"]).detections["0--P/ä"],
    ),
}
SPELLINGS = {
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR CR LF": lambda text: text.replace("\n", "\r\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "blank lines": lambda text: ("\n" + text.replace("\n", "\n \n\t\n")).encode(),
    "tabs": lambda text: text.replace(" ", "\t").encode(),
    "blanks at the ends": lambda text: text.replace("\n", " \t\n ").encode(),
    "no end": lambda text: text.rstrip("\n").encode(),
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 of Windows": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "UTF-16 LE": lambda text: text.encode("utf-16-le"),
    "UTF-16 BE": lambda text: text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
}
BITS = [
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b"-1",
    b"nan",
    b"inf",
    b"1e400",
    b"0x1",
    b"/",
    b"..",
    b"\\",
    b"\xff",
    b"9" * 30,
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", LISTS)
def test_every_reader_reads_every_spelling(tmp_path, name, spelling):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    text, read = LISTS[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    expected = read(tmp_path)
    assert len(expected) == 2
    (tmp_path / name).write_bytes(SPELLINGS[spelling](text))
    np.testing.assert_array_equal(read(tmp_path), expected)


@pytest.mark.parametrize("name", LISTS)
def test_what_is_no_text_is_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    text, read = LISTS[name]
    for content, message in (
        (bytes(64), "not a text file"),
        (text.encode("utf-16")[:-1], "UTF-16 text that is damaged"),
        (text.encode("latin-1"), ":1: not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        if name.startswith("0--P") and b"\xe4" in content and len(content) < 60 and content[1] == 10:
            assert len(read(tmp_path)) == 2  # the name in this file is read by nobody
            continue
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", LISTS)
def test_links_and_the_systems_own_files(tmp_path, name):
    """Files behind links to folders are read, once, and macOS's `._*` never."""
    text, read = LISTS[name]
    store = tmp_path / "store" / name
    store.parent.mkdir(parents=True)
    store.write_text(text, encoding="utf-8")
    (store.parent / f"._{store.name}").write_bytes(b"\0\5\26\7" + bytes(60))
    (tmp_path / "results").mkdir()
    if name == "list.txt":
        (tmp_path / "results" / name).symlink_to(store)
    else:
        (tmp_path / "results" / "linked").symlink_to(tmp_path / "store")
        (tmp_path / "results" / "latest").symlink_to(tmp_path / "store")
    (tmp_path / "results" / "._x.txt").write_bytes(b"\0\5\26\7" + bytes(60))
    (tmp_path / "results" / "loop").symlink_to(tmp_path / "results")
    assert len(read(tmp_path / "results")) == 2


@pytest.mark.parametrize("name", [name for name in LISTS if name != "list.txt"])
def test_upper_case_endings_count(tmp_path, name):
    text, read = LISTS[name]
    path = tmp_path / name.replace(".txt", ".TXT")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace(".jpg", ".JPG"), encoding="utf-8")
    (tmp_path / "other.md").write_text("x")
    assert len(read(tmp_path)) == 2


def test_a_prediction_whose_name_is_blank(tmp_path):
    for text in (
        "\n1\n1 2 3 4 5\n",
        "\n\n1\n1 2 3 4 5",
        " \r\n1\r\n1 2 3 4 5\r\n",
        "12\n1\n1 2 3 4 5",
        "\n12\n1\n1 2 3 4 5",
    ):
        (tmp_path / "0--P").mkdir(exist_ok=True)
        (tmp_path / "0--P" / "a.txt").write_bytes(text.encode())
        assert len(read_wider_predictions(tmp_path, ["0--P/a"]).detections["0--P/a"]) == 1


def test_lines_are_numbered_as_in_the_file():
    assert lines_of("a\r\r\nb\r\n\r\nc\rd\n") == ["a", "b", "", "c", "d", ""]
    assert [end_of(["a", "", "b", ""], 1, n) for n in range(4)] == [1, 3, 4, 4]


@given(content=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-16")))
def test_any_bytes_are_text_or_named(content):
    try:
        lines = lines_of(decoded(content, "f"))
    except ValueError as error:
        assert str(error).startswith("f:")
    else:
        assert lines == [line.strip() for line in lines]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(LISTS)))
def test_any_list_is_read_or_refused_in_one_line_that_names_it(tmp_path, data, name):
    """Lists with bytes taken out, put in and changed, in any encoding and with any line ends."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    text, read = LISTS[name]
    spelling = data.draw(st.sampled_from(sorted(SPELLINGS)))
    content = bytearray(SPELLINGS[spelling](text))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4) | st.sampled_from(BITS))
    (tmp_path / name).write_bytes(content)
    try:
        found = read(tmp_path)
    except KeyError:  # of this test: the image's name is another now
        pass
    except IndexError:
        assert name == "list.txt" and not read_list(tmp_path / name)
    except ValueError as error:
        said = str(error)
        assert str(tmp_path / name) in said and "\n" not in said, said
    else:
        assert found.dtype == np.float64 and np.isfinite(found).all()
    finally:
        (tmp_path / name).unlink()
