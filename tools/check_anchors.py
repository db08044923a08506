#!/usr/bin/env python
"""Shows how well the anchors of a config fit the faces that it is trained on, before anything is trained.

    tools/check_anchors.py --config-file configs/wider_gs.yaml
    tools/check_anchors.py --config-file configs/wider_gs.yaml MODEL.ANCHOR_GENERATOR.SIZES "[[8, 16, 32, 64, 128]]"

Matches the faces of one augmented view of each image to the anchors, as training does: no net, no pixels. A face whose
IoU with every anchor is below the upper of MODEL.RPN.IOU_THRESHOLDS has no anchor in the first pass of matching, and at
most one in the second. A face without any anchor is background to the detector. Where they are many, add scales to
MODEL.ANCHOR_GENERATOR.SIZES, bring ASPECT_RATIOS (height / width) near the faces', or lower the thresholds.
"""

import argparse
from itertools import pairwise

import numpy as np

from gs_d2.analysis.anchor_fit import ASPECT_RATIOS, HEIGHTS, anchor_fit
from gs_d2.analysis.views import ViewAnchors
from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.evaluation.report import format_table, percent

COLUMNS = ["", "faces", "no anchor in the first pass (%)", "no anchor (%)", "anchors (median)", "best IoU (median)"]


@bad_input_ends()
def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="whose anchors and matching are checked")
    parser.add_argument("--dataset", metavar="NAME", help="whose faces; default: the first of DATASETS.TRAIN")
    parser.add_argument(
        "--num-images", type=int, default=500, metavar="N", help="a random subset (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of subset and augmentation (default: %(default)s)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args(argv)
    if args.num_images < 1 or args.seed < 0:
        parser.error("--num-images must be at least 1 and --seed at least 0")
    anchors = ViewAnchors(args.config_file, args.opts)
    dataset = args.dataset or next(iter(anchors.cfg.DATASETS.TRAIN), None)
    if dataset is None:
        raise ValueError("DATASETS.TRAIN is empty: name a data set with --dataset")
    fit = anchor_fit(anchors, dataset, args.num_images, args.seed)
    matcher, scales = anchors.rpn.group_loss.matcher, anchors.rpn.anchor_generator.scales
    print(
        f"{dataset}, one view each of at most {args.num_images} images. Anchor scales: "
        f"{', '.join(f'{scale:g}' for scale in scales)} px; IoU thresholds: {matcher.low:g} and {matcher.high:g}"
    )
    print(format_table(COLUMNS, rows_of(fit)))


def rows_of(fit):
    rows = [row("all", fit.summary(np.ones(len(fit.heights), bool)))]
    for name, values, limits in (
        ("height", fit.heights, HEIGHTS),
        ("width / height", fit.widths / np.maximum(fit.heights, 1e-6), ASPECT_RATIOS),
    ):
        for low, high in pairwise([0, *limits, np.inf]):
            bin = f"{name} from {low:g}" if high == np.inf else f"{name} {low:g} to {high:g}"
            rows.append(row(bin, fit.summary((values >= low) & (values < high))))
    return rows


def row(name, summary):
    return [
        name,
        f"{summary['faces']}",
        percent(summary["without_first_pass"]),
        percent(summary["without_anchor"]),
        f"{summary['median_positives']:g}" if summary["faces"] else "-",
        f"{summary['median_best_iou']:.2f}" if summary["faces"] else "-",
    ]


if __name__ == "__main__":
    main()
