#!/usr/bin/env python
"""Evaluates detections by the official protocol of a benchmark.

    tools/evaluate.py wider_face --predictions results/ --ground-truth eval_tools/ground_truth --output out/
    tools/evaluate.py fddb --predictions detections.txt --ground-truth FDDB-folds/ --images originalPics/
    tools/evaluate.py afw --predictions afw.txt --ground-truth annotations/ --json afw.json

PATH is a folder or a zip (for fddb, afw and pascal_face also one file). Needs numpy and scipy; matplotlib for
the picture, h5py for the official curves of other methods. All printed rates are percent, all in the JSON
fractions.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from gs_d2.evaluation import face_eval, fddb
from gs_d2.evaluation.curves import (
    load_curves,
    plot_pr_curves,
    plot_roc_curves,
    read_official_curves,
    save_curves,
)
from gs_d2.evaluation.prediction_files import read_wider_predictions, write_wider_predictions
from gs_d2.evaluation.report import (
    format_table,
    format_wider_table,
    json_number,
    percent,
    score_note,
    wider_summary,
)
from gs_d2.evaluation.wider_face import OFFICIAL_SUBSETS, WiderGroundTruth, evaluate_wider_face


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("benchmark", choices=["wider_face", "fddb", "afw", "pascal_face"])
    parser.add_argument("--predictions", required=True, type=Path, metavar="PATH", help="the detections")
    parser.add_argument("--ground-truth", required=True, type=Path, metavar="PATH", help="the official annotations")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write results.json, curves (npz) and a picture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON, fractions 0..1")
    parser.add_argument("--name", default="gs_d2", help="of the method, in the picture (default: %(default)s)")
    wider = parser.add_argument_group("wider_face")
    wider.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="PATH",
        help="draw other methods: a folder of official wider_pr_info_*.mat, or NAME=pr_curves.npz; repeatable",
    )
    wider.add_argument("--submission", type=Path, metavar="ZIP", help="write the predictions as an official zip")
    fddb_group = parser.add_argument_group("fddb")
    fddb_group.add_argument(
        "--images", type=Path, metavar="DIR", help="FDDB's originalPics: clip to the true image sizes"
    )
    fddb_group.add_argument(
        "--fit-ellipses",
        action="store_true",
        help="turn rectangles into ellipses by our fit to the annotations",
    )
    face = parser.add_argument_group("afw, pascal_face")
    face.add_argument(
        "--y-shift",
        type=float,
        default=0.0,
        metavar="F",
        help="lower the top of each box by this fraction of its height (0.2 for WIDER's taller boxes; default 0)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one line on stderr that says what is wrong with the input."""
    args = parse_args(argv)
    evaluate = {"wider_face": wider_face, "fddb": run_fddb}.get(args.benchmark, run_face_eval)
    try:
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
        figures = evaluate(args)
        for path in [args.json] + ([args.output / "results.json"] if args.output else []):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    except ImportError as error:
        print(f"error: {error}; install it: pip install {error.name}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if args.output:
        print(f"results.json, curves and picture are in {args.output}")
    return 0


def print_missing(missing: list[str], num_images: int, num_unknown: int, what: str = "files") -> None:
    line = f"{num_images - len(missing)} of {num_images} images matched, {len(missing)} missing"
    if missing:
        line += f" (their faces count as not found; the first is {missing[0]})"
    print(line)
    if num_unknown:
        print(f"{num_unknown} {what} belong to no image of the ground truth")


def wider_face(args: argparse.Namespace) -> dict:
    ground_truth = WiderGroundTruth.from_mat_files(args.ground_truth)
    others = other_methods(args.compare)
    predictions = read_wider_predictions(args.predictions, ground_truth.image_ids)
    result = evaluate_wider_face(ground_truth, predictions.detections)
    print(format_wider_table(result))
    print_missing(predictions.missing, len(ground_truth.image_ids), predictions.num_unknown)
    if predictions.empty:
        print(f"{len(predictions.empty)} files are without detections")
    absent = [name for name in OFFICIAL_SUBSETS if name not in result.curves]
    if absent:
        names = ", ".join(f"wider_{name}_val.mat" for name in absent)
        print(f"WARNING: no {', '.join(absent)}: {args.ground_truth} has no {names}")
    if args.submission:
        write_wider_predictions(predictions.detections, args.submission)
    if args.output:
        save_curves(result.curves, args.output / "pr_curves.npz")
        plot_pr_curves({args.name: result.curves} | others, args.output / "pr_curve.png")
    return wider_summary(result) | {
        "num_images": len(ground_truth.image_ids),
        "num_missing": len(predictions.missing),
        "num_empty": len(predictions.empty),
        "num_unknown": predictions.num_unknown,
    }


def other_methods(sources: list[str]) -> dict:
    methods = {}
    for source in sources:
        name, is_named, path = source.partition("=")
        methods |= {name: load_curves(path)} if is_named else read_official_curves(source)
    return methods


def run_fddb(args: argparse.Namespace) -> dict:
    annotations = fddb.read_annotations(args.ground_truth)
    detections = fddb.read_detections(args.predictions)
    if args.fit_ellipses:
        detections = {image: fddb.ellipses_from_rectangles(rows) for image, rows in detections.items()}
    sizes = fddb.image_sizes_of(args.images, list(annotations)) if args.images else {}
    if args.images and not sizes:
        raise ValueError(f"{args.images}: has no image of FDDB; need files like {next(iter(annotations))}.jpg")
    result = fddb.evaluate_fddb(annotations, detections, sizes)
    if len(result.missing) == len(annotations):
        raise ValueError(f"{args.predictions}: no image of {args.ground_truth} in it; need names as in the lists")
    counts = fddb.FALSE_POSITIVES
    discrete = [result.rate_at(count) for count in counts]
    continuous = [result.rate_at(count, continuous=True) for count in counts]
    rows = [[str(count), percent(d), percent(c)] for count, d, c in zip(counts, discrete, continuous, strict=True)]
    print(format_table(["FP at most", "discrete TPR", "continuous TPR"], rows))
    shape = "fitted ellipses" if args.fit_ellipses else "as given"
    print(f"setting: {shape}, {len(sizes)} of {len(annotations)} image sizes from images, the others estimated")
    print(score_note_of(detections))
    print(f"{result.num_faces} faces")
    print_missing(result.missing, len(annotations), result.num_unknown, "images of the detections")
    if args.output:
        curves = {
            "Discrete": (result.false_positives, result.discrete),
            "Continuous": (result.false_positives, result.continuous),
        }
        names = ("false_positives", "discrete", "continuous", "thresholds")
        arrays = {name: getattr(result, name) for name in names}
        np.savez_compressed(args.output / "roc_curves.npz", **arrays)
        plot_roc_curves({args.name: curves}, args.output / "roc_curve.png")
    return {
        "disc_tpr": {str(count): json_number(rate) for count, rate in zip(counts, discrete, strict=True)},
        "cont_tpr": {str(count): json_number(rate) for count, rate in zip(counts, continuous, strict=True)},
        "num_faces": result.num_faces,
        "num_detections": result.num_detections,
        "num_images": len(annotations),
        "num_missing": len(result.missing),
        "num_unknown": result.num_unknown,
    }


def score_note_of(detections: dict) -> str:
    scores = [float(score) for rows in detections.values() for score in rows[:, -1]]
    return score_note(len(scores), (min(scores, default=0.0), max(scores, default=0.0)))


def run_face_eval(args: argparse.Namespace) -> dict:
    annotations = face_eval.read_annotations(args.ground_truth, args.benchmark)
    detections = face_eval.read_detections(args.predictions)
    result = face_eval.evaluate_face_eval(annotations, detections, y_shift=args.y_shift)
    if len(result.missing) == len(annotations.boxes) and result.num_unknown:
        example = next(iter(annotations.boxes))
        raise ValueError(f"{args.predictions}: no image of {args.benchmark} in it; need names like {example}")
    title = {"afw": "AFW", "pascal_face": "PASCAL faces"}[args.benchmark]
    print(format_table([title, "AP"], [[f"{result.num_faces} faces", percent(result.curve.ap)]]))
    tx, ty, sx, sy = result.refinement
    print(f"setting: y-shift {args.y_shift:g}; refinement shift {tx:.4f} {ty:.4f}, scale {sx:.4f} {sy:.4f}")
    print(score_note_of(detections))
    print(f"{result.num_detections} detections evaluated, {result.num_small} dropped as too small")
    print_missing(
        result.missing,
        len(annotations.boxes),
        result.num_unknown,
        "images (all their detections count as false)",
    )
    if args.output:
        save_curves({args.benchmark: result.curve}, args.output / "pr_curves.npz")
        plot_pr_curves(
            {args.name: {args.benchmark: result.curve}},
            args.output / "pr_curve.png",
            panels={args.benchmark: title},
        )
    return {
        "ap": json_number(result.curve.ap),
        "num_faces": result.num_faces,
        "num_detections": result.num_detections,
        "num_images": len(annotations.boxes),
        "num_missing": len(result.missing),
        "num_unknown": result.num_unknown,
        "y_shift": args.y_shift,
        "refinement": list(result.refinement),
    }


if __name__ == "__main__":
    sys.exit(main())
