"""COCO's average recall of class-agnostic detections, by the official COCO API."""

import contextlib
import io
import logging
from collections import OrderedDict

import numpy as np

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .detection_evaluator import DetectionEvaluator, as_xywh, by_score
from .report import format_setting

_logger = logging.getLogger(__name__)
_SIZES = {"all": "", "small": "s", "medium": "m", "large": "l"}  # of pycocotools, and in the names of figures


class CocoRecallEvaluator(DetectionEvaluator):
    """AR@100 and AR@1000, by size (the paper's Tables 2 and 4), of a detector that does not tell classes apart.

    pycocotools' COCOeval with useCats 0: all objects are one class, IoU thresholds 0.5:0.05:0.95, the best-scored
    detection takes the object it overlaps most, crowds neither count nor cost. Detectron2's COCOEvaluator has another,
    approximate rule for proposals: each object, best covered first, takes the detection that covers it best, whatever
    its score. Its figures are close but not these.

    `evaluate` gives {"box_proposals": {"AR@100", "ARs@100", "ARm@100", "ARl@100", "AR@1000", ...}} in percent, NaN
    where the data set has no object of a size.

    Args:
        dataset_name: a data set registered in COCO's format: its metadata has `json_file`, and `image_ids` if only
            these images of the file are to be evaluated.
        output_dir: where results.json goes. None: nothing is written.
        distributed, setting: as :class:`DetectionEvaluator`.
        limits: the most detections of an image that count, ascending.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, *, limits=(100, 1000), **kwargs):
        super().__init__(dataset_name, output_dir, **kwargs)
        self._limits = [int(limit) for limit in limits]

    def _record(self, image, rows, output):
        return as_xywh(by_score(rows)[: self._limits[-1]])

    def _evaluate(self, records):
        with contextlib.redirect_stdout(io.StringIO()):
            metadata = MetadataCatalog.get(self._dataset_name)
            ground_truth = COCO(metadata.json_file)
            image_ids = metadata.get("image_ids") or ground_truth.getImgIds()
            self._not_processed(image_ids, records)
            evaluation = COCOeval(ground_truth, _as_coco(ground_truth, self._in_order(image_ids, records)), "bbox")
            evaluation.params.imgIds = image_ids
            evaluation.params.useCats = 0
            evaluation.params.maxDets = self._limits
            evaluation.evaluate()
            evaluation.accumulate()
        recalls = evaluation.eval["recall"][:, 0]  # [IoU threshold, size, limit]; -1 without any object
        sizes = evaluation.params.areaRngLbl
        figures = OrderedDict()
        for i, limit in enumerate(self._limits):
            for size, suffix in _SIZES.items():
                values = recalls[:, sizes.index(size), i]
                figures[f"AR{suffix}@{limit}"] = 100 * float(values.mean()) if (values > -1).all() else float("nan")

        table = "  ".join(f"{name} {value:.1f}" for name, value in figures.items())
        _logger.info(f"COCO average recall on {self._dataset_name}\n{table}\n{format_setting(self._setting)}")
        if self._output_dir is not None:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            self._write_summary(figures, self._setting)
        return OrderedDict(box_proposals=dict(figures))


def _as_coco(ground_truth: COCO, records: dict[int, np.ndarray]) -> COCO:
    """Detections, rows (x, y, w, h, score) of each image, as loadRes of the COCO API makes them; there may be none."""
    category_id = ground_truth.getCatIds()[0]  # useCats 0 looks at the images' detections of all categories
    annotations = []
    for image_id, rows in records.items():
        for x, y, w, h, score in rows.tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "score": score,
                }
            )
    detections = COCO()
    detections.dataset = {key: ground_truth.dataset[key] for key in ("images", "categories")}
    detections.dataset["annotations"] = annotations
    detections.createIndex()
    return detections
