"""Detectron2's config keys that do nothing here, by the part that does not read them: pattern -> what to do instead.

`check_config` refuses another value than the default. A key that one detector of this project reads and another does
not is in no table: configs that differ in MODEL.META_ARCHITECTURE can share a base. tests/test_unread_keys.py holds the
tables against all keys of Detectron2, 0.5 and main.
"""

_BOXES_ONLY = "only boxes are found"

# Whatever the detector, by the trainer and the data sets.
OF_TRAINER = {
    "DATALOADER.REPEAT_*": "images are not repeated, as DATALOADER.SAMPLER_TRAIN must be TrainingSampler",
    "DATASETS.PRECOMPUTED_*": "proposals are not read from files",
    "DATASETS.PROPOSAL_*": "proposals are not read from files",
    "INPUT.CROP.*": "use INPUT.GS.MAX_CROP_SIZE",
    "INPUT.MASK_FORMAT": "masks are not read",
    "MODEL.LOAD_PROPOSALS": "proposals are not read from files",
    "TEST.AUG.*": "use TEST.GS.PYRAMID, SCALES and FLIP",
    "TEST.KEYPOINT_OKS_SIGMAS": "keypoints are not evaluated",
}

OF_DETECTORS = {
    "MODEL.PANOPTIC_FPN.*": _BOXES_ONLY,
    "MODEL.SEM_SEG_HEAD.*": _BOXES_ONLY,
    "VIS_PERIOD": "training draws no pictures; use tools/visualize_data.py",
}

OF_RPN = {
    "MODEL.ANCHOR_GENERATOR.ANGLES": "boxes are not rotated",
    "MODEL.RPN.BOUNDARY_THRESH": "anchors that cross the border of the image are trained on, too",
}
OF_RPN_HEADS = {"MODEL.RPN.CONV_DIMS": "the head has the channels of its feature maps, MODEL.FPN.OUT_CHANNELS"}

OF_ROI_HEADS = {
    "MODEL.KEYPOINT_ON": _BOXES_ONLY,
    "MODEL.MASK_ON": _BOXES_ONLY,
    "MODEL.ROI_BOX_CASCADE_HEAD.*": "there is no cascade of heads",
    "MODEL.ROI_BOX_HEAD.*FED_LOSS*": "there is no federated loss",
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": "the second stage is trained on proposals",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": "set MODEL.GS.ROI.CLS_LOSS_TYPE",
    "MODEL.ROI_HEADS.IOU_LABELS": "between the two MODEL.ROI_HEADS.IOU_THRESHOLDS a proposal is ignored",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "use TEST.GS.SCORE_THRESH",
    "MODEL.ROI_KEYPOINT_HEAD.*": _BOXES_ONLY,
    "MODEL.ROI_MASK_HEAD.*": _BOXES_ONLY,
}
