#!/usr/bin/env python
"""The paper's Fig. 2: the share of positive and negative training samples by anchor scale.

    tools/sample_distribution.py --dataset wider_face_train --output fig2.png
    tools/sample_distribution.py output/demo/metrics.json --output picture.png
    tools/sample_distribution.py output/fpn/metrics.json output/fpn_finest/metrics.json --output picture.png

The first counts what detectors would be trained on, from annotations and configs alone: training's own augmentation (of
the boxes), anchors, matching and sampling, one view of each image, no net and no pixels. Where an image is missing, the
size of its file is taken to be 1024 x 768, or taller if its boxes reach further down: WIDER FACE's are 1024 wide.
The others read what train_net.py writes into a run's metrics.json: of one run, the anchors of each label by scale
before and after sampling; of several, their samples as in Fig. 2, named by their folders.

The numbers behind a picture are written beside it as .json.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gs_d2.analysis.samples import LABELS, TITLES, count_annotations, read_runs, shares, shares_of_samples
from gs_d2.analysis.views import SIZE_RULE
from gs_d2.command_line import bad_input_ends, parser_of, picture_for
from gs_d2.formats.json_text import json_text
from gs_d2.formats.whole_file import write_text

COLOURS = dict(zip(LABELS, ("#d1495b", "#30638e"), strict=True))


@bad_input_ends()
def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("metrics", nargs="*", help="metrics.json of one or several runs; none: count from annotations")
    parser.add_argument("--output", required=True, help="picture to write (.png)")
    parser.add_argument(
        "--config-file", nargs="+", metavar="FILE", help="detectors to count for; default: the five of Fig. 2"
    )
    parser.add_argument("--dataset", help="whose annotations are counted; default: wider_face_train")
    parser.add_argument("--num-images", type=int, metavar="N", help="a random subset of so many; default: all")
    parser.add_argument("--seed", type=int, help="of subset, augmentation and sampling; default: 0")
    args = parser.parse_args(argv)
    counting = {name: getattr(args, name) for name in ("config_file", "dataset", "num_images", "seed")}
    counting = {name: value for name, value in counting.items() if value is not None}
    if args.metrics and counting:
        parser.error("metrics.json of runs needs none of --config-file, --dataset, --num-images and --seed")
    if counting.get("num_images", 1) < 1 or counting.get("seed", 0) < 0:
        parser.error("--num-images must be at least 1 and --seed at least 0")
    output = picture_for("--output", args.output)
    if output.with_suffix(".json").resolve() in [Path(file).resolve() for file in args.metrics]:
        raise ValueError(f"--output {output}: {output.with_suffix('.json')} would be overwritten by the numbers")
    if args.metrics:
        counted = {"unit": "anchors per image, mean over the run", "detectors": read_runs(args.metrics)}
    else:
        counted = count_annotations(counting.pop("config_file", None), **counting)
        sizes = counted["image_sizes"]
        print(
            f"{counted['dataset']}, {counted['images']} images, image sizes: {sizes['read']} read from the files, "
            f"{sizes['assumed']} assumed ({SIZE_RULE})"
        )
    write_text(output.with_suffix(".json"), json_text(counted, indent=2) + "\n")
    if len(args.metrics) == 1:
        (counts,) = counted["detectors"].values()
        print_table(counts)
        plot(counts, output)
    else:
        print_shares(counted["detectors"])
        plot_detectors(counted["detectors"], output)
    print(f"Written: {output}, {output.with_suffix('.json')}")


def print_table(counts):
    scales = list(counts["pos_sampled"])
    print("anchors per image".ljust(24) + "".join(f"{scale:>12g}" for scale in scales))
    for name, title in TITLES.items():
        print(title.ljust(24) + "".join(f"{counts[name][scale]:12.1f}" for scale in scales))


def print_shares(detectors):
    scales = sorted({scale for counts in detectors.values() for scale in counts["pos_sampled"]})
    width = max(map(len, detectors)) + 2
    print(f"{'percent of all samples':<{width + 10}}" + "".join(f"{scale:>9g}" for scale in scales) + f"{'all':>9}")
    for name, counts in detectors.items():
        for label, by_scale in shares_of_samples(counts).items():
            cells = [f"{100 * by_scale[scale]:.2f}" if scale in by_scale else "-" for scale in scales]
            cells.append(f"{100 * sum(by_scale.values()):.2f}")
            sign = TITLES[label].split(",")[0]
            print(f"{name:<{width}}{sign:<10}" + "".join(f"{cell:>9}" for cell in cells))


def plot(counts, output):
    """One run: each label's own shares, before and after sampling."""
    figure = Figure(figsize=(9, 3.4), layout="tight")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, stage, title in (
        (axes[0], "matched", "all labelled anchors"),
        (axes[1], "sampled", "samples trained on"),
    ):
        positive, negative = shares(counts[f"pos_{stage}"]), shares(counts[f"neg_{stage}"])
        x = np.arange(len(positive))
        axis.bar(x - 0.2, positive.values(), 0.38, label="positive", color=COLOURS["pos_sampled"])
        axis.bar(x + 0.2, negative.values(), 0.38, label="negative", color=COLOURS["neg_sampled"])
        axis.axhline(1 / len(x), color="grey", linewidth=0.8, linestyle=":")
        axis.set_xticks(x, [f"{scale:g}" for scale in positive])
        axis.set_xlabel("anchor scale (px)")
        axis.set_title(title)
    axes[0].set_ylabel("share")
    axes[0].legend(frameon=False)
    figure.savefig(output, dpi=130)


def plot_detectors(detectors, output):
    """A column for each detector; positives have an axis of their own, for they are a few percent of the samples."""
    figure = Figure(figsize=(1 + 2.3 * len(detectors), 4.4), layout="tight")
    axes = figure.subplots(2, len(detectors), sharex="col", sharey="row", squeeze=False)
    for column, (name, counts) in enumerate(detectors.items()):
        for axis, (label, by_scale) in zip(axes[:, column], shares_of_samples(counts).items(), strict=True):
            percents = [100 * share for share in by_scale.values()]
            x = np.arange(len(percents))
            bars = axis.bar(x, percents, 0.7, color=COLOURS[label])
            axis.bar_label(bars, [f"{value:.2g}" for value in percents], fontsize=8, padding=1)
            axis.set_xticks(x, [f"{scale:g}" for scale in by_scale])
            axis.margins(y=0.12)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(f"{TITLES[label].split(',')[0]} (%)")
        letter = f"({chr(ord('a') + column)}) " if len(detectors) <= 26 else ""
        axes[0, column].set_title(letter + name, fontsize=10)
        axes[1, column].set_xlabel("anchor scale (px)")
    figure.suptitle("Percent of all training samples of a detector, by label and anchor scale", fontsize=10)
    figure.align_ylabels()
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
