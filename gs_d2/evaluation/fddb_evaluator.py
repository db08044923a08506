"""FDDB as a Detectron2 `DatasetEvaluator`, for train_net.py."""

import logging
from collections import OrderedDict

from gs_d2 import compat  # noqa: F401  isort: skip

import numpy as np

from gs_d2.data.catalog import load_records
from gs_d2.evaluation.detection_evaluator import DetectionEvaluator, as_xywh, by_score
from gs_d2.evaluation.fddb import evaluate_fddb
from gs_d2.formats.fddb import write_detections
from gs_d2.formats.files import quantize

_logger = logging.getLogger(__name__)


class FDDBEvaluator(DetectionEvaluator):
    """True positive rates on FDDB by the official protocol.

    `evaluate` gives {"fddb": {"disc_tpr@<n>" and "cont_tpr@<n>"}}, n false positives: 100, 200, 500, 1000 and 2000.
    Regions are clipped to the image where the inputs have its `height` and `width`, as those of `FaceDatasetMapper`;
    else its size is estimated.

    Args:
        dataset_name: a registered data set whose dicts have `image_id` and `gt_ellipses` (n, 5).
        output_dir: where detections.txt, results.json, roc_curves.npz and roc_curve.png go. None: nothing is
            written.
        distributed: whether each process sees a part of the images; False evaluates this process alone.
        setting: name -> value of what the metrics depend on, shown beside the table.
        fit_ellipses: evaluate ellipses fitted to the detected rectangles (`ellipses_from_rectangles`), which
            raises the continuous rates. detections.txt has the rectangles in any case.

    Raises:
        FileNotFoundError, ValueError: when it is built: the data set cannot be evaluated
            (:func:`gs_d2.data.catalog.load_records`), a dict has no `gt_ellipses`, or an `image_id` no line of its own.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, *, fit_ellipses: bool = False, **kwargs):
        super().__init__(dataset_name, output_dir, **kwargs)
        self._fit_ellipses = fit_ellipses
        self._annotations = {}
        for record in load_records(dataset_name, for_training=False):
            image_id, ellipses = record["image_id"], record.get("gt_ellipses")
            if not str(image_id).isprintable():
                raise ValueError(f"{dataset_name}: image_id {image_id!r} must be one printable line")
            self._annotations[image_id] = _ellipses(ellipses, f"{dataset_name}, {image_id}")

    def _keep(self, image, rows, output):
        size = (int(image["width"]), int(image["height"])) if "width" in image and "height" in image else None
        return by_score(quantize(as_xywh(rows))), size

    def _evaluate(self, kept):
        annotations = self._annotations
        self._warn_of_others(annotations, kept)
        kept = self._in_order(annotations, kept)
        detections = {image_id: rows for image_id, (rows, _) in kept.items()}
        sizes = {image_id: size for image_id, (_, size) in kept.items() if size}
        result = evaluate_fddb(annotations, detections, sizes, fit_ellipses=self._fit_ellipses)
        self._present(
            result,
            f"FDDB true positive rates of {self._dataset_name}",
            lambda folder: write_detections(detections, folder / "detections.txt"),
        )
        if self._output_dir is not None:
            _logger.info(f"detections.txt, results.json, roc_curves.npz and roc_curve.png are in {self._output_dir}")
        return OrderedDict({"fddb": result.metrics()})


def _ellipses(value, where: str) -> np.ndarray:
    try:
        ellipses = np.asarray([] if value is None else value, dtype=np.float64)
    except (ValueError, TypeError):
        ellipses = None
    if value is None or ellipses is None or (ellipses.size and (ellipses.ndim != 2 or ellipses.shape[1] != 5)):
        raise ValueError(f"{where}: gt_ellipses must be an array [n, 5], got {str(value)[:60]!r}")
    return ellipses.reshape(-1, 5)
