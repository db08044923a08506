"""The layout of WIDER FACE's files, and where its parts are among what somebody has downloaded and unpacked."""

import zipfile
from pathlib import Path, PurePosixPath

from gs_d2.formats.files import is_zip
from gs_d2.formats.folders import files_below, is_system_file, walk

LISTS = {split: f"wider_face_{split}_bbx_gt.txt" for split in ("train", "val")} | {
    "test": "wider_face_test_filelist.txt"
}
MATS = [f"wider_{subset}_val.mat" for subset in ("face", "easy", "medium", "hard")]

# Folder of the layout -> which of a zip's files belong there, and the zip's name on the official page.
_IMAGES, _LISTS = (".jpg", ".jpeg", ".png"), (".txt", ".mat")
PARTS = {
    "WIDER_train": (_IMAGES, "WIDER_train.zip"),
    "WIDER_val": (_IMAGES, "WIDER_val.zip"),
    "WIDER_test": (_IMAGES, "WIDER_test.zip"),
    "wider_face_split": (_LISTS, "wider_face_split.zip"),
    "ground_truth": (_LISTS, "eval_tools.zip"),
}
_PART_OF = {part.lower(): part for part in PARTS}
_MAX_DEPTH = 4  # folders below a source that are searched


def find_parts(sources: list[Path]) -> list[tuple[str, Path]]:
    """(part of the layout, or "zip", and where it is) for all that the sources hold; zips first.

    Folders are found by their names, in upper or lower case, links and doubled folders included; those that have none
    of a part's files are passed over.

    Raises:
        ValueError: a source is not there, or is a file that is no zip.
    """
    found = []
    for source in sources:
        if not source.exists():
            raise ValueError(f"{source}: no such file or folder")
        if source.is_file():
            if not is_zip(source):
                raise ValueError(f"{source}: not a zip, or damaged; download it again")
            found.append(("zip", source))
            continue
        for folder, names, files in walk(source, _MAX_DEPTH):
            part = _PART_OF.get(folder.name.lower())
            if part and num_files(part, folder):
                found.append((part, folder))
                names.clear()
                continue
            official = tuple(Path(name).stem.lower() for _, name in PARTS.values())
            found += [
                ("zip", folder / name)
                for name in files
                if name.lower().endswith(".zip") and name.lower().startswith(official)
            ]
    return sorted(found, key=lambda item: item[0] != "zip")


def num_files(part: str, folder: Path) -> int:
    """How many files of a part's kind are in a folder, where the layout has them; 0 where none is one of the part's."""
    kind = PARTS[part][0]
    if kind == _LISTS:
        if not any((folder / name).is_file() for name in (*LISTS.values(), *MATS)):
            return 0
    else:
        folder = folder / "images"
    return sum(path.suffix.lower() in kind for path in files_below(folder)) if folder.is_dir() else 0


def plan(archive: Path, files: dict[str, zipfile.ZipInfo]) -> list[tuple[PurePosixPath, zipfile.ZipInfo]]:
    """Where each file of a zip goes, relative to widerface/; what is no part of the data set goes nowhere.

    Raises:
        ValueError: all go nowhere; names the archive.
    """
    members = []
    for name, info in files.items():
        path = PurePosixPath(name)
        found = [(_PART_OF[name.lower()], i) for i, name in enumerate(path.parts[:-1]) if name.lower() in _PART_OF]
        hidden = any(name.startswith(".") for name in path.parts) or is_system_file(path)
        if not found or hidden or path.suffix.lower() not in PARTS[found[0][0]][0]:
            continue
        part = found[0][0]
        inner = max(i for name, i in found if name == part)  # a doubled folder is one
        members.append((PurePosixPath(part, *path.parts[inner + 1 :]), info))
    if not members:
        raise ValueError(f"{archive}: has none of {', '.join(PARTS)} in it; is it one of the official zips?")
    return members
