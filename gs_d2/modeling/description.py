"""What a detector says of itself, so that the engine has to know no detector's name.

A detector answers with class methods, each in the file of its class: see :class:`Description`. A detector of somebody
else's may answer some of them, or none.
"""

from collections.abc import Callable
from typing import NamedTuple

from detectron2.modeling import META_ARCH_REGISTRY


class DetectionSettings(NamedTuple):
    """What decides, besides the weights and the size of the image, which boxes a detector returns.

    Attributes:
        score_thresh: probability below which a detection is dropped.
        before_nms: boxes that enter the NMS which gives the detections: a number, or in words.
        nms_thresh: IoU above which that NMS drops the lower-scored box.
        max_detections: the most detections of an image.
    """

    score_thresh: float | str
    before_nms: int | str
    nms_thresh: float | str
    max_detections: int | str


class BreakingDefault(NamedTuple):
    """A default of Detectron2's that breaks a detector.

    Attributes:
        key: of the config.
        default: what Detectron2 sets.
        reason: why it breaks the detector, and what to set.
        right_for_coco: COCO's own protocol or its baselines (FPN, RetinaNet), and the paper with them, take it: it is
            wrong for faces only.
        training_only: it has no meaning at test.
    """

    key: str
    default: float | list
    reason: str
    right_for_coco: bool = False
    training_only: bool = False


# Of several detectors.
TOO_FEW_DETECTIONS = BreakingDefault(
    "TEST.DETECTIONS_PER_IMAGE", 100, "a WIDER FACE image has up to 1,968 faces; use 1000 or more", right_for_coco=True
)
DETECTION_LIMITS = [
    TOO_FEW_DETECTIONS,
    BreakingDefault(
        "MODEL.RPN.PRE_NMS_TOPK_TEST", 6000, "over all scales together it starves small faces; the paper keeps 50000"
    ),
    BreakingDefault(
        "MODEL.RPN.POST_NMS_TOPK_TEST",
        1000,
        "it caps detections before TEST.DETECTIONS_PER_IMAGE does",
        right_for_coco=True,
    ),
]
LOOSE_NMS = BreakingDefault("MODEL.RPN.NMS_THRESH", 0.7, "the paper merges detections at 0.5", right_for_coco=True)
OTHER_SAMPLES = [
    BreakingDefault(
        "MODEL.RPN.POSITIVE_FRACTION",
        0.5,
        "the paper samples positives : negatives = 1 : 3, that is 0.25",
        training_only=True,
    ),
    BreakingDefault(
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
        256,
        "this is N, the samples per group; the paper uses 2048",
        right_for_coco=True,
        training_only=True,
    ),
]


class Description(NamedTuple):
    """What the engine asks of a detector: attributes and class methods of its class.

    Attributes:
        class_agnostic (bool): its detections have no classes, so that recall is all that COCO can measure.
        num_classes_key (str): the config key that holds how many classes it tells apart; None where there is none.
        test_settings: cfg -> :class:`DetectionSettings`, which its `from_config` uses as well.
        breaking_defaults: cfg -> list[:class:`BreakingDefault`].
        contradictions: cfg, training (bool) -> list[str]: settings that contradict each other in this detector, in
            training or only at test; each a sentence that names the keys, their values and what to set.
        unread_keys: cfg -> dict[str, str]: keys that do nothing in this detector, or `fnmatch` patterns of keys, and
            what to do instead.
    """

    class_agnostic: bool
    num_classes_key: str | None
    test_settings: Callable
    breaking_defaults: Callable
    contradictions: Callable
    unread_keys: Callable


class _Undescribed:
    """The answers of a detector that says nothing."""

    class_agnostic = False
    num_classes_key = None

    @classmethod
    def test_settings(cls, cfg):
        return DetectionSettings(*["set by the model"] * len(DetectionSettings._fields))

    @classmethod
    def breaking_defaults(cls, cfg):
        return []

    @classmethod
    def contradictions(cls, cfg, training):
        return []

    @classmethod
    def unread_keys(cls, cfg):
        return {}


_OF_OTHERS: dict[type, type] = {}


def describes(detector: type):
    """Decorates a class that answers for a detector which is not ours, and for its subclasses."""

    def register(description: type) -> type:
        _OF_OTHERS[detector] = description
        return description

    return register


def description_of(meta_architecture: str) -> Description:
    """The answers of the detector that is registered under this name.

    Raises:
        ValueError: there is none of that name.
    """
    if meta_architecture not in META_ARCH_REGISTRY:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {meta_architecture!r} is not registered: correct it, or import the module that "
            "registers it"
        )
    detector = META_ARCH_REGISTRY.get(meta_architecture)
    bases = getattr(detector, "__mro__", ())
    answering = (detector, *(_OF_OTHERS[base] for base in bases if base in _OF_OTHERS), _Undescribed)
    answers = (next(getattr(x, name) for x in answering if hasattr(x, name)) for name in Description._fields)
    return Description(*answers)
