"""COCO's average precision, by Detectron2's evaluator on checked annotations."""

import logging
import tempfile
from pathlib import Path

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from gs_d2.evaluation.coco_ground_truth import coco_ground_truth
from gs_d2.evaluation.detection_evaluator import rows_of

_logger = logging.getLogger(__name__)
_NOTHING = '{"images": [], "annotations": [], "categories": []}'


class CocoEvaluator(COCOEvaluator):
    """Detectron2's `COCOEvaluator` on what :func:`coco_ground_truth` gives, so that a file which pycocotools would take
    wrongly is completed or refused when this is built.

    Only the images of the metadata's `image_ids` count, where it has these; Detectron2's own would take the others of
    the file for images without detections. Detections of classes that the data set does not have are left out.
    """

    def __init__(self, dataset_name: str, tasks=None, distributed=True, output_dir=None, **kwargs):
        """
        Args:
            all: as Detectron2's.

        Raises:
            FileNotFoundError, ValueError: as :func:`coco_ground_truth`.
        """
        ground_truth = coco_ground_truth(dataset_name)
        with tempfile.TemporaryDirectory() as folder:  # Detectron2 reads a file itself; it gets an empty one
            path = Path(folder, "nothing.json")
            path.write_text(_NOTHING)
            stand_in = f"{dataset_name} as {path}"
            MetadataCatalog.get(stand_in).json_file = str(path)
            try:
                super().__init__(stand_in, tasks, distributed, output_dir, **kwargs)
            finally:
                MetadataCatalog.remove(stand_in)
        self._metadata = MetadataCatalog.get(dataset_name)
        self._coco_api = ground_truth
        self._do_evaluation = "annotations" in ground_truth.dataset
        self._num_classes, self._warned = len(ground_truth.dataset["categories"]), False

    def process(self, inputs, outputs):
        """As Detectron2's.

        Raises:
            ValueError: for NaN or infinity in a detection, which JSON could not hold.
        """
        kept = []
        for image, output in zip(inputs, outputs, strict=True):
            if "instances" in output:
                instances = output["instances"].to("cpu")
                rows_of(instances, image["image_id"])
                known = instances.pred_classes < self._num_classes
                if not known.all() and not self._warned:
                    self._warned = True
                    _logger.warning(
                        f"Left out: detections of class {int(instances.pred_classes.max())} and others, of which "
                        f"{self._metadata.name} has {self._num_classes}; set NUM_CLASSES of the detector to that"
                    )
                output = {**output, "instances": instances[known]}
            kept.append(output)
        super().process(inputs, kept)

    def evaluate(self):
        image_ids = self._metadata.get("image_ids")
        return super().evaluate(img_ids=None if image_ids is None else list(image_ids))
