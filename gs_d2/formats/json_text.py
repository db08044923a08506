"""JSON, as strict readers know it: written without NaN and infinity, and read in any Unicode encoding."""

import json
import math
import os
from pathlib import Path

import numpy as np


def json_text(value, **options) -> str:
    """A value as strict JSON.

    NaN and infinity, for which JSON has no word, become null, numpy's numbers and arrays Python's, and what JSON does
    not know, such as a path, its text.

    Args:
        options: of `json.dumps`, such as `indent` and `sort_keys`.
    """
    return json.dumps(_plain(value), allow_nan=False, default=str, **options)


def _plain(value):
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key if isinstance(key, str) else _key(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _key(key) -> str:
    """Python's way of writing a key that is no text, for numpy's numbers too."""
    key = key.item() if isinstance(key, np.generic) else key
    if isinstance(key, float) and not math.isfinite(key):
        return str(key)
    return json.dumps(key) if key is None or isinstance(key, (bool, int, float)) else str(key)


def read_json(path: str | os.PathLike):
    """The value of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, empty, or no JSON; names it in one line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path}: the file is empty")
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON: no Unicode text (byte {error.start})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
