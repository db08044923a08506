#!/usr/bin/env python
"""Brings WIDER FACE into the layout that gs_d2 reads, from the official zips or folders, and checks that it is whole.

    tools/prepare_wider_face.py ~/Downloads                      # zips are unpacked, folders linked
    tools/prepare_wider_face.py WIDER_train.zip eval_tools.zip --output /data
    tools/prepare_wider_face.py --check-only

The result is <output>/widerface; set DETECTRON2_DATASETS to <output>. What is there already is left alone, so the
command can be repeated; but a link is moved to a source that has more of the files. A layout made by hand serves as
well: --check-only tells whether it is right. Exit code 2 where something is missing or wrong.
"""

import collections
import os
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from gs_d2.command_line import bad_input_ends, folder_for, parser_of
from gs_d2.data import load_wider_face
from gs_d2.data.wider_face_layout import LISTS, MATS, PARTS, find_parts, num_files, plan
from gs_d2.formats.files import ZipLimits, open_zip
from gs_d2.formats.folders import files_below, undoubled
from gs_d2.formats.images import as_rgb

PAGE = "http://shuoyang1213.me/WIDERFACE/"
SPLITS = {"train": (12880, 159420), "val": (3226, 39708), "test": (16097, 0)}  # images and boxes of the official lists

# What a zip may hold. The largest real one has 16,097 images, 1.9 GB together.
LIMITS = ZipLimits(entries=100_000, file_bytes=64 * 2**20, total_bytes=8 * 2**30)


@bad_input_ends()
def main(argv: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="official zips, or folders of them")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("DETECTRON2_DATASETS", "datasets")),
        help="folder that widerface/ is in (default: $DETECTRON2_DATASETS, else ./datasets)",
    )
    parser.add_argument(
        "--splits", nargs="+", choices=list(SPLITS), default=["train", "val"], help="what must be whole"
    )
    parser.add_argument("--copy", action="store_true", help="copy folders instead of linking them")
    parser.add_argument("--read-images", action="store_true", help="also read each image to its end: takes minutes")
    parser.add_argument("--check-only", action="store_true", help="change nothing, only say what is there")
    args = parser.parse_args(argv)
    base = args.output / "widerface"
    if not args.check_only:
        for part, source in find_parts([*args.sources, *([base] if base.is_dir() else [])]):
            place(part, source, base, args.copy)
    if problems := check(base, args.splits, args.read_images):
        print(f"\nThe official files are at {PAGE}. Download what is missing, and give this command the folder.")
        raise ValueError(f"{base} is not whole: {'; '.join(problems)}")
    print(f"{base} is whole. Use it with: export DETECTRON2_DATASETS={args.output.resolve()}")


def make_room(target: Path, part: str, num_new: int) -> bool:
    """Whether a part can be put there: nothing is, or an empty folder or a link to fewer of its files, which go."""
    if target.is_symlink():
        if num_files(part, target) >= num_new:
            return False
        print(f"{target} was linked to {target.readlink()}, which has fewer of its files")
        target.unlink()
    elif target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    return not target.exists()


