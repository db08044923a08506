"""MATLAB files (version 5), read without trusting them."""

import io
import math
import struct
import zlib
from collections.abc import Iterator

_MAX_BYTES = 512 * 2**20  # unpacked; WIDER FACE's largest has 6 MB
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_WITH_CELLS = (1, 2, 3)  # classes of matrices whose cells are Python objects: cell, struct, object
_HEADER = 128  # bytes


def load_mat(content: bytes, where: str) -> dict:
    """The variables of a MATLAB file.

    Args:
        content: of the file.
        where: the file, for messages.

    Raises:
        ValueError: it is damaged, of version 7.3, unpacks to more than 512 MiB, or claims more cells than it has bytes.
    """
    from scipy.io import loadmat

    try:
        _check_sizes(content)
        return loadmat(io.BytesIO(content))
    except Exception as error:  # scipy raises many kinds for a damaged file, MemoryError among them
        raise ValueError(f"{where}: cannot be read as a MATLAB file ({error})") from error


def _check_sizes(content: bytes):
    """scipy unpacks and allocates first, and looks at what is there then."""
    order = "<" if content[126:_HEADER] == b"IM" else ">"  # as scipy decides
    left = _MAX_BYTES
    for kind, body in _elements(content[_HEADER:], order):
        if kind == _COMPRESSED:
            stream = zlib.decompressobj()
            body = stream.decompress(body, left + 1)
            left -= len(body)
            if left < 0:
                raise ValueError(f"unpacks to more than {_MAX_BYTES >> 20} MiB")
            kind, body = next(_elements(body, order), (0, b""))
        if kind == _MATRIX:
            _check_cells(body, order)


def _check_cells(matrix: bytes, order: str):
    parts = _elements(matrix, order)
    (_, flags), (_, dims), _ = next(parts), next(parts), next(parts)
    if flags and (flags[0] if order == "<" else flags[3]) in _WITH_CELLS:
        if 8 * math.prod(struct.unpack(f"{order}{len(dims) // 4}i", dims)) > len(matrix):  # an empty cell takes 8 bytes
            raise ValueError("claims more cells than it has bytes")
        for kind, body in parts:
            if kind == _MATRIX and body:
                _check_cells(body, order)


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and body of each element; those within a matrix are padded to 8 bytes, and small ones share one word."""
    data, at = memoryview(data), 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind >> 16:
            yield kind & 0xFFFF, data[at + 4 : at + 4 + min(kind >> 16, 4)]
            at += 8
            continue
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + size + (0 if kind == _COMPRESSED else -size % 8)
