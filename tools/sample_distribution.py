"""Draws the paper's Fig. 2 for training runs: the share of positive and negative samples by anchor scale.

Every run of train_net.py writes what it needs into its metrics.json.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

TITLES = {
    "pos_matched": "positive, matched",
    "neg_matched": "negative, matched",
    "pos_sampled": "positive, sampled",
    "neg_sampled": "negative, sampled",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", help="metrics.json of a run")
    parser.add_argument("--output", required=True, help="picture to write (.png)")
    args = parser.parse_args()
    try:
        counts = read_counts(Path(args.metrics))
    except (OSError, ValueError) as error:
        sys.exit(f"sample_distribution: {error}")
    print_table(counts)
    plot(counts, args.output)
    print(f"Written: {args.output}")


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


def shares(by_scale):
    total = sum(by_scale.values())
    return {scale: value / total if total else 0.0 for scale, value in by_scale.items()}


def print_table(counts):
    scales = list(counts["pos_sampled"])
    print("anchors per image".ljust(24) + "".join(f"{scale:>12g}" for scale in scales))
    for name, title in TITLES.items():
        print(title.ljust(24) + "".join(f"{counts[name][scale]:12.1f}" for scale in scales))


def plot(counts, output):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, stage, title in (
        (axes[0], "matched", "all labelled anchors"),
        (axes[1], "sampled", "samples trained on"),
    ):
        positive, negative = shares(counts[f"pos_{stage}"]), shares(counts[f"neg_{stage}"])
        x = np.arange(len(positive))
        axis.bar(x - 0.2, positive.values(), 0.38, label="positive", color="#d1495b")
        axis.bar(x + 0.2, negative.values(), 0.38, label="negative", color="#30638e")
        axis.axhline(1 / len(x), color="grey", linewidth=0.8, linestyle=":")
        axis.set_xticks(x, [f"{scale:g}" for scale in positive])
        axis.set_xlabel("anchor scale (px)")
        axis.set_title(title)
    axes[0].set_ylabel("share")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(output, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
