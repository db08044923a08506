"""Whether the data sets of a run are there, said before a process is started or a model built for them."""

import difflib
import math
import os
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data.catalog import load_records
from gs_d2.data.missing_files import check_folder, check_images, missing_images, say_missing, where_it_belongs
from gs_d2.data.records import faces_of


def check_data_sets(train_names=None, test_names=(), max_missing=0.01):
    """Refuses data sets that cannot be trained or tested on.

    Lists are read to their end and dicts checked (:func:`gs_d2.data.catalog.load_records`). For testing every image
    must be there, for training most of them; no image is opened.

    Args:
        train_names (sequence of str): DATASETS.TRAIN; None where nothing is trained.
        test_names (sequence of str): DATASETS.TEST; may be empty where something is trained.
        max_missing (float): DATASETS.GS.MAX_MISSING, the share of a training set's images that may be missing.

    Raises:
        ValueError: in one line the key, the data set, the file or folder that is missing or cannot be read and what to
            do; or no data set of that name is registered, has an image, or (for training) a box.
    """
    if not (test_names if train_names is None else train_names):
        key, example = ("TEST", "wider_face_val") if train_names is None else ("TRAIN", "wider_face_train")
        raise ValueError(f"DATASETS.{key} is empty: name a data set, such as {example}")
    for key, names, check in (
        ("DATASETS.TRAIN", train_names or (), partial(_check_training, max_missing=max_missing)),
        ("DATASETS.TEST", test_names, check_test_images),
    ):
        for name in names:
            if name not in DatasetCatalog.list():
                raise ValueError(f"{key}: {_not_registered(name)}")
            try:
                _check_list(name)
                check(name, load_records(name, for_training=check is not check_test_images))
            except (OSError, ValueError) as error:
                said = " ".join(str(error).split()).removeprefix(f"{name}: ").removeprefix(f"{name}, ")
                raise ValueError(f"{key} {name}: {said}") from error


def check_test_images(name: str, dataset_dicts: list[dict]):
    """Raises FileNotFoundError, saying where they belong, unless all images of a registered data set are there."""
    check_images(dataset_dicts, *_folder_and_hint(name))


def _folder_and_hint(name) -> tuple[str | None, str]:
    metadata = MetadataCatalog.get(name)
    image_root = metadata.get("image_root")
    if image_root is None:
        return None, "Correct file_name in its dicts"
    title = "WIDER FACE" if metadata.get("evaluator_type") == "wider_face" else name
    return image_root, where_it_belongs(title, f"files of {image_root}")


def _check_list(name):
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file is not None and not os.path.isfile(json_file):
        hint = where_it_belongs(name, f"the list {json_file}")
        raise FileNotFoundError(f"There is no list {json_file}. {hint}")


def _check_training(name, dataset_dicts, max_missing):
    if not any(len(faces_of(record).boxes) for record in dataset_dicts):
        raise ValueError("it has no annotated faces to train on")
    image_root, hint = _folder_and_hint(name)
    if image_root is not None:
        check_folder(image_root, hint)
    check_missing(dataset_dicts, max_missing, hint)


def check_missing(dataset_dicts: list[dict], max_missing: float, hint: str = "") -> list[int]:
    """The indices of a training set's images that are missing.

    Raises:
        FileNotFoundError: they are a larger share of it, or all.
    """
    missing = missing_images(dataset_dicts)
    share = len(missing) / len(dataset_dicts)
    if share > max_missing or share == 1:
        told = "" if share == 1 else f". DATASETS.GS.MAX_MISSING {math.ceil(share * 100) / 100:g} trains without them"
        raise FileNotFoundError(f"{say_missing(dataset_dicts, missing)}. {hint}{told}")
    return missing


def _not_registered(name):
    similar = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else "docs/data.md has those there are"
    return f"no data set is registered as {name!r}; {hint} (your own images: docs/data.md)"
