"""The detectors of Table 6, and what makes each small enough to train from random weights in a test."""

from dataclasses import dataclass

from detectron2.config import get_cfg

from gs_d2.config import add_gs_config, check_config

FROM_RANDOM_WEIGHTS = """
    MODEL.DEVICE cpu MODEL.BACKBONE.FREEZE_AT 0 MODEL.GS.CHANNELS_LAST False
    MODEL.RPN.BBOX_REG_LOSS_TYPE least_square_iou MODEL.RPN.PRE_NMS_TOPK_TEST 5000 MODEL.GS.SAMPLER wrs
    SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_TYPE norm
    SOLVER.CLIP_GRADIENTS.CLIP_VALUE 5.0 TEST.GS.PYRAMID False
"""
RESNET_18 = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.NORM GN MODEL.FPN.NORM GN"
SMALL_SECOND_STAGE = """
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 2000 MODEL.RPN.POST_NMS_TOPK_TRAIN 200 MODEL.RPN.POST_NMS_TOPK_TEST 400
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 64 MODEL.ROI_BOX_HEAD.CONV_DIM 64 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 3
    MODEL.RPN.BBOX_REG_LOSS_TYPE smooth_l1
"""


@dataclass(frozen=True)
class Pipeline:
    """A detector with the rows `configs/pipelines/<name>.yaml` and `<name>_sampling.yaml`.

    Attributes:
        small: config overrides, "KEY value KEY value ...", that make it small.
        resnet: whether MODEL.WEIGHTS are those of an ImageNet ResNet-50.
    """

    name: str
    small: str
    resnet: bool = True

    def cfg(self, sampling: bool, small: bool = False, weights: bool = False):
        """The config of a row, on the CPU, and without weights unless they are asked for."""
        cfg = get_cfg()
        add_gs_config(cfg)
        cfg.merge_from_file(f"configs/pipelines/{self.name}{'_sampling' if sampling else ''}.yaml")
        cfg.MODEL.DEVICE = "cpu"
        if not weights:
            cfg.MODEL.WEIGHTS = ""
        if small:
            cfg.merge_from_list(f"{FROM_RANDOM_WEIGHTS} {self.small}".split())
        check_config(cfg)
        return cfg


PIPELINES = [
    Pipeline("retinaface", f"{RESNET_18} MODEL.FPN.OUT_CHANNELS 64"),
    # With N = 2048 and no groups nearly all anchors are drawn, and 200 steps are too few for the positives among them.
    Pipeline("ssd", f"{RESNET_18} MODEL.FPN.OUT_CHANNELS 64 MODEL.RPN.BATCH_SIZE_PER_IMAGE 64"),
    Pipeline(
        "yolov3",
        "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.NORM BN MODEL.RPN.BATCH_SIZE_PER_IMAGE 64",
        resnet=False,
    ),
    Pipeline(
        "rfcn",
        f"{RESNET_18} MODEL.FPN.OUT_CHANNELS 64 {SMALL_SECOND_STAGE} MODEL.RPN.BATCH_SIZE_PER_IMAGE 64",
    ),
]
