"""JSON: what is written is strict, and what is read is any Unicode or one line that names the file."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gs_d2.formats.json_text import json_text, read_json

KEYS = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner)),
    max_leaves=20,
)


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def strict(text):
    return json.loads(text, parse_constant=refuse)


def without_nan(value):
    """Slow and literal: what strict JSON can hold of a value without dictionaries' odd keys."""
    if isinstance(value, float):
        return None if math.isnan(value) or math.isinf(value) else value
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


@given(VALUES)
def test_any_value_is_strict_json(value):
    strict(json_text(value, indent=1))


@given(st.recursive(st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_only_what_json_lacks_changes(value):
    assert strict(json_text(value)) == without_nan(value)


def test_numpy_paths_and_keys(tmp_path):
    value = {
        np.int64(3): np.float32(0.5),
        4: np.array([[1.0, np.nan], [np.inf, 2]]),
        "path": tmp_path,
        0.5: np.bool_(True),
        math.nan: np.float64("-inf"),
        None: (1, 2),
        True: [],
    }
    assert strict(json_text(value)) == {
        "3": 0.5,
        "4": [[1.0, None], [None, 2.0]],
        "path": str(tmp_path),
        "0.5": True,
        "nan": None,
        "null": [1, 2],
        "true": [],
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_any_unicode_is_read(tmp_path, encoding):
    path = tmp_path / "顔.json"
    path.write_bytes('{"名": "é"}\r\r\n'.encode(encoding))
    assert read_json(path) == {"名": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \r\n\t", "the file is empty"),
        (b"{", "not JSON (Expecting"),
        (b"{'a': 1}", "not JSON (Expecting"),
        (b'{"a": 1} x', "not JSON (Extra data"),
        (b'{"a": "\xe9"}', "not JSON: no Unicode text (byte 7)"),
        (b"[" * 200_000, "it is nested too deeply"),
        (b"1" * 5000, "not JSON (Exceeds the limit"),
        (b"\x1f\x8b\x08\x00\x00", "not JSON"),
        (b"\x00" * 8, "not JSON"),
    ],
)
def test_what_is_no_json_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json: no such file"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path)


@given(content=st.binary(max_size=60))
def test_any_bytes_are_read_or_named(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    try:
        read_json(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
