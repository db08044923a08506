#!/usr/bin/env python
"""Calibrates a trained detector: afterwards a score is the probability that a detection is a face, at every scale.

With --balance small detections have to be surer than that, and the threshold of the highest F1 becomes 0.5.

    tools/calibrate_scores.py --config-file configs/faces/mobilenetv2.yaml --dataset wider_face_train --images 300 \\
        --output output/calibrated.pth MODEL.WEIGHTS output/faces_mobilenetv2/model_final.pth

Group sampling shows every scale one face to three hard negatives, so that scores of different scales do not mean the
same. The detector runs on evenly spaced images of a data set that it may have been trained on (not the one that results
are reported on), a gain and an offset are fitted for each anchor scale, and both become part of the weights that are
written. Single-stage detectors with one feature map only; the test settings are the config's.

    --balance 50 30 10    then lowers the scores of some scales, mostly of small ones, so that average precision is
                          highest: the mean for faces of at least 50, 30 and 10 px height (smaller ones do not count).
                          A score of 0.5 becomes the threshold with the highest F1; scores are no probabilities then
"""

import argparse

from tqdm import tqdm

from gs_d2.analysis.scale_balance import balance, best_operating_point, centre, mean_ap
from gs_d2.analysis.score_calibration import calibration_of, judged_detections
from gs_d2.command_line import bad_input_ends, file_for, parser_of
from gs_d2.config import load_config
from gs_d2.conversion.converted import check_suffix
from gs_d2.data.catalog import load_records
from gs_d2.data.subset import register_subset
from gs_d2.data.workers import explained
from gs_d2.engine import Trainer
from gs_d2.modeling.calibration import calibrate_head
from gs_d2.weights import write_weights


@bad_input_ends()
def main(argv: list[str] | None = None):
    args = parse(argv)
    check_suffix(file_for("--output", args.output), ".pth", ".safetensors")
    if args.images < 1:
        raise ValueError(f"--images must be at least 1, got {args.images}")
    if not all(0 <= height < float("inf") for height in args.balance):
        raise ValueError(f"--balance must be heights of at least 0, got {args.balance}")
    cfg = load_config(args.config_file, args.opts)
    if cfg.TEST.GS.PYRAMID:
        raise ValueError("detectors are calibrated at one scale: set TEST.GS.PYRAMID False")
    model = Trainer.build_model(cfg)
    rpn = getattr(model, "proposal_generator", None)
    if rpn is None or hasattr(model, "roi_heads"):
        raise ValueError(
            f"only single-stage detectors with anchors can be calibrated, not {cfg.MODEL.META_ARCHITECTURE}"
        )
    Trainer.build_checkpointer(model, "", strict=True).load(cfg.MODEL.WEIGHTS)
    dataset = register_subset(args.dataset, args.images)
    loader, dataset_dicts = Trainer.build_test_loader(cfg, dataset), load_records(dataset, for_training=False)
    images = ((inputs[0], d) for inputs, d in zip(tqdm(loader, unit="image"), dataset_dicts, strict=True))
    with explained():
        found = judged_detections(model.eval(), images)
    calibration, counts = calibration_of(found, rpn.anchor_generator.scales)
    if args.balance:
        calibration = balanced(calibration, found, args.balance)
    calibrate_head(rpn, calibration)
    print(f"{'scale':>6}{'detections':>12}{'faces':>8}{'gain':>8}{'offset':>8}")
    for scale, gain, offset, (num_found, num_faces) in zip(*calibration, counts, strict=True):
        print(f"{scale:6g}{num_found:12}{num_faces:8}{gain:8.2f}{offset:8.2f}")
    state = {k: v.half() if args.half and v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_weights(args.output, state if args.output.endswith(".safetensors") else {"model": state})
    print(f"The calibrated detector is {args.output}")


def balanced(calibration, found, min_heights):
    """The calibration with balanced scales, whose best threshold is 0.5; prints what that brings."""
    before, calibration = mean_ap(calibration, found, min_heights), balance(calibration, found, min_heights)
    print(f"Balanced scales: mean AP {100 * before:.1f} % -> {100 * mean_ap(calibration, found, min_heights):.1f} %")
    point = best_operating_point(calibration, found)
    print(f"Score threshold 0.5: precision {100 * point.precision:.1f} %, recall {100 * point.recall:.1f} %")
    return centre(calibration, point)


def parse(argv) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the config that was trained with")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a registered data set with annotations")
    parser.add_argument("--images", type=int, default=300, metavar="N", help="of the data set (default: %(default)s)")
    parser.add_argument(
        "--balance", type=float, nargs="+", default=[], metavar="HEIGHT", help="heights of faces in pixels (see above)"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help=".pth or .safetensors")
    parser.add_argument("--half", action="store_true", help="write float16")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, MODEL.WEIGHTS ...")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
