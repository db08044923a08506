"""What the evaluators of all benchmarks share: detections taken image by image, gathered from all processes."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from gs_d2.evaluation.report import Result, present

_logger = logging.getLogger(__name__)


class DetectionEvaluator(DatasetEvaluator):
    """A subclass says what is kept of an image (`_keep`) and evaluates what all processes kept (`_evaluate`).

    Args:
        dataset_name: a registered data set.
        output_dir: where all that is written goes. None: nothing is written.
        distributed: whether each process sees a part of the images; False evaluates this process alone.
        setting: name -> value of what the metrics depend on (test sizes, score threshold, NMS, most
            detections an image), shown beside the table.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        distributed: bool = True,
        setting: dict | None = None,
    ):
        self._dataset_name = dataset_name
        self._output_dir = Path(output_dir) if output_dir else None
        self._distributed = distributed
        self._setting = dict(setting or {})
        self.reset()

    def reset(self):
        self._kept = {}

    def process(self, inputs, outputs):
        """Takes the detections of some images.

        Args:
            inputs: dicts with `image_id`.
            outputs: dicts with `instances`, which have `pred_boxes` and `scores`.

        Raises:
            ValueError: for NaN or infinity in a detection, or an input without `image_id`.
        """
        for image, output in zip(inputs, outputs, strict=True):
            if "image_id" not in image:
                raise ValueError(f"{image.get('file_name', 'an input')} has no image_id, by which it is evaluated")
            rows = rows_of(output["instances"].to("cpu"), image["image_id"])
            self._kept[image["image_id"]] = self._keep(image, rows, output)

    def evaluate(self):
        """Evaluates what all processes have seen.

        Returns:
            OrderedDict: {benchmark: {metric: percent}} on the main process; {} on the others.
        """
        parts = [self._kept]
        if self._distributed:
            comm.synchronize()
            parts = comm.gather(self._kept, dst=0)
            if not comm.is_main_process():
                return {}
        return self._evaluate({image_id: of_image for part in parts for image_id, of_image in part.items()})

    def _keep(self, image: dict, rows: np.ndarray, output: dict):
        """What is kept of an image; `rows` are :func:`rows_of` its `instances`."""
        raise NotImplementedError

    def _evaluate(self, kept: dict) -> OrderedDict:
        """Evaluates image id -> what was kept of it, for the whole data set, on the main process."""
        raise NotImplementedError

    def _warn_of_others(self, image_ids: Iterable[str | int], kept: dict) -> None:
        """Warns of images of the data set that were not processed, and of images that are not in the data set."""
        image_ids = list(image_ids)
        missing = [image_id for image_id in image_ids if image_id not in kept]
        if missing:
            _logger.warning(
                f"{len(missing)} of {len(image_ids)} images of {self._dataset_name} were not "
                f"processed and count as without detections, the first is {missing[0]}"
            )
        unknown = sorted(kept.keys() - set(image_ids), key=str)
        if unknown:
            _logger.warning(f"{len(unknown)} images are not in the ground truth, the first is {unknown[0]}")

    def _in_order(self, image_ids: Iterable[str | int], kept: dict) -> dict:
        """What was kept, in the order of the data set, so that ties are the same for any number of processes."""
        rank = {image_id: i for i, image_id in enumerate(image_ids)}
        return dict(sorted(kept.items(), key=lambda item: (rank.get(item[0], len(rank)), str(item[0]))))

    def _present(self, result: Result, headline: str, write_detections: Callable[[Path], None] | None = None) -> None:
        """Logs the result below a headline, and writes detections and result where there is an output_dir."""

        def show(text):
            _logger.info(f"{headline}\n{text}")

        present(result, self._setting, self._output_dir, show=show, write_detections=write_detections)


def rows_of(instances, image_id: str) -> np.ndarray:
    """The detections of an image, on the CPU, as float64 ndarray[n, 5] `x1 y1 x2 y2 score`.

    Raises:
        ValueError: for NaN or infinity in a detection.
    """
    boxes = instances.pred_boxes.tensor.detach().numpy().astype(np.float64).reshape(-1, 4)
    scores = instances.scores.detach().numpy().astype(np.float64).reshape(-1, 1)
    rows = np.concatenate([boxes, scores], axis=1)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"{image_id}: {(~finite).sum()} detections have NaN or infinity")
    return rows


def by_score(rows: np.ndarray) -> np.ndarray:
    """Rows whose last column is the score, highest first."""
    return rows[np.argsort(-rows[:, -1], kind="stable")]


def as_xywh(rows: np.ndarray) -> np.ndarray:
    """`x1 y1 x2 y2 score` as `x y w h score`."""
    return np.concatenate([rows[:, :2], rows[:, 2:4] - rows[:, :2], rows[:, 4:]], axis=1)
