"""WIDER FACE as a Detectron2 `DatasetEvaluator`, for train_net.py and for evaluation while training."""

import dataclasses
import logging
import os
from collections import OrderedDict
from collections.abc import Collection

import numpy as np

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.data import MetadataCatalog

from gs_d2.data.catalog import load_records
from gs_d2.data.records import check_record
from gs_d2.evaluation.detection_evaluator import DetectionEvaluator, as_xywh, rows_of
from gs_d2.evaluation.wider_face import SCALE_SUBSETS, WiderResult, evaluate_wider_face
from gs_d2.formats.files import is_inside, quantize
from gs_d2.formats.wider_face import GROUND_TRUTH_FILES, OFFICIAL_SUBSETS, WiderGroundTruth
from gs_d2.formats.wider_predictions import write_wider_predictions

_logger = logging.getLogger(__name__)


class WiderFaceEvaluator(DetectionEvaluator):
    """Average precision on WIDER FACE by the official protocol.

    `evaluate` gives {"wider_face": {"easy", "medium", "hard", "all", "all_valid"}}, and of each anchor scale's outputs
    alone "easy@<scale>", "medium@<scale>", "hard@<scale>" and "all@<scale>" (the paper's @16, @32, ...; Table 7). These
    need outputs with `instances_by_scale`, with `anchor_scales`: the detections of each scale after an NMS among
    themselves, which the final `instances` do not hold, since there a face survives in one scale only. Without it, as
    from a model whose `by_scale` is not set, there are none of these metrics. It is empty for the test set, whose
    annotations are not public: then the predictions and `submission.zip`, to be sent to the authors, are all there
    is.

    Args:
        dataset_name: a registered WIDER dataset, or faces of one's own: dicts with `image_id`, "<event>/<image>" in
            WIDER, and boxes as :func:`gs_d2.data.records.faces_of` reads them, optionally `attributes`. Its metadata
            has `ground_truth_dir`, the folder of the official `.mat` files. Without these files only `all` and
            `all_valid` (and the attributes) can be computed, from the dicts. With `image_ids` in the metadata only
            these images of the files are evaluated.
        output_dir: where predictions, results.json, pr_curves.npz and pr_curve.png go. None: nothing is
            written.
        distributed: whether each process sees a part of the images; False evaluates this process alone.
        setting: name -> value of what the metrics depend on (test sizes, score threshold, NMS, most
            detections an image), shown beside the table.

    Raises:
        FileNotFoundError, ValueError: when it is built: the data set cannot be evaluated
            (:func:`gs_d2.data.catalog.load_records`), or an `image_id` cannot be the name of a file of predictions.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, **kwargs):
        super().__init__(dataset_name, output_dir, **kwargs)
        records = load_records(dataset_name, for_training=False)
        self._missing_are_named = self._name_missing_files(records)
        for record in records:
            if not is_inside(str(record["image_id"])):
                raise ValueError(
                    f"{dataset_name}: image_id {record['image_id']!r} ({record.get('file_name')}) cannot name a file "
                    "of predictions: make it a relative path such as event/image"
                )

    def _name_missing_files(self, records) -> bool:
        """Before training, and not when the first evaluation looks for them. Whether there was anything to name."""
        folder = MetadataCatalog.get(self._dataset_name).get("ground_truth_dir")
        absent = [name for name in GROUND_TRUTH_FILES if folder and not os.path.exists(os.path.join(folder, name))]
        if not absent or not any("gt_boxes" in record for record in records):
            return False
        without = (
            "only all and all_valid are computed" if GROUND_TRUTH_FILES[0] in absent else "their subsets are left out"
        )
        _logger.warning(
            f"{self._dataset_name}: {folder} has no {', '.join(absent)}, of the official evaluation tools: {without}"
        )
        return True

    def _keep(self, image, rows, output):
        by_scale = None
        if "instances_by_scale" in output:
            instances = output["instances_by_scale"].to("cpu")
            scales = np.rint(instances.anchor_scales.detach().numpy().reshape(-1)).astype(np.int32)
            # Several times as many as the final ones, in float32, which is what detectors give.
            by_scale = rows_of(instances, image["image_id"]).astype(np.float32), scales
        return quantize(as_xywh(rows)), by_scale

    def _evaluate(self, kept):
        detections = {image_id: rows for image_id, (rows, _) in kept.items()}
        ground_truth = self._ground_truth(detections)
        self._warn_of_others(ground_truth.image_ids, kept)
        if not len(ground_truth.boxes):
            return self._write_submission(detections)
        by_scale = self._evaluate_scales(ground_truth, {image_id: scales for image_id, (_, scales) in kept.items()})
        result = dataclasses.replace(evaluate_wider_face(ground_truth, detections), by_scale=by_scale)
        self._present(
            result,
            f"WIDER FACE AP of {self._dataset_name}",
            lambda folder: write_wider_predictions(detections, folder / "predictions"),
        )
        if self._output_dir is not None:
            _logger.info(f"Predictions, results.json, pr_curves.npz and pr_curve.png are in {self._output_dir}")
        return OrderedDict({"wider_face": result.metrics()})

    def _ground_truth(self, detections) -> WiderGroundTruth:
        ground_truth = ground_truth_of(self._dataset_name, detections)
        official = any(name in ground_truth.subsets for name in OFFICIAL_SUBSETS)
        if official or not len(ground_truth.boxes) or self._missing_are_named:  # the test set has no boxes
            return ground_truth
        folder = MetadataCatalog.get(self._dataset_name).get("ground_truth_dir")
        _logger.warning(
            f"No official subsets for {self._dataset_name}: easy, medium and hard need "
            f"wider_{{face,easy,medium,hard}}_val.mat (from the official evaluation tools) in {folder}; "
            "only all and all_valid are computed, from the annotation list"
        )
        return ground_truth

    def _evaluate_scales(self, ground_truth, by_scale) -> dict[int, WiderResult]:
        """One evaluation for each anchor scale, with the outputs of that scale alone; none if an image lacks them."""
        if any(of_image is None for of_image in by_scale.values()):
            return {}
        subsets = {name: ground_truth.subsets[name] for name in SCALE_SUBSETS if name in ground_truth.subsets}
        ground_truth = dataclasses.replace(ground_truth, subsets=subsets)
        results = {}
        for scale in sorted({int(scale) for _, scales in by_scale.values() for scale in np.unique(scales)}):
            detections = {
                image_id: quantize(as_xywh(rows[scales == scale].astype(np.float64)))
                for image_id, (rows, scales) in by_scale.items()
            }
            results[scale] = evaluate_wider_face(ground_truth, detections, score_thresholds=(), heights=())
        return results

    def _write_submission(self, detections) -> OrderedDict:
        if self._output_dir is None:
            _logger.warning(f"{self._dataset_name} has no annotations and there is no output_dir: nothing to do")
            return OrderedDict()
        write_wider_predictions(detections, self._output_dir / "predictions")
        write_wider_predictions(detections, self._output_dir / "submission.zip")
        _logger.info(f"{self._dataset_name} has no annotations; submission.zip is in {self._output_dir}")
        return OrderedDict()


def ground_truth_of(dataset_name: str, image_ids: Collection[str] = ()) -> WiderGroundTruth:
    """The annotated faces of a registered data set: of the official files, or without them of its records.

    Args:
        dataset_name: as :class:`WiderFaceEvaluator` takes it.
        image_ids: the images that were processed. The official files are of val, so they are used only where they have
            at least one of these; without any they are used.

    Returns:
        WiderGroundTruth: without boxes for the test set, whose annotations are not public.
    """
    metadata = MetadataCatalog.get(dataset_name)
    folder = metadata.get("ground_truth_dir")
    if folder and os.path.exists(os.path.join(folder, "wider_face_val.mat")):
        ground_truth = WiderGroundTruth.from_mat_files(folder)
        # The training images, or a dataset of the user's own, are not in the official files of val.
        if not image_ids or not set(image_ids).isdisjoint(ground_truth.image_ids):
            of_data_set = metadata.get("image_ids")
            return ground_truth if of_data_set is None else ground_truth.of_images(of_data_set)
    of_records, boxes, attributes = [], [], []
    for record in load_records(dataset_name, for_training=False):
        faces = check_record(record, for_training=False)
        of_records.append(record["image_id"])
        boxes.append(() if faces is None else faces.boxes)
        invalid = {} if faces is None else {"invalid": faces.ignore}
        attributes.append({**invalid, **record.get("attributes", {})})
    return WiderGroundTruth.from_boxes(of_records, boxes, attributes)
