"""Folders and zips, read without trusting them, and rows of numbers, read and written."""

import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from gs_d2.formats.folders import files_below, is_system_file
from gs_d2.formats.text import decoded


@dataclass(frozen=True)
class ZipLimits:
    """What a zip may hold: entries, and bytes unpacked of a file and of all; a large file may shrink to 1 % at most."""

    entries: int = 200_000
    file_bytes: int = 64 * 2**20
    total_bytes: int = 2**30


# Real prediction sets have about 3,300 entries and, with 1.9 million detections, about 100 MB.
_PREDICTIONS = ZipLimits()
_MAX_RATIO = 100
_RATIO_FROM = 2**20  # bytes unpacked; less does no harm
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may ask for gigabytes to work in
_BROKEN = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError)
_MAX_NUMBER = 1e9  # far above any pixel, score or count of rows; keeps later arithmetic finite

_BOX_DECIMALS, _SCORE_DECIMALS = 3, 8
BOX_FORMAT = " ".join([f"%.{_BOX_DECIMALS}f"] * 4)
SCORE_FORMAT = f"%.{_SCORE_DECIMALS}f"


def is_inside(name: str) -> bool:
    """Whether a relative path with forward slashes stays below its folder, on any system."""
    drive = re.match(r"[A-Za-z]:", name)
    return (
        bool(name)
        and not (drive or name.startswith("/") or {"..", ""} & set(name.rstrip("/").split("/")))
        and ("\\" not in name and name.isprintable())
    )


def is_zip(path: str | os.PathLike) -> bool:
    """`zipfile.is_zipfile`, but True for damaged ones at which that raises: who opens them says more."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def open_zip(path: str | os.PathLike, limits: ZipLimits) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """An archive and its files by name, with forward slashes; nothing is unpacked.

    Raises:
        ValueError: naming the zip and the entry: it is damaged, encrypted, beyond the limits, compressed by a method
            that official zips do not use, has a link, a file twice, or a path that would leave the archive.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise ValueError(f"{path}: not a readable zip file ({error}); make it again or download it again") from error
    try:
        return archive, _checked_members(path, archive.infolist(), limits)
    except ValueError:
        archive.close()
        raise


def _checked_members(path, infos, limits) -> dict[str, zipfile.ZipInfo]:
    if len(infos) > limits.entries:
        raise ValueError(f"{path}: {len(infos)} entries, more than {limits.entries}; refused")
    members, total = {}, 0
    for info in infos:
        name = info.filename.replace("\\", "/")
        if PurePosixPath(name).name == "Icon\r":  # of macOS, and not printable
            continue
        if not is_inside(name):
            raise ValueError(f"{path}: unsafe path {info.filename!r} in the zip, which leaves the archive; refused")
        if info.is_dir() or is_system_file(name):
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"{path}: {name} is a link; refused: make the zip again with the files themselves")
        if info.flag_bits & 1:
            raise ValueError(f"{path}: {name} is encrypted; make the zip again without a password")
        if info.compress_type not in _METHODS:
            raise ValueError(f"{path}: {name} is compressed by method {info.compress_type}; make the zip with deflate")
        if name in members:
            raise ValueError(f"{path}: {name} is in the zip twice; make the zip again")
        total += info.file_size
        if info.file_size > limits.file_bytes or total > limits.total_bytes:
            raise ValueError(
                f"{path}: unpacks to more than {limits.file_bytes >> 20} MiB a file or "
                f"{limits.total_bytes >> 20} MiB in all (at {name}); if you trust it, unpack it yourself"
            )
        if info.file_size > max(_RATIO_FROM, _MAX_RATIO * info.compress_size):
            raise ValueError(
                f"{path}: {name} unpacks to more than {_MAX_RATIO} times its size; if you trust it, unpack it yourself"
            )
        members[name] = info
    return members


