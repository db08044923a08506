"""Folders as people have them: with links, files of the system's own, and doubled by whatever unpacked an archive."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

_SYSTEM_FILES = {".ds_store", "thumbs.db", "desktop.ini", "icon\r", "__macosx"}
_MAX_FOLDERS = 200_000  # WIDER FACE has 200; links can make any number of a few


def is_system_file(path: str | os.PathLike) -> bool:
    """Whether a file or folder, or one that it is in, is none of the user's: macOS's `._*`, `.DS_Store` and `__MACOSX`,
    Windows' `Thumbs.db` and `desktop.ini`."""
    return any(name.startswith("._") or name.lower() in _SYSTEM_FILES for name in PurePath(path).parts)


def walk(root: str | os.PathLike, max_depth: int | None = None) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, top down and sorted, without the system's own files; links to folders are followed.

    A folder that is linked from within itself is not entered again.

    Args:
        max_depth: folders below the root that are entered; None is all.

    Raises:
        ValueError: more than 200,000 folders, as links that lead to each other can make.
    """
    root, count = Path(root), 0
    todo = [(root, 0, frozenset())]  # folder, depth, the identities of the folders that it is in
    while todo:
        folder, depth, above = todo.pop()
        identity = _identity(folder)
        if identity is None or identity in above:
            continue
        count += 1
        if count > _MAX_FOLDERS:
            raise ValueError(f"{root}: more than {_MAX_FOLDERS:,} folders; do links in it lead to each other?")
        names, files = _content(folder)
        yield folder, names, files
        if max_depth is None or depth < max_depth:
            above = above | {identity}
            todo += [(folder / name, depth + 1, above) for name in reversed(names)]


def files_below(root: str | os.PathLike) -> list[Path]:
    """All files that :func:`walk` meets."""
    return [folder / name for folder, _, names in walk(root) for name in names]


def undoubled(path: str | os.PathLike) -> Path:
    """A folder or file, where unpacking has put it: into a folder of the same name once more.

    Windows' "Extract all" and copies on the web make `WIDER_val/WIDER_val/images` of `WIDER_val/images`.

    Returns:
        The folder itself, the innermost of folders of its name that each hold nothing else; or what is in the folder
        of the same name beside it; or the path as it is.
    """
    path = Path(path)
    parent = path.parent
    while parent.name and not path.exists() and (parent / parent.name).is_dir():
        parent = parent / parent.name
        if (parent / path.name).exists():
            path = parent / path.name
    while path.name and path.is_dir() and _content(path) == ([path.name], []):
        path = path / path.name
    return path


def _content(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the other files in a folder; none of one that may not be read."""
    names, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_system_file(entry.name):
                    (names if _is_dir(entry) else files).append(entry.name)
    except OSError:
        pass
    return sorted(names), sorted(files)


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _identity(folder: Path):
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(folder)
