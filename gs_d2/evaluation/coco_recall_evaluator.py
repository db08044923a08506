"""COCO's average recall of class-agnostic detections, by the official COCO API."""

import contextlib
import io
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gs_d2.evaluation.coco_ground_truth import coco_ground_truth
from gs_d2.evaluation.detection_evaluator import DetectionEvaluator, as_xywh, by_score
from gs_d2.evaluation.report import Result, json_number

_SIZES = {"all": "", "small": "s", "medium": "m", "large": "l"}  # of pycocotools, and in the names of metrics


class CocoRecallEvaluator(DetectionEvaluator):
    """AR@100 and AR@1000, by size (the paper's Tables 2 and 4), of a detector that does not tell classes apart.

    pycocotools' COCOeval with useCats 0: all objects are one class, IoU thresholds 0.5:0.05:0.95, the best-scored
    detection takes the object it overlaps most, crowds neither count nor cost. Detectron2's COCOEvaluator has another,
    approximate rule for proposals: each object, best covered first, takes the detection that covers it best, whatever
    its score. Its metrics are close but not these.

    `evaluate` gives {"box_proposals": {"AR@100", "ARs@100", "ARm@100", "ARl@100", "AR@1000", ...}} in percent, NaN
    where the data set has no object of a size.

    Args:
        dataset_name: a registered data set. Where its metadata has `json_file`, a file of COCO's format, the
            annotations are that file's; `image_ids` names its images if only some are to be evaluated.
        output_dir: where results.json goes. None: nothing is written.
        distributed, setting: as :class:`DetectionEvaluator`.
        limits: the most detections of an image that count, ascending.

    Raises:
        FileNotFoundError, ValueError: when it is built, as :func:`coco_ground_truth`; or there are no annotations.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, *, limits=(100, 1000), **kwargs):
        super().__init__(dataset_name, output_dir, **kwargs)
        self._limits = [int(limit) for limit in limits]
        self._ground_truth = coco_ground_truth(dataset_name)
        if "annotations" not in self._ground_truth.dataset:
            where = MetadataCatalog.get(dataset_name).get("json_file", dataset_name)
            raise ValueError(f"{where} has no annotations, without which there is no recall")

    def _keep(self, image, rows, output):
        return as_xywh(by_score(rows)[: self._limits[-1]])

    def _evaluate(self, kept):
        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth = self._ground_truth
            image_ids = MetadataCatalog.get(self._dataset_name).get("image_ids") or ground_truth.getImgIds()
            self._warn_of_others(image_ids, kept)
            evaluation = COCOeval(ground_truth, _as_coco(ground_truth, self._in_order(image_ids, kept)), "bbox")
            evaluation.params.imgIds = image_ids
            evaluation.params.useCats = 0
            evaluation.params.maxDets = self._limits
            evaluation.evaluate()
            evaluation.accumulate()
        recalls = evaluation.eval["recall"][:, 0]  # [IoU threshold, size, limit]; -1 without any object
        sizes = evaluation.params.areaRngLbl
        metrics = {}
        for i, limit in enumerate(self._limits):
            for size, suffix in _SIZES.items():
                values = recalls[:, sizes.index(size), i]
                metrics[f"AR{suffix}@{limit}"] = 100 * float(values.mean()) if (values > -1).all() else float("nan")
        self._present(CocoRecallResult(metrics), f"COCO average recall on {self._dataset_name}")
        return OrderedDict(box_proposals=metrics)


@dataclass(frozen=True)
class CocoRecallResult(Result):
    """Average recall by name, in percent in results.json too; it has no curves."""

    recalls: dict[str, float]

    def metrics(self):
        return self.recalls

    def table(self):
        return "  ".join(f"{name} {value:.1f}" for name, value in self.recalls.items())

    def summary(self):
        return {name: json_number(value) for name, value in self.recalls.items()}


def _as_coco(ground_truth: COCO, detections: dict[int, np.ndarray]) -> COCO:
    """Detections, rows (x, y, w, h, score) of each image, as loadRes of the COCO API makes them; there may be none."""
    category_id = ground_truth.getCatIds()[0]  # useCats 0 looks at the images' detections of all categories
    annotations = []
    for image_id, rows in detections.items():
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
    found = COCO()
    found.dataset = {key: ground_truth.dataset[key] for key in ("images", "categories")}
    found.dataset["annotations"] = annotations
    found.createIndex()
    return found
