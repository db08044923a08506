"""What there is to say of Detectron2's GeneralizedRCNN, which takes this project's proposal generator and ROI heads."""

from detectron2.modeling import GeneralizedRCNN

from gs_d2.modeling.description import describes
from gs_d2.modeling.meta_arch import GroupedFastRCNN, has_grouped_heads
from gs_d2.unread_keys import OF_DETECTORS


@describes(GeneralizedRCNN)
class GeneralizedRCNNWithOurParts:
    """Answers as :class:`GroupedFastRCNN`; with other ROI heads than ours by what Detectron2's read."""

    @classmethod
    def test_settings(cls, cfg):
        settings = GroupedFastRCNN.test_settings(cfg)
        if has_grouped_heads(cfg.MODEL.ROI_HEADS.NAME):
            return settings
        return settings._replace(score_thresh=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST)

    @classmethod
    def unread_keys(cls, cfg):
        return {key: hint for key, hint in GroupedFastRCNN.unread_keys(cfg).items() if key not in OF_DETECTORS}

    num_classes_key = GroupedFastRCNN.num_classes_key
    breaking_defaults = GroupedFastRCNN.breaking_defaults
    contradictions = GroupedFastRCNN.contradictions
