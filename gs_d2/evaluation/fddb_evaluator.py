"""FDDB as a Detectron2 `DatasetEvaluator`, for train_net.py."""

import logging
from collections import OrderedDict

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.data import DatasetCatalog

from .curves import write_fddb_curves
from .detection_evaluator import DetectionEvaluator, as_xywh, by_score
from .fddb import FALSE_POSITIVES, ellipses_from_rectangles, evaluate_fddb, write_detections
from .prediction_files import quantize_detections
from .report import fddb_setting, fddb_summary, format_fddb_table, format_setting, score_note_of

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
        setting: name -> value of what the figures depend on, shown beside the table.
        fit_ellipses: evaluate ellipses fitted to the detected rectangles (`ellipses_from_rectangles`), which
            raises the continuous rates. detections.txt has the rectangles in any case.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, *, fit_ellipses: bool = False, **kwargs):
        super().__init__(dataset_name, output_dir, **kwargs)
        self._fit_ellipses = fit_ellipses

    def _record(self, image, rows, output):
        size = (int(image["width"]), int(image["height"])) if "width" in image and "height" in image else None
        return by_score(quantize_detections(as_xywh(rows))), size

    def _evaluate(self, records):
        annotations = {d["image_id"]: d["gt_ellipses"] for d in DatasetCatalog.get(self._dataset_name)}
        self._not_processed(annotations, records)
        records = self._in_order(annotations, records)
        rectangles = {image_id: rows for image_id, (rows, _) in records.items()}
        sizes = {image_id: size for image_id, (_, size) in records.items() if size and image_id in annotations}
        detections = rectangles
        if self._fit_ellipses:
            detections = {image_id: ellipses_from_rectangles(rows) for image_id, rows in rectangles.items()}
        result = evaluate_fddb(annotations, detections, sizes)

        setting = self._setting | fddb_setting(self._fit_ellipses, len(sizes), len(annotations))
        lines = [format_fddb_table(result), format_setting(setting), score_note_of(detections)]
        lines.append(f"{result.num_faces} faces")
        _logger.info(f"FDDB true positive rates of {self._dataset_name}\n" + "\n".join(lines))
        if self._output_dir is not None:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            write_detections(rectangles, self._output_dir / "detections.txt")
            self._write_summary(fddb_summary(result, len(annotations)), setting)
            write_fddb_curves(result, self._output_dir)
            _logger.info(f"detections.txt, results.json, roc_curves.npz and roc_curve.png are in {self._output_dir}")
        figures = {f"disc_tpr@{count}": 100 * result.rate_at(count) for count in FALSE_POSITIVES}
        figures |= {f"cont_tpr@{count}": 100 * result.rate_at(count, continuous=True) for count in FALSE_POSITIVES}
        return OrderedDict({"fddb": figures})
