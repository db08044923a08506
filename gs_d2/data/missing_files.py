"""The one way of saying that files of a data set are not where they belong."""

import os

from gs_d2.formats.folders import undoubled


def where_it_belongs(data_set: str, layout: str) -> str:
    """A sentence that names DETECTRON2_DATASETS, what it is now, and the layout below it."""
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    tool = "; tools/prepare_wider_face.py puts it there" if data_set == "WIDER FACE" else ""
    return f"{data_set} belongs under $DETECTRON2_DATASETS (now {root!r}) as {layout}{tool}"


def check_folder(image_root, hint: str) -> None:
    """Raises FileNotFoundError, with the hint, unless there is such a folder."""
    if not os.path.isdir(undoubled(image_root)):
        raise FileNotFoundError(f"There is no folder {image_root} with the images. {hint}")


def missing_images(dataset_dicts: list[dict]) -> list[int]:
    """The indices of those whose `file_name` is not there. No image is opened."""
    return [i for i, record in enumerate(dataset_dicts) if not os.path.isfile(record["file_name"])]


def say_missing(dataset_dicts: list[dict], missing: list[int]) -> str:
    """Of :func:`missing_images`: how many, and the first."""
    count, total = len(missing), len(dataset_dicts)
    return f"{count:,} of {total:,} images are missing, first {dataset_dicts[missing[0]]['file_name']}"


def check_images(dataset_dicts: list[dict], image_root, hint: str) -> None:
    """Raises FileNotFoundError, with numbers, an example and the hint, unless every `file_name` is there, and the
    folder of them (None where there is no one folder)."""
    if image_root is not None:
        check_folder(image_root, hint)
    nameless = [d for d in dataset_dicts if d.get("file_name") is None]
    if nameless:
        raise ValueError(f"{len(nameless)} of {len(dataset_dicts)} dicts have no file_name")
    missing = missing_images(dataset_dicts)
    if missing:
        raise FileNotFoundError(f"{say_missing(dataset_dicts, missing)}. {hint}")
