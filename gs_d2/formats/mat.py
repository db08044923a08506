"""MATLAB files (version 5), read without trusting them.

scipy's reader is not used: it takes the types and sizes of a damaged file for what they say, and ends the program.
"""

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

_MAX_BYTES = 512 * 2**20  # unpacked; WIDER FACE's largest has 6 MB
_HEADER = 128  # bytes
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "utf-8", 2: "utf-8", 16: "utf-8", 4: "utf-16", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _TEXT = 1, 2, 4  # classes of matrices
_NUMERIC = range(6, 16)
_COMPLEX = 0x08  # flag


def load_mat(content: bytes, where: str) -> dict[str, np.ndarray]:
    """The variables of a MATLAB file, by name, as `scipy.io.loadmat` gives them.

    Numbers are of the type that the file stores them in, cells are arrays of objects, structs structured arrays, and
    the rows of a text one string each.

    Args:
        content: of the file.
        where: the file, for messages.

    Raises:
        ValueError: it is damaged, of another version, unpacks to more than 512 MiB, claims more cells than it has
            bytes, or has something else, such as sparse matrices.
    """
    try:
        return _Reader(content).variables()
    except Exception as error:  # of numpy, struct and zlib; RecursionError and MemoryError among them
        raise ValueError(f"{where}: cannot be read as a MATLAB file ({error})") from error


class _Reader:
    def __init__(self, content: bytes):
        if len(content) < _HEADER:
            raise ValueError(f"it has only {len(content)} bytes")
        mark = content[126:_HEADER]
        if mark not in (b"IM", b"MI"):
            raise ValueError("it is not of version 5")
        self._order = "<" if mark == b"IM" else ">"
        if struct.unpack(f"{self._order}H", content[124:126]) != (0x0100,):
            raise ValueError("it is not of version 5; save it with -v7 where it is of 7.3")
        self._content = content[_HEADER:]

    def variables(self) -> dict[str, np.ndarray]:
        found, left = {}, _MAX_BYTES
        for kind, body in self._elements(self._content):
            if kind == _COMPRESSED:
                stream = zlib.decompressobj()
                body = stream.decompress(body, left + 1)
                left -= len(body)
                if left < 0:
                    raise ValueError(f"unpacks to more than {_MAX_BYTES >> 20} MiB")
                if not stream.eof:
                    raise ValueError("it is cut short")
                kind, body = next(self._elements(body))
            name, value = self._matrix(kind, body)
            found[name] = value
        return found

    def _matrix(self, kind: int, body: bytes) -> tuple[str, np.ndarray]:
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} where a matrix belongs")
        if not body:
            return "", np.zeros((1, 0))
        parts = self._elements(body)
        flags = self._numbers(*next(parts))
        dims = tuple(self._numbers(*next(parts)).tolist())
        name = bytes(next(parts)[1]).decode()
        if len(dims) < 2 or min(dims) < 0:
            raise ValueError(f"{name!r} has the shape {dims}")
        kind, is_complex = int(flags[0]) & 0xFF, int(flags[0]) >> 8 & _COMPLEX
        if kind == _TEXT:
            return name, self._text(*next(parts), dims)
        if kind in _NUMERIC and not is_complex:
            return name, self._numbers(*next(parts)).reshape(dims, order="F")
        if kind not in (_CELL, _STRUCT):
            raise ValueError(f"{name!r} is complex, or of class {kind}: neither numbers, text, cells nor a struct")
        if 8 * math.prod(dims) > len(body):  # an empty cell takes 8 bytes
            raise ValueError("claims more cells than it has bytes")
        names = self._field_names(parts) if kind == _STRUCT else [None]
        values = np.empty(dims, dtype=object if kind == _CELL else [(field, object) for field in names])
        for i in range(math.prod(dims)):
            index = np.unravel_index(i, dims, order="F")
            for field in names:
                target = values if field is None else values[field]
                target[index] = self._matrix(*next(parts))[1]
        return name, values

    def _field_names(self, parts) -> list[str]:
        length = int(self._numbers(*next(parts))[0])
        names = bytes(next(parts)[1])
        if length < 1 or len(names) % length:
            raise ValueError(f"names of fields have {length} bytes each and {len(names)} in all")
        return [names[i : i + length].split(b"\0")[0].decode() for i in range(0, len(names), length)]

    def _numbers(self, kind: int, body: bytes) -> np.ndarray:
        if kind not in _NUMBERS:
            raise ValueError(f"an element of type {kind} where numbers belong")
        return np.frombuffer(body, dtype=self._order + _NUMBERS[kind]).astype(_NUMBERS[kind])

    def _text(self, kind: int, body: bytes, dims: tuple[int, ...]) -> np.ndarray:
        if kind not in _TEXTS:
            raise ValueError(f"an element of type {kind} where text belongs")
        encoding = _TEXTS[kind] + ("" if kind in (1, 2, 16) else "-le" if self._order == "<" else "-be")
        text = bytes(body).decode(encoding)
        if len(dims) != 2 or len(text) != math.prod(dims) or dims[0] > max(len(text), 1):
            raise ValueError(f"a text of {len(text)} letters has the shape {dims}")
        return np.array([text[row :: dims[0]] for row in range(dims[0])], dtype=f"U{max(dims[1], 1)}")

    def _elements(self, data: bytes) -> Iterator[tuple[int, memoryview]]:
        """Type and body of each element; those within a matrix are padded to 8 bytes, and small ones share a word."""
        data, at = memoryview(data), 0
        while at + 8 <= len(data):
            kind, size = struct.unpack_from(f"{self._order}II", data, at)
            start = at + 8
            if kind >> 16:
                kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
            if size > (4 if start == at + 4 else len(data) - start):
                raise ValueError("it is cut short")
            yield kind, data[start : start + size]
            at = at + 8 if start == at + 4 else start + size + (0 if kind == _COMPRESSED else -size % 8)