def place(part: str, source: Path, base: Path, copy: bool):
    """Brings one zip or folder into the layout, unless it is there."""
    if part == "zip":
        unpack(source, base)
        return
    target = base / part
    if source.resolve() == target.resolve() or (source.is_relative_to(target) and not target.is_symlink()):
        return  # it is there, perhaps in a folder of its own name once more
    if not make_room(target, part, num_files(part, source)):
        print(f"{target} is there already; {source} is left alone")
        return
    folder_for("--output", base)
    if copy:
        partial = target.with_name(target.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        for path in tqdm(files_below(source), desc=f"copying {part}", unit="file"):
            copied = partial / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
        partial.rename(target)
    else:
        target.symlink_to(source.resolve(), target_is_directory=True)
        print(f"linked {target} to {source.resolve()}")


def unpack(archive: Path, base: Path):
    """Unpacks what belongs to the layout; each file appears whole or not at all, and files that are there stay.

    Raises:
        ValueError: the zip is damaged, encrypted, far larger than any official one, has a path that leaves it, or has
            nothing that belongs to WIDER FACE.
    """
    try:
        zip_file, files = open_zip(archive, LIMITS)
        with zip_file:
            members = plan(archive, files)
            count = collections.Counter(target.parts[0] for target, _ in members)
            linked = {part for part in count if (base / part).is_symlink()}
            linked = {part for part in linked if not make_room(base / part, part, count[part])}
            todo = []
            for target, info in members:
                path = base / target
                if target.parts[0] in linked or (path.is_file() and path.stat().st_size == info.file_size):
                    continue
                todo.append((path, info))
            need = sum(info.file_size for _, info in todo)
            folder_for("--output", base)
            if need > shutil.disk_usage(base).free:
                raise ValueError(f"{archive}: needs {need / 1e9:.1f} GB in {base}, more than is free there")
            with tqdm(total=need, desc=archive.name, unit="B", unit_scale=True, disable=not todo) as bar:
                for path, info in todo:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    partial = path.with_name(path.name + ".part")
                    with zip_file.open(info) as source, open(partial, "wb") as out:
                        shutil.copyfileobj(source, out)
                    partial.replace(path)
                    bar.update(info.file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{archive}: damaged ({error}); download it again") from error
    print(f"{archive.name}: {len(todo)} files unpacked, {len(members) - len(todo)} were there")


def check(base: Path, splits: list[str], read_images: bool = False) -> list[str]:
    """Prints what is there and what is not, and returns what is wrong with the parts that must be whole."""
    problems = []
    for split, (num_images, num_boxes) in SPLITS.items():
        found = check_split(base, split, num_images, num_boxes, read_images and split in splits)
        print(f"wider_face_{split}: " + ("; ".join(found) or f"{num_images:,} images, {num_boxes:,} boxes: whole"))
        problems += [f"{split}: {problem}" for problem in found] if split in splits else []
    absent = [name for name in MATS if not undoubled(base / "ground_truth" / name).is_file()]
    print(f"ground_truth: {'no ' + ', '.join(absent) + _from('ground_truth') if absent else 'whole'}")
    if absent and "val" in splits:
        problems.append(f"ground_truth: no {', '.join(absent)}{_from('ground_truth')}")
    return problems


def check_split(base: Path, split: str, num_images: int, num_boxes: int, read_images: bool = False) -> list[str]:
    list_file = undoubled(base / "wider_face_split" / LISTS[split])
    if not list_file.is_file():
        return [f"no {list_file.name}{_from('wider_face_split')}"]
    records = load_wider_face(list_file, base / f"WIDER_{split}" / "images")
    problems = []
    for what, count, official in (
        ("images", len(records), num_images),
        ("boxes", sum(len(record["gt_boxes"]) for record in records), num_boxes),
    ):
        if count != official:
            problems.append(f"{list_file.name} has {count:,} {what}, the official one {official:,}")
    paths = [Path(record["file_name"]) for record in records]
    bar = tqdm(paths, desc=f"checking WIDER_{split}", unit="image", leave=False, delay=1)
    missing = [path for path in bar if not path.is_file() or path.stat().st_size == 0]
    if missing:
        first = missing[0].relative_to(base)
        problems.append(f"{len(missing):,} of {len(paths):,} images missing, first {first}{_from(f'WIDER_{split}')}")
    if read_images:
        absent = set(missing)
        problems += damaged_images([path for path in paths if path not in absent], base)
    return problems


def damaged_images(paths: list[Path], base: Path) -> list[str]:
    """Reads all images, prints what is wrong with each bad one, and returns one line that counts them."""
    damaged = []
    for path in tqdm(paths, desc="reading images", unit="image", leave=False, delay=1):
        try:
            as_rgb(path)
        except (FileNotFoundError, ValueError) as error:
            tqdm.write(str(error), file=sys.stderr)
            damaged.append(path)
    return [f"{len(damaged):,} images cannot be read, first {damaged[0].relative_to(base)}"] if damaged else []


def _from(part: str) -> str:
    return f" (from {PARTS[part][1]})"


if __name__ == "__main__":
    main()
