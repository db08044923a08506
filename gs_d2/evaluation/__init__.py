"""Evaluation by the official protocols: WIDER FACE, FDDB, AFW and PASCAL faces, and COCO's average recall.

The protocols need numpy and scipy only. The `DatasetEvaluator` classes need Detectron2, which is imported
when one of them is first asked for.
"""

from importlib import import_module

_EXPORTS = {
    "CocoRecallEvaluator": "coco_recall_evaluator",
    "CocoSubsetEvaluator": "coco_subset_evaluator",
    "FDDBEvaluator": "fddb_evaluator",
    "FaceEvalEvaluator": "face_eval_evaluator",
    "WiderFaceEvaluator": "wider_face_evaluator",
    "WiderGroundTruth": "wider_face",
    "evaluate_wider_face": "wider_face",
    "read_wider_predictions": "prediction_files",
    "write_wider_predictions": "prediction_files",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__():
    return __all__
