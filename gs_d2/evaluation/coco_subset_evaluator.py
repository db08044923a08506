"""COCO's average precision on a part of a data set."""

from gs_d2 import compat  # noqa: F401  isort: skip

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator


class CocoSubsetEvaluator(COCOEvaluator):
    """Detectron2's evaluator, for a data set whose metadata has `image_ids`: the images of `json_file` that count.

    Detectron2's own would take all other images of the file for images without detections.
    """

    def __init__(self, dataset_name: str, *args, **kwargs):
        super().__init__(dataset_name, *args, **kwargs)
        self._image_ids = list(MetadataCatalog.get(dataset_name).image_ids)

    def evaluate(self):
        return super().evaluate(img_ids=self._image_ids)
