"""Folders and zips, read without trusting them, and rows of numbers."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

# What a zip may hold. Real sets have about 3,300 entries and, with 1.9 million detections, about 100 MB.
_MAX_ENTRIES = 200_000
_MAX_FILE_BYTES = 64 * 2**20
_MAX_TOTAL_BYTES = 2**30
_MAX_COUNT = 10**9  # of the rows of one image


class FileTree:
    """A read-only view of the files of a folder, of a zip, or of one file. Zips are read in memory, never
    unpacked.

    Args:
        path: a folder, a `.zip` file, or any other file (then the tree holds only it).

    Attributes:
        names (list[str]): relative paths with forward slashes, sorted.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: for a zip that is damaged, encrypted, larger than any real prediction set, or that holds
            an absolute path or one that leaves the archive.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._zip = None
        self._bytes_read = 0
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file or folder")
        if self.path.is_dir():
            self.names = sorted(
                Path(folder, name).relative_to(self.path).as_posix()
                for folder, _, files in os.walk(self.path)
                for name in files
            )
        elif zipfile.is_zipfile(self.path):
            self._zip = zipfile.ZipFile(self.path)
            self.names = sorted(self._checked_members())
        elif self.path.suffix.lower() == ".zip":
            raise ValueError(f"{self.path}: not a readable zip file; make it again or give the folder instead")
        else:
            self.names = [self.path.name]

    def _checked_members(self) -> Iterable[str]:
        infos = self._zip.infolist()
        if len(infos) > _MAX_ENTRIES:
            raise ValueError(f"{self.path}: {len(infos)} entries, more than {_MAX_ENTRIES}: not a prediction set")
        self._members, total = {}, 0
        for info in infos:
            name = info.filename.replace("\\", "/")
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")):
                raise ValueError(f"{self.path}: unsafe path {info.filename!r} in the zip; make the zip again")
            if info.is_dir() or "__MACOSX" in parts:
                continue
            if info.flag_bits & 1:
                raise ValueError(f"{self.path}: {name} is encrypted; make the zip again without a password")
            if name in self._members:
                raise ValueError(f"{self.path}: {name} is in the zip twice; make the zip again")
            total += info.file_size
            if info.file_size > _MAX_FILE_BYTES or total > _MAX_TOTAL_BYTES:
                raise ValueError(
                    f"{self.path}: unpacks to more than {_MAX_FILE_BYTES >> 20} MiB a file or "
                    f"{_MAX_TOTAL_BYTES >> 20} MiB in all (at {name}); if you trust it, unpack it yourself"
                )
            self._members[name] = info
        return self._members

    @property
    def is_file(self) -> bool:
        """Whether the tree is one file that is not a zip."""
        return self._zip is None and not self.path.is_dir()

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
        """The content of one of `names`. Raises ValueError for a damaged or an over-large member of a zip."""
        if self._zip is None:
            return Path(self.where(name)).read_bytes()
        try:
            with self._zip.open(self._members[name]) as member:
                content = member.read(_MAX_FILE_BYTES + 1)  # a header may lie about the size
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{self.where(name)}: cannot be read ({error}); make the zip again") from error
        self._bytes_read += len(content)
        if len(content) > _MAX_FILE_BYTES or self._bytes_read > _MAX_TOTAL_BYTES:
            raise ValueError(f"{self.where(name)}: larger than its header says; make the zip again")
        return content

    def read_text(self, name: str) -> str:
        """`read_bytes` as text; bytes that are not UTF-8 are replaced, as only numbers and names matter."""
        return self.read_bytes(name).decode("utf-8-sig", errors="replace")


def parse_rows(lines: list[str], first_line: int, num_columns: int, where: str) -> np.ndarray:
    """Rows of numbers, checked.

    Args:
        lines: the text of the rows; blank ones are skipped.
        first_line: the number of `lines[0]` in its file, for messages.
        num_columns: how many finite numbers each row must have.
        where: the file, for messages.

    Returns:
        ndarray[n, num_columns]: float64.

    Raises:
        ValueError: naming the file and the line of the first row that is anything else.
    """
    rows = [line.split() for line in lines]
    kept = [row for row in rows if row]
    if not kept:
        return np.zeros((0, num_columns))
    if not any("_" in line for line in lines):  # Python reads 1_000 as a number, no other tool does
        try:
            values = np.array(kept, dtype=np.float64)
            if values.shape == (len(kept), num_columns) and np.isfinite(values).all():
                return values
        except ValueError:
            pass
    for number, row in enumerate(rows, first_line):
        if not row:
            continue
        text = " ".join(row)[:80]
        if len(row) != num_columns:
            raise ValueError(f"{where}, line {number}: need {num_columns} numbers, got {len(row)}: {text!r}")
        try:
            finite = np.isfinite([float(token.replace("_", "?")) for token in row]).all()
        except ValueError:
            raise ValueError(f"{where}, line {number}: not a number: {text!r}") from None
        if not finite:
            raise ValueError(f"{where}, line {number}: NaN or infinity: {text!r}; mend the detector's output")
    raise AssertionError("unreachable: the whole array was refused but no row was")


def parse_count(text: str, where: str, number: int) -> int:
    """The count of rows that stands on line `number`; ValueError if it is not a whole number >= 0."""
    try:
        count = float(text.replace("_", "?"))
    except ValueError:
        count = -1.0
    if not (0 <= count <= _MAX_COUNT and count.is_integer()):
        raise ValueError(f"{where}, line {number}: need the number of detections, got {text.strip()[:80]!r}")
    return int(count)
