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


def check_images(dataset_dicts: list[dict], image_root, hint: str) -> None:
    """Raises FileNotFoundError, with numbers, an example and the hint, unless every `file_name` is there, and the
    folder of them (None where there is no one folder)."""
    if image_root is not None:
        check_folder(image_root, hint)
    nameless = [d for d in dataset_dicts if d.get("file_name") is None]
    if nameless:
        raise ValueError(f"{len(nameless)} of {len(dataset_dicts)} dicts have no file_name")
    missing = [d["file_name"] for d in dataset_dicts if not os.path.isfile(d["file_name"])]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(dataset_dicts)} images are missing, first {missing[0]}. {hint}"
        )
