#!/usr/bin/env python
"""Draws the paper's Fig. 2: the share of positive and negative training samples by anchor scale.

    tools/sample_distribution.py --dataset wider_face_train --output fig2.png
    tools/sample_distribution.py output/demo/metrics.json --output picture.png
    tools/sample_distribution.py output/fpn/metrics.json output/fpn_finest/metrics.json --output picture.png

The first counts what detectors would be trained on, from annotations and configs alone: training's own augmentation (of
the boxes), anchors, matching and sampling, one view of each image, no net and no pixels. Where an image is missing, the
size of its file is taken to be 1024 x 768, or taller if its boxes reach further down: WIDER FACE's are 1024 wide.
The others read what train_net.py writes into a run's metrics.json: of one run, the anchors of each label by scale
before and after sampling; of several, their samples as in Fig. 2, named by their folders.

The figures behind a picture are written beside it as .json.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

TITLES = {
    "pos_matched": "positive, matched",
    "neg_matched": "negative, matched",
    "pos_sampled": "positive, sampled",
    "neg_sampled": "negative, sampled",
}
FIG_2 = ("rpn", "fpn", "fpn_finest_stride", "fpn_finest", "fpn_finest_sampling")  # (a) to (e)
COLOURS = {"pos_sampled": "#d1495b", "neg_sampled": "#30638e"}
ASSUMED_SIZE = (768, 1024)  # height, width in pixels
SIZE_RULE = "1024 x 768 px, or taller where boxes reach further down"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="*", help="metrics.json of one or several runs; none: count from annotations")
    parser.add_argument("--output", required=True, help="picture to write (.png)")
    parser.add_argument(
        "--config-file", nargs="+", metavar="FILE", help="detectors to count for; default: the five of Fig. 2"
    )
    parser.add_argument("--dataset", help="whose annotations are counted; default: wider_face_train")
    parser.add_argument("--images", type=int, metavar="N", help="a random subset of so many; default: all")
    parser.add_argument("--seed", type=int, help="of subset, augmentation and sampling; default: 0")
    args = parser.parse_args(argv)
    counting = {"config_files": args.config_file, "dataset": args.dataset, "num_images": args.images, "seed": args.seed}
    counting = {name: value for name, value in counting.items() if value is not None}
    if args.metrics and counting:
        parser.error("metrics.json of runs needs none of --config-file, --dataset, --images and --seed")
    if counting.get("num_images", 1) < 1 or counting.get("seed", 0) < 0:
        parser.error("--images must be at least 1 and --seed at least 0")
    output = Path(args.output)
    try:
        if args.metrics:
            figures = {"unit": "anchors per image, mean over the run", "detectors": read_runs(args.metrics)}
        else:
            figures = count_annotations(**counting)
            sizes = figures["image_sizes"]
            print(
                f"{figures['dataset']}, {figures['images']} images, image sizes: {sizes['read']} read from the files, "
                f"{sizes['assumed']} assumed ({SIZE_RULE})"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        if len(args.metrics) == 1:
            (counts,) = figures["detectors"].values()
            print_table(counts)
            plot(counts, output)
        else:
            print_shares(figures["detectors"])
            plot_detectors(figures["detectors"], output)
        output.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (OSError, KeyError, ValueError, AssertionError) as error:
        sys.exit(f"sample_distribution: {' '.join(str(error).split())}")
    print(f"Written: {output}, {output.with_suffix('.json')}")


def read_runs(metrics_files) -> dict[str, dict]:
    """The counts of several runs by the names of their folders; by their paths, where two folders have one name."""
    paths = [Path(path) for path in metrics_files]
    names = [path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return {name: read_counts(path) for name, path in zip(names, paths, strict=True)}


def read_counts(metrics_file: Path) -> dict[str, dict[float, float]]:
    """Mean anchors per image over the run: {"pos_sampled": {16.0: 12.3, ...}, ...}."""
    values = defaultdict(lambda: defaultdict(list))
    try:
        lines = metrics_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{metrics_file}: not a text file ({error})") from error
    for number, line in enumerate(lines, 1):
        try:
            for key, value in json.loads(line).items():
                if key.startswith("groups/") and "@" in key:
                    name, scale = key.removeprefix("groups/").split("@")
                    values[name][float(scale)].append(float(value))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{metrics_file}:{number}: not a record of metrics ({error})") from error
    if not values.keys() >= TITLES.keys():
        raise ValueError(f"{metrics_file}: no group statistics; is it the metrics.json of a training run of gs_d2?")
    return {name: {s: float(np.mean(v)) for s, v in sorted(by.items())} for name, by in values.items()}


class TrainedAnchors:
    """Which anchors of an image a config's detector is trained on: all of its real parts but the net."""

    def __init__(self, config_file):
        import torch
        from detectron2.modeling import build_backbone, build_proposal_generator

        import gs_d2.modeling
        from gs_d2.config import load_config
        from gs_d2.data import FaceDatasetMapper

        cfg = load_config(config_file, ["INPUT.GS.COLOR_JITTER", 0.0])  # there are no pixels
        with torch.device("meta"):  # strides are all that is wanted of it: no memory, no weights
            backbone = build_backbone(cfg)
        self.shapes = backbone.output_shape()
        self.size_divisibility = max(backbone.size_divisibility, 1)
        self.rpn = build_proposal_generator(cfg, self.shapes)
        if not isinstance(self.rpn, gs_d2.modeling.GroupSamplingRPN) or self.rpn.group_loss.sampler.method != "random":
            raise ValueError(
                f"{config_file}: what is drawn by loss cannot be known without a net; "
                "only GroupSamplingRPN with MODEL.GS.SAMPLER random can be counted. Read a run's metrics.json instead"
            )
        self.augment = FaceDatasetMapper(cfg, is_train=True).augment

    def map_sizes(self, image_size) -> list[tuple[int, int]]:
        """Height and width of each feature map for an image of that height and width, padded as in training."""
        step = self.size_divisibility
        padded = [-(-side // step) * step for side in image_size]
        strides = [self.shapes[name].stride for name in self.rpn.in_features]
        return [tuple(-(-side // stride) for side in padded) for stride in strides]

    def count(self, image_size, faces, ignored, seed) -> dict[str, np.ndarray]:
        """Anchors of one view by label and scale: int64 [G] for each of TITLES.

        Args:
            image_size: height and width of the view.
            faces, ignored (float32 [n, 4]): as :meth:`FaceDatasetMapper.augment`.
            seed (int): of the draw.
        """
        import torch
        from detectron2.structures import Boxes

        from gs_d2.modeling.losses import group_sums

        rpn = self.rpn
        maps = [torch.empty(1, 0, *size) for size in self.map_sizes(image_size)]
        anchors = Boxes.cat(rpn.anchor_generator(maps)).tensor
        faces, ignored = Boxes(torch.from_numpy(faces)), Boxes(torch.from_numpy(ignored))
        group_loss = rpn.group_loss
        match_labels, _, _ = group_loss.match(anchors, [faces], [ignored], [image_size])
        scale_idxs, group_idxs = group_loss.group(anchors)
        sampled_labels = group_loss.sampler(match_labels, group_idxs, seed=seed)
        masks = (match_labels == 1, match_labels == 0, sampled_labels == 1, sampled_labels == 0)
        num_scales = len(group_loss.group_scales)
        return {
            name: group_sums(mask, scale_idxs, num_scales)[0].numpy().astype(np.int64)
            for name, mask in zip(TITLES, masks, strict=True)
        }


def count_annotations(config_files=None, dataset="wider_face_train", num_images=None, seed=0) -> dict:
    """Sums the anchors of one augmented view of each image, the same view for detectors of the same augmentation.

    Returns:
        dict: dataset, images, seed, image_sizes {read, assumed, assumption}, detectors {name: {"pos_sampled": {16.0:
        anchors of all images, ...}, ...}}; equal for equal arguments.
    """
    from detectron2.data import DatasetCatalog
    from tqdm import tqdm

    import gs_d2.data  # noqa: F401  (registers the data sets)

    config_files = [Path(path) for path in config_files or [ROOT / f"configs/wider/{name}.yaml" for name in FIG_2]]
    detectors = {detector_name(path): TrainedAnchors(path) for path in config_files}
    if len(detectors) < len(config_files):
        raise ValueError("Two of the config files have the same name")
    records = DatasetCatalog.get(dataset)
    if not any(len(record.get("gt_boxes", ())) for record in records):
        raise ValueError(f"{dataset} has no annotated faces")
    idxs = range(len(records))
    if num_images is not None and num_images < len(records):
        idxs = sorted(np.random.default_rng(seed).choice(len(records), num_images, replace=False).tolist())

    totals = {name: defaultdict(int) for name in detectors}
    num_read = 0
    for i in tqdm(idxs, desc="counting", unit="image", mininterval=0.1 if sys.stderr.isatty() else 10):
        size = file_size(records[i]["file_name"])
        num_read += size is not None
        blank = np.zeros(size or assumed_size(records[i]["gt_boxes"]), np.uint8)
        for name, detector in detectors.items():
            np.random.seed([seed, i])  # Detectron2's augmentations draw from numpy's own state
            view, faces, ignored = detector.augment(blank, records[i])
            draw = np.random.randint(2**62)
            for label, counts in detector.count(view.shape[:2], faces, ignored, draw).items():
                totals[name][label] += counts
    return {
        "dataset": dataset,
        "images": len(idxs),
        "seed": seed,
        "image_sizes": {"read": num_read, "assumed": len(idxs) - num_read, "assumption": SIZE_RULE},
        "unit": "anchors, in one view of each image",
        "detectors": {
            name: {
                label: dict(zip(map(float, detectors[name].rpn.group_loss.group_scales), counts.tolist(), strict=True))
                for label, counts in by_label.items()
            }
            for name, by_label in totals.items()
        },
    }


def detector_name(config_file: Path) -> str:
    """ "FPN-finest-stride" of `.../fpn_finest_stride.yaml`: the paper's names."""
    words = config_file.stem.split("_")
    return "-".join(word.upper() if word in ("rpn", "fpn", "dc", "wrs", "ohem") else word for word in words)


def file_size(file_name) -> tuple[int, int] | None:
    """Height and width in pixels as read for training, from the file's header; None if there is no file."""
    from PIL import Image

    if not os.path.isfile(file_name):
        return None
    with Image.open(file_name) as image:
        width, height = image.size
        lies = image.getexif().get(0x0112, 1) > 4  # the camera was held upright
    return (width, height) if lies else (height, width)


def assumed_size(boxes) -> tuple[int, int]:
    """Height and width of a file that is not there (SIZE_RULE), from its boxes [n, 4] in pixels."""
    height, width = ASSUMED_SIZE
    return max(height, int(np.ceil(boxes[:, 3].max(initial=0)))), width


def shares(by_scale):
    total = sum(by_scale.values())
    return {scale: value / total if total else 0.0 for scale, value in by_scale.items()}


def shares_of_samples(counts) -> dict[str, dict[float, float]]:
    """Fig. 2: both labels "normalized by the total amount of training samples"; all shares together are 1."""
    samples = {(label, scale): count for label in COLOURS for scale, count in counts[label].items()}
    result = {label: {} for label in COLOURS}
    for (label, scale), share in shares(samples).items():
        result[label][scale] = share
    return result


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


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def plot(counts, output):
    """One run: each label's own shares, before and after sampling."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
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
    figure.tight_layout()
    figure.savefig(output, dpi=130)
    plt.close(figure)


def plot_detectors(detectors, output):
    """A column for each detector; positives have an axis of their own, for they are a few percent of the samples."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        2, len(detectors), figsize=(1 + 2.3 * len(detectors), 4.4), sharex="col", sharey="row", squeeze=False
    )
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
    figure.tight_layout()
    figure.savefig(output, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
