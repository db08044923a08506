"""Evaluation by the official protocols: WIDER FACE, FDDB, AFW and PASCAL faces, and COCO's average recall.

The protocols need numpy and scipy only. The `DatasetEvaluator` classes need Detectron2, which is imported
when one of them is first asked for.
"""

from importlib import import_module

_EXPORTS = {
    "CocoEvaluator": "gs_d2.evaluation.coco_evaluator",
    "CocoRecallEvaluator": "gs_d2.evaluation.coco_recall_evaluator",
    "FDDBEvaluator": "gs_d2.evaluation.fddb_evaluator",
    "FaceEvalEvaluator": "gs_d2.evaluation.face_eval_evaluator",
    "WiderFaceEvaluator": "gs_d2.evaluation.wider_face_evaluator",
    "WiderGroundTruth": "gs_d2.formats.wider_face",
    "evaluate_wider_face": "gs_d2.evaluation.wider_face",
    "read_wider_predictions": "gs_d2.formats.wider_predictions",
    "write_wider_predictions": "gs_d2.formats.wider_predictions",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__():
    return __all__
