"""What train_net.py loads: training continues without bad images, and testing does not begin with any missing."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.data import DatasetFromList, MapDataset, build_detection_test_loader

from gs_d2.data.catalog import load_records
from gs_d2.data.check_data_sets import check_missing, check_test_images
from gs_d2.data.coco import CocoDatasetMapper, dataset_mapper_of
from gs_d2.data.dataset_mapper import BadDataError, off_the_image
from gs_d2.data.missing_files import say_missing
from gs_d2.data.records import faces_of
from gs_d2.data.workers import InWorkers
from gs_d2.formats.images import TransientReadError

_MAX_TRIES = 100  # of images in place of a bad one
_logger = logging.getLogger(__name__)


def build_training_views(cfg) -> "TrainingViews":
    """The views of cfg.DATASETS.TRAIN by the project's augmentation; :class:`gs_d2.engine.TrainLoader` batches them.

    Each image has the mapper of its own data set. DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out images without an
    object, as in Detectron2, but not those of lists of faces (:func:`gs_d2.data.load_wider_face`): they are negatives.

    Images that are missing are looked for once, here, and never asked for.

    Raises:
        ValueError: a data set cannot be trained on; names it.
        FileNotFoundError: more than the share DATASETS.GS.MAX_MISSING of the images are missing, or all.
    """
    records, mappers, mapper_of_type = [], [], {}
    for name in cfg.DATASETS.TRAIN:
        of_data_set = load_records(name, for_training=True)
        mapper_type = dataset_mapper_of(name)
        as_in_detectron2 = mapper_type is CocoDatasetMapper or "gt_boxes" not in of_data_set[0]
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and as_in_detectron2:
            of_data_set = [record for record in of_data_set if not faces_of(record).ignore.all()]
        if not of_data_set:
            raise ValueError(f"{name}: no image has an object to train on")
        if mapper_type not in mapper_of_type:
            mapper_of_type[mapper_type] = mapper_type(cfg, is_train=True)
        records += of_data_set
        mappers += [mapper_of_type[mapper_type]] * len(of_data_set)
    missing = check_missing(records, cfg.DATASETS.GS.MAX_MISSING)
    if missing:
        _logger.warning(f"Left out of training: {say_missing(records, missing)}")
    return TrainingViews(records, mappers, missing)


def build_test_loader(cfg, dataset_name: str):
    """Detectron2's test loader: each image of the data set once.

    Raises:
        ValueError: dicts of the data set cannot be used; names it.
        FileNotFoundError: images of the data set are missing, now and not hours later. (One that cannot be read raises
            BadDataError with its name when its turn comes: an evaluation without it would be another benchmark's.)
    """
    records = load_records(dataset_name, for_training=False)
    check_test_images(dataset_name, records)
    mapper = dataset_mapper_of(dataset_name)(cfg, is_train=False)
    images = InWorkers(MapDataset(DatasetFromList(records, copy=False), mapper))
    return build_detection_test_loader(images, mapper=None, num_workers=cfg.DATALOADER.NUM_WORKERS)


class TrainingViews(torch.utils.data.Dataset):
    """One augmented view for each dict of a data set, or of another one where its image cannot be used.

    A bad image is reported once, with its name, and never opened again; so are boxes that cannot be of their image
    (:func:`gs_d2.data.dataset_mapper.off_the_image`). Which image takes its place is chosen with numpy's global
    generator and does not depend on what other workers have found. The loader workers of a process share what they know
    of the images.

    Args:
        dataset_dicts: dataset dicts.
        mappers: makes a view of a dict, or one for each of them that does; BadDataError and FileNotFoundError mean that
            another image is to take its place, TransientReadError that it is for this time.
        missing: indices of images that are known not to be there.

    Raises:
        RuntimeError: by an item for which 101 images (or all, where there are fewer) proved bad.
    """

    def __init__(self, dataset_dicts: list[dict], mappers: Callable | Sequence[Callable], missing: Sequence[int] = ()):
        self._dataset_dicts = DatasetFromList(dataset_dicts, copy=False)
        self._mappers = [mappers] * len(dataset_dicts) if callable(mappers) else list(mappers)
        self._bad = torch.zeros(len(dataset_dicts), dtype=torch.bool).share_memory_()  # with all workers
        self._bad[list(missing)] = True
        self._boxes_reported = torch.zeros_like(self._bad).share_memory_()
        self._read_errors = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self):
        return len(self._dataset_dicts)

    @property
    def left_out(self) -> list[int]:
        """Indices of the images that this process knows not to be usable."""
        return torch.nonzero(self._bad)[:, 0].tolist()

    @property
    def num_read_errors(self) -> int:
        """How often the drive did not answer this process, so that another image took the place of one."""
        return int(self._read_errors)

    def __getitem__(self, index: int) -> dict:
        view = self._view(index)
        if view is not None:
            return view
        tried = 1
        for other in np.random.permutation(len(self))[:_MAX_TRIES]:
            view = self._view(int(other))
            if view is not None:
                return view
            tried += int(other) != index
        raise RuntimeError(
            f"{tried} images tried in a row cannot be used, such as {self._dataset_dicts[index]['file_name']}; "
            f"{int(self._bad.sum())} of the {len(self)} images of the data set are known to be bad. The warnings above "
            "say why; check the data set and DETECTRON2_DATASETS"
        )

    def _view(self, index) -> dict | None:
        if self._bad[index]:
            return None
        dataset_dict = self._dataset_dicts[index]
        try:
            view = self._mappers[index](dataset_dict)
        except (BadDataError, FileNotFoundError) as error:
            self._bad[index] = True
            _logger.warning(f"Left out of training, for another image: {error}")
            return None
        except TransientReadError as error:
            self._read_errors += 1
            _logger.warning(f"Another image in its place, this time: {error}")
            return None
        if not self._boxes_reported[index]:
            self._boxes_reported[index] = True
            self._report_boxes(dataset_dict, view["height"], view["width"])
        return view

    def _report_boxes(self, dataset_dict, height, width):
        boxes = faces_of(dataset_dict).boxes
        off = off_the_image(boxes, height, width)
        if off.any():
            first = ", ".join(f"{value:g}" for value in boxes[off.argmax()])
            _logger.warning(
                f"Left out of training: {int(off.sum())} of {len(boxes)} boxes of {dataset_dict['file_name']}, which "
                f"is {width} x {height} pixels; the first is from x1, y1, x2, y2 = {first}"
            )