class FileTree:
    """A read-only view of the files of a folder, of a zip, or of one file. Zips are read in memory, never
    unpacked; links to folders are followed; files of the system's own (`._*`, `.DS_Store`) are passed over.

    Args:
        path: a folder, a `.zip` file, or any other file (then the tree holds only it).

    Attributes:
        names (list[str]): relative paths with forward slashes, sorted.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: for a zip that :func:`open_zip` refuses; the limits are far above any real prediction set.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._zip = None
        self._bytes_read = 0
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file or folder")
        if self.path.is_dir():
            self.names = sorted(path.relative_to(self.path).as_posix() for path in files_below(self.path))
        elif is_zip(self.path):
            self._zip, self._members = open_zip(self.path, _PREDICTIONS)
            self.names = sorted(self._members)
        elif self.path.suffix.lower() == ".zip":
            raise ValueError(f"{self.path}: not a readable zip file; make it again or give the folder instead")
        else:
            self.names = [self.path.name]

    @property
    def is_file(self) -> bool:
        """Whether the tree is one file that is not a zip."""
        return self._zip is None and not self.path.is_dir()

    def named(self, *suffixes: str) -> list[str]:
        """Those of `names` that end in one of the suffixes, in upper or lower case."""
        return [name for name in self.names if name.lower().endswith(suffixes)]

    def distinct(self, names: Iterable[str]) -> list[str]:
        """Some of `names`, without those that are a second link to the same file."""
        found = {}
        for name in names:
            found.setdefault(name if self._zip is not None else os.path.realpath(self.where(name)), name)
        return list(found.values())

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._zip is not None:
            self._zip.close()

    def where(self, name: str) -> str:
        """How an error message names a file of the tree."""
        if self._zip is not None:
            return f"{self.path}:{name}"
        return str(self.path / name) if self.path.is_dir() else str(self.path)

    def read_bytes(self, name: str) -> bytes:
        """The content of one of `names`. Raises ValueError for a damaged or an over-large member of a zip, and for
        what is no file (a pipe would be waited for, a device never ends)."""
        if self._zip is None:
            path = Path(self.where(name))
            if path.exists() and not path.is_file():
                raise ValueError(f"{path}: not a regular file; refused")
            return path.read_bytes()
        try:
            with self._zip.open(self._members[name]) as member:
                content = member.read(_PREDICTIONS.file_bytes + 1)  # a header may lie about the size
        except _BROKEN as error:
            raise ValueError(f"{self.where(name)}: cannot be read ({error}); make the zip again") from error
        self._bytes_read += len(content)
        if len(content) > _PREDICTIONS.file_bytes or self._bytes_read > _PREDICTIONS.total_bytes:
            raise ValueError(f"{self.where(name)}: larger than its header says; make the zip again")
        return content

    def read_text(self, name: str, *, any_names: bool = False) -> str:
        """`read_bytes` as text, by :func:`gs_d2.formats.text.decoded`."""
        return decoded(self.read_bytes(name), self.where(name), any_names=any_names)


def numbers_of(lines: list[str], columns: tuple[int, ...], below: float) -> np.ndarray | None:
    """Rows of numbers, float64 [n, columns], or None where they are anything else.

    Args:
        lines: the text of the rows, at least one.
        columns: how many numbers a row may have; all rows must have the same.
        below: the absolute value of each number must be below this; NaN and infinity never are.
    """
    if any("_" in line for line in lines):  # Python reads 1_000 as a number, no other tool does
        return None
    try:
        values = np.array([line.split() for line in lines], dtype=np.float64)
    except ValueError:
        return None
    right = values.ndim == 2 and values.shape[1] in columns and (np.abs(values) < below).all()
    return values if right else None


def parse_rows(lines: list[str], first_line: int, num_columns: int, where: str) -> np.ndarray:
    """Rows of numbers, checked.

    Args:
        lines: the text of the rows; blank ones are skipped.
        first_line: the number of `lines[0]` in its file, for messages.
        num_columns: how many numbers each row must have, finite and below 1e9.
        where: the file, for messages.

    Returns:
        ndarray[n, num_columns]: float64.

    Raises:
        ValueError: naming the file and the line of the first row that is anything else.
    """
    kept = [line for line in lines if line.strip()]
    if not kept:
        return np.zeros((0, num_columns))
    values = numbers_of(kept, (num_columns,), _MAX_NUMBER)
    if values is not None:
        return values
    for number, line in enumerate(lines, first_line):
        row = line.split()
        if not row:
            continue
        text = " ".join(row)[:80]
        if len(row) != num_columns:
            raise ValueError(f"{where}, line {number}: need {num_columns} numbers, got {len(row)}: {text!r}")
        try:
            numbers = np.abs([float(token.replace("_", "?")) for token in row])
        except ValueError:
            raise ValueError(f"{where}, line {number}: not a number: {text!r}") from None
        if not np.isfinite(numbers).all():
            raise ValueError(
                f"{where}, line {number}: NaN or infinity: {text!r}; the detector writes what is no number"
            )
        if (numbers >= _MAX_NUMBER).any():
            raise ValueError(
                f"{where}, line {number}: beyond {_MAX_NUMBER:g}: {text!r}; the detector writes what is no number"
            )
    raise AssertionError("unreachable: the whole array was refused but no row was")


def parse_count(text: str, where: str, number: int) -> int:
    """The count of rows that stands on line `number`; ValueError if it is not a whole number >= 0."""
    try:
        count = float(text.replace("_", "?"))
    except ValueError:
        count = -1.0
    if not (0 <= count <= _MAX_NUMBER and count.is_integer()):
        raise ValueError(f"{where}, line {number}: need the number of detections, got {text.strip()[:80]!r}")
    return int(count)


def quantize(rows: np.ndarray) -> np.ndarray:
    """Rounds rows of a box and a score (n, 5) as the files do, so that a metric and its files agree exactly."""
    rows = np.asarray(rows, dtype=np.float64).reshape(-1, 5)
    boxes, scores = np.round(rows[:, :4], _BOX_DECIMALS), np.round(rows[:, 4:], _SCORE_DECIMALS)
    return np.concatenate([boxes, scores], axis=1)
