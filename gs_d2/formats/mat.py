"""MATLAB files (version 5), read without trusting them."""

import io
import struct
import zlib

_MAX_BYTES = 512 * 2**20  # unpacked; WIDER FACE's largest has 6 MB
_COMPRESSED = 15  # an element's type
_HEADER = 128  # bytes


def load_mat(content: bytes, where: str) -> dict:
    """The variables of a MATLAB file.

    Args:
        content: of the file.
        where: the file, for messages.

    Raises:
        ValueError: it is damaged, of version 7.3, or unpacks to more than 512 MiB.
    """
    from scipy.io import loadmat

    try:
        _check_unpacked_size(content)
        return loadmat(io.BytesIO(content))
    except Exception as error:  # scipy raises many kinds for a damaged file, MemoryError among them
        raise ValueError(f"{where}: cannot be read as a MATLAB file ({error})") from error


def _check_unpacked_size(content):
    """scipy unpacks first and looks at the result then."""
    order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER])
    at, total = _HEADER, 0
    while order and at + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        if kind == _COMPRESSED:
            rest, stream = content[at + 8 : at + 8 + size], zlib.decompressobj()
            while rest and not stream.eof:
                total += len(stream.decompress(rest, 2**20))
                if total > _MAX_BYTES:
                    raise ValueError(f"unpacks to more than {_MAX_BYTES >> 20} MiB")
                rest = stream.unconsumed_tail
        at += 8 + size
