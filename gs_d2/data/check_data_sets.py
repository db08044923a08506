"""Whether the data sets of a run are there, said before a process is started or a model built for them."""

import difflib
import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from gs_d2.data.missing_files import check_folder, check_images, where_it_belongs


def check_data_sets(train_names=None, test_names=()):
    """Refuses data sets that cannot be trained or tested on.

    Lists are read to their end, but for COCO's, of which reading can take a minute: these are only opened. For testing
    every image must be there (no image is opened), for training the folder of them.

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
                check(name, _dataset_dicts(name))
            except (OSError, ValueError) as error:
                raise ValueError(f"{key} {name}: {' '.join(str(error).split())}") from error


def check_test_images(name: str, dataset_dicts: list[dict] | None):
    """Raises FileNotFoundError, saying where they belong, unless the images of a registered data set are there: those
    of the dataset_dicts, or where these are not known the folder of them."""
    metadata = MetadataCatalog.get(name)
    image_root = metadata.get("image_root")
    if image_root is None:
        return
    title = "WIDER FACE" if metadata.get("evaluator_type") == "wider_face" else name
    hint = where_it_belongs(title, f"files of {image_root}")
    if dataset_dicts is None:
        check_folder(image_root, hint)
    else:
        check_images(dataset_dicts, image_root, hint)


def _dataset_dicts(name) -> list[dict] | None:
    """What the data set holds; None of one with a JSON list, which is then known to be a file that can be opened."""
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file is None:
        dataset_dicts = DatasetCatalog.get(name)
        if not len(dataset_dicts):
            raise ValueError("it has no image")
        return dataset_dicts
    if not os.path.isfile(json_file):
        hint = where_it_belongs(name, f"the list {json_file}")
        raise FileNotFoundError(f"There is no list {json_file}. {hint}")
    with open(json_file, "rb"):
        return None


def _check_training(name, dataset_dicts):
    if dataset_dicts is not None and not any(len(r.get("gt_boxes", r.get("annotations", ()))) for r in dataset_dicts):
        raise ValueError("it has no annotated faces to train on")
    check_test_images(name, None)  # one that is missing is left out, when its turn comes


def _not_registered(name):
    similar = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else "docs/data.md has those there are"
    return f"no data set is registered as {name!r}; {hint} (your own images: docs/data.md)"
