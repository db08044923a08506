"""WIDER FACE as a Detectron2 `DatasetEvaluator`, for train_net.py and for evaluation while training."""

import json
import logging
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from .curves import plot_pr_curves, save_curves
from .prediction_files import quantize_wider_detections, write_wider_predictions
from .report import format_wider_table, wider_summary
from .wider_face import OFFICIAL_SUBSETS, WiderGroundTruth, WiderResult, evaluate_wider_face

_logger = logging.getLogger(__name__)


class WiderFaceEvaluator(DatasetEvaluator):
    """Average precision on WIDER FACE by the official protocol.

    Args:
        dataset_name: a registered WIDER dataset. Its dicts have `image_id` "<event>/<image>", `gt_boxes` (n,
            4) XYXY and `attributes`; its metadata has `ground_truth_dir`, the folder of the official `.mat`
            files. Without these files only `all` and `all_valid` (and the attributes) can be computed, from
            the dicts.
        output_dir: where predictions, results.json, pr_curves.npz and pr_curve.png go. None: nothing is
            written.
        distributed: whether each process sees a part of the images; False evaluates this process alone.
        setting: name -> value of what the figures depend on (test sizes, score threshold, NMS, most
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
        self._detections: dict[str, np.ndarray] = {}
        self._group_scales: dict[str, np.ndarray] = {}

    def process(self, inputs, outputs):
        """Takes the detections of some images.

        Args:
            inputs: dicts with `image_id`.
            outputs: dicts with `instances`, which have `pred_boxes`, `scores` and, optionally,
                `group_scales`: the anchor scale of each detection, for the rows @16, @32, ...
        """
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.detach().numpy().astype(np.float64).reshape(-1, 4)
            scores = instances.scores.detach().numpy().astype(np.float64).reshape(-1, 1)
            rows = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores], axis=1)
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                raise ValueError(f"{image['image_id']}: {(~finite).sum()} detections have NaN or infinity")
            self._detections[image["image_id"]] = quantize_wider_detections(rows)
            if instances.has("group_scales"):
                self._group_scales[image["image_id"]] = instances.group_scales.detach().numpy().reshape(-1)

    def evaluate(self):
        """Evaluates what all processes have seen.

        Returns:
            OrderedDict: {"wider_face": {"easy", "medium", "hard", "all", "all_valid", and "all@<scale>"}} in
            percent, on the main process; {} on the others. Empty for the test set, whose annotations are not
            public: then the predictions and `submission.zip`, to be sent to the authors, are all there is.
        """
        if self._distributed:
            comm.synchronize()
            parts = comm.gather((self._detections, self._group_scales), dst=0)
            if not comm.is_main_process():
                return {}
        else:
            parts = [(self._detections, self._group_scales)]
        detections, group_scales = {}, {}
        for part_detections, part_scales in parts:
            detections |= part_detections
            group_scales |= part_scales

        ground_truth = self._ground_truth(detections)
        if not len(ground_truth.boxes):
            return self._write_submission(detections)
        missing = [image_id for image_id in ground_truth.image_ids if image_id not in detections]
        if missing:
            _logger.warning(
                f"{len(missing)} of {len(ground_truth.image_ids)} images of {self._dataset_name} were not "
                f"processed and count as without detections, the first is {missing[0]}"
            )
        known = set(ground_truth.image_ids)
        unknown = [image_id for image_id in detections if image_id not in known]
        if unknown:
            _logger.warning(f"{len(unknown)} images are not in the ground truth, the first is {unknown[0]}")
        result = evaluate_wider_face(ground_truth, detections)
        by_scale = self._evaluate_scales(ground_truth, detections, group_scales)

        summary = wider_summary(result, by_scale)
        summary |= {"num_images": len(known), "num_missing": len(missing), "setting": self._setting}
        _logger.info(f"WIDER FACE AP of {self._dataset_name}\n" + format_wider_table(result, by_scale, self._setting))
        if self._output_dir is not None:
            self._write(detections, result, summary)
        names = [name for name in (*OFFICIAL_SUBSETS, "all", "all_valid") if name in result.curves]
        figures = {name: 100 * result.curves[name].ap for name in names}
        figures |= {f"all@{scale}": 100 * r.curves["all"].ap for scale, r in by_scale.items()}
        return OrderedDict({"wider_face": figures})

    def _ground_truth(self, detections) -> WiderGroundTruth:
        folder = getattr(MetadataCatalog.get(self._dataset_name), "ground_truth_dir", None)
        if folder and os.path.exists(os.path.join(folder, "wider_face_val.mat")):
            ground_truth = WiderGroundTruth.from_mat_files(folder)
            # The training images, or a dataset of the user's own, are not in the official files of val.
            if not detections or not detections.keys().isdisjoint(ground_truth.image_ids):
                return ground_truth
        dicts = DatasetCatalog.get(self._dataset_name)
        ground_truth = WiderGroundTruth.from_boxes(
            [d["image_id"] for d in dicts],
            [d.get("gt_boxes", ()) for d in dicts],
            [d.get("attributes", {}) for d in dicts],
        )
        if not len(ground_truth.boxes):  # the test set
            return ground_truth
        _logger.warning(
            f"No official subsets for {self._dataset_name}: easy, medium and hard need "
            f"wider_{{face,easy,medium,hard}}_val.mat (from the official evaluation tools) in {folder}; "
            "only all and all_valid are computed, from the annotation list"
        )
        return ground_truth

    def _evaluate_scales(self, ground_truth, detections, group_scales) -> dict[int, WiderResult]:
        """One evaluation a scale, with only its outputs (columns @16, @32, ... of the paper)."""
        scales = sorted({int(s) for image in group_scales.values() for s in np.unique(np.rint(image))})
        only_all = WiderGroundTruth(
            ground_truth.image_ids,
            ground_truth.boxes,
            ground_truth.offsets,
            {"all": ground_truth.subsets["all"]},
        )
        return {
            scale: evaluate_wider_face(
                only_all, {i: detections[i][np.rint(group_scales[i]) == scale] for i in group_scales}
            )
            for scale in scales
        }

    def _write_submission(self, detections) -> OrderedDict:
        if self._output_dir is None:
            _logger.warning(f"{self._dataset_name} has no annotations and there is no output_dir: nothing to do")
            return OrderedDict()
        write_wider_predictions(detections, self._output_dir / "predictions")
        write_wider_predictions(detections, self._output_dir / "submission.zip")
        _logger.info(f"{self._dataset_name} has no annotations; submission.zip is in {self._output_dir}")
        return OrderedDict()

    def _write(self, detections, result: WiderResult, summary: dict) -> None:
        self._output_dir.mkdir(parents=True, exist_ok=True)
        write_wider_predictions(detections, self._output_dir / "predictions")
        (self._output_dir / "results.json").write_text(json.dumps(summary, indent=1, default=str) + "\n")
        save_curves(result.curves, self._output_dir / "pr_curves.npz")
        plot_pr_curves({"gs_d2": result.curves}, self._output_dir / "pr_curve.png")
        _logger.info(f"Predictions, results.json, pr_curves.npz and pr_curve.png are in {self._output_dir}")
