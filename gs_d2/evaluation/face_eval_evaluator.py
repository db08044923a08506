"""AFW and PASCAL faces as a Detectron2 `DatasetEvaluator`, for train_net.py."""

import logging
from collections import OrderedDict

import numpy as np

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.data import MetadataCatalog

from gs_d2.data.catalog import load_records
from gs_d2.data.records import faces_of
from gs_d2.evaluation.detection_evaluator import DetectionEvaluator, by_score
from gs_d2.evaluation.face_eval import evaluate_face_eval
from gs_d2.formats.face_eval import FaceEvalAnnotations, write_detections
from gs_d2.formats.files import quantize

_logger = logging.getLogger(__name__)


class FaceEvalEvaluator(DetectionEvaluator):
    """Average precision on AFW or PASCAL faces by the face-eval protocol.

    `evaluate` gives {"afw": {"ap"}} or {"pascal_face": {"ap"}}.

    Args:
        dataset_name: a registered data set whose dicts have `image_id` and boxes as
            :func:`gs_d2.data.records.faces_of` reads them; its metadata has `benchmark` (`afw` or `pascal_face`), else
            the metric has the data set's name.
        output_dir: where detections.txt, results.json, pr_curves.npz and pr_curve.png go. None: nothing is
            written.
        distributed: whether each process sees a part of the images; False evaluates this process alone.
        setting: name -> value of what the metrics depend on, shown beside the table.
        y_shift: lowers the top of each box by this fraction of its height before it is evaluated
            (`evaluate_face_eval`). detections.txt has the boxes as they were detected.

    Raises:
        FileNotFoundError, ValueError: when it is built: the data set cannot be evaluated
            (:func:`gs_d2.data.catalog.load_records`), or an `image_id` has blanks, which divide the file's columns.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, *, y_shift: float = 0.0, **kwargs):
        super().__init__(dataset_name, output_dir, **kwargs)
        self._y_shift = y_shift
        faces = {}
        for record in load_records(dataset_name, for_training=False):
            image_id = record["image_id"]
            if len(str(image_id).split()) != 1:
                raise ValueError(f"{dataset_name}: image_id {image_id!r} has blanks: name the image without")
            faces[image_id] = faces_of(record)
        self._annotations = FaceEvalAnnotations(
            {image_id: of_image.boxes.astype(np.float64) for image_id, of_image in faces.items()},
            {image_id: of_image.ignore for image_id, of_image in faces.items()},
            MetadataCatalog.get(dataset_name).get("benchmark", dataset_name),
        )

    def _keep(self, image, rows, output):
        return by_score(quantize(rows))

    def _evaluate(self, kept):
        annotations, benchmark = self._annotations, self._annotations.benchmark
        self._warn_of_others(annotations.boxes, kept)
        detections = self._in_order(annotations.boxes, kept)
        result = evaluate_face_eval(annotations, detections, y_shift=self._y_shift)
        self._present(
            result,
            f"{result.title} AP of {self._dataset_name}",
            lambda folder: write_detections(detections, folder / "detections.txt"),
        )
        if self._output_dir is not None:
            _logger.info(f"detections.txt, results.json, pr_curves.npz and pr_curve.png are in {self._output_dir}")
        return OrderedDict({benchmark: result.metrics()})
