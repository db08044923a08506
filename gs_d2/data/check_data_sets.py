"""Whether the data sets of a run are there, said before a process is started or a model built for them."""

import difflib
import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data.catalog import load_records
from gs_d2.data.missing_files import check_folder, check_images, where_it_belongs
from gs_d2.data.records import faces_of


def check_data_sets(train_names=None, test_names=()):
    """Refuses data sets that cannot be trained or tested on.

    Lists are read to their end and dicts checked (:func:`gs_d2.data.catalog.load_records`). For testing every image
    must be there (no image is opened), for training the folder of them.

    Args:
        train_names (sequence of str): DATASETS.TRAIN; None where nothing is trained.
        test_names (sequence of str): DATASETS.TEST; may be empty where something is trained.

    Raises:
        ValueError: in one line the key, the data set, the file or folder that is missing or cannot be read and what to
            do; or no data set of that name is registered, has an image, or (for training) a box.
    """
    if not (test_names if train_names is None else train_names):
        key, example = ("TEST", "wider_face_val") if train_names is None else ("TRAIN", "wider_face_train")
        raise ValueError(f"DATASETS.{key} is empty: name a data set, such as {example}")
    for key, names, check in (
        ("DATASETS.TRAIN", train_names or (), _check_training),
        ("DATASETS.TEST", test_names, check_test_images),
    ):
        for name in names:
            if name not in DatasetCatalog.list():
                raise ValueError(f"{key}: {_not_registered(name)}")
            try:
                _check_list(name)
                check(name, load_records(name, for_training=check is _check_training))
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


def _check_training(name, dataset_dicts):
    if not any(len(faces_of(record).boxes) for record in dataset_dicts):
        raise ValueError("it has no annotated faces to train on")
    image_root, hint = _folder_and_hint(name)
    if image_root is not None:  # an image that is missing is left out, when its turn comes
        check_folder(image_root, hint)


def _not_registered(name):
    similar = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else "docs/data.md has those there are"
    return f"no data set is registered as {name!r}; {hint} (your own images: docs/data.md)"
