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
import dataclasses
from pathlib import Path

from gs_d2.command_line import bad_input_ends, file_for, folder_for, parser_of
from gs_d2.evaluation.curves import load_curves
from gs_d2.evaluation.face_eval import FaceEvalResult, evaluate_face_eval
from gs_d2.evaluation.fddb import FddbResult, evaluate_fddb
from gs_d2.evaluation.fddb_regions import image_sizes_of
from gs_d2.evaluation.precision_recall import PrecisionRecallCurve
from gs_d2.evaluation.report import present, write_summary
from gs_d2.evaluation.wider_face import SCORE_THRESHOLDS, WiderResult, evaluate_wider_face
from gs_d2.formats import face_eval, fddb
from gs_d2.formats.wider_curves import read_official_curves
from gs_d2.formats.wider_face import OFFICIAL_SUBSETS, WiderGroundTruth
from gs_d2.formats.wider_predictions import read_wider_predictions, write_wider_predictions


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, allow_abbrev=False)
    parser.add_argument("benchmark", choices=["wider_face", "fddb", "afw", "pascal_face"], help="whose protocol")
    parser.add_argument("--predictions", required=True, type=Path, metavar="PATH", help="the detections")
    parser.add_argument("--ground-truth", required=True, type=Path, metavar="PATH", help="the official annotations")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write results.json, curves (npz) and a picture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics as JSON, fractions 0..1")
    parser.add_argument("--name", default="gs_d2", help="of the method, in the picture (default: %(default)s)")
    wider = parser.add_argument_group("wider_face")
    wider.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="PATH",
        help="draw other methods: a folder of official wider_pr_info_*.mat, or NAME=pr_curves.npz; repeatable",
    )
    wider.add_argument(
        "--score-thresholds",
        nargs="*",
        type=float,
        default=SCORE_THRESHOLDS,
        metavar="S",
        help=f"give precision and recall at these scores (default: {' '.join(map(str, SCORE_THRESHOLDS))})",
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


@bad_input_ends()
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    evaluate = {"wider_face": run_wider_face, "fddb": run_fddb}.get(args.benchmark, run_face_eval)
    if args.output:
        folder_for("--output", args.output)
    for flag, file in (("--json", args.json), ("--submission", args.submission)):
        if file and not (flag == "--submission" and not file.suffix):  # a folder
            file_for(flag, file)
    result = evaluate(args)
    if args.json:
        write_summary(result, {}, args.json)
    if args.output:
        print(f"results.json, curves and picture are in {args.output}")


def print_missing(missing: list[str], num_images: int, num_unknown: int, what: str = "files") -> None:
    line = f"{num_images - len(missing)} of {num_images} images matched, {len(missing)} missing"
    if missing:
        line += f" (their faces count as not found; the first is {missing[0]})"
    print(line)
    if num_unknown:
        print(f"{num_unknown} {what} belong to no image of the ground truth")


def run_wider_face(args: argparse.Namespace) -> WiderResult:
    ground_truth = WiderGroundTruth.from_mat_files(args.ground_truth)
    others = other_methods(args.compare)
    predictions = read_wider_predictions(args.predictions, ground_truth.image_ids)
    result = evaluate_wider_face(ground_truth, predictions.detections, score_thresholds=args.score_thresholds)
    result = dataclasses.replace(result, num_unknown=predictions.num_unknown)  # these files were not read
    if args.submission:
        write_wider_predictions(predictions.detections, args.submission)
    present(result, {}, args.output, name=args.name, others=others)
    print_missing(result.missing, result.num_images, result.num_unknown)
    if result.num_empty:
        print(f"{result.num_empty} files are without detections")
    absent = [name for name in OFFICIAL_SUBSETS if name not in result.curves]
    if absent:
        names = ", ".join(f"wider_{name}_val.mat" for name in absent)
        print(f"WARNING: no {', '.join(absent)}: {args.ground_truth} has no {names}")
    return result


def other_methods(sources: list[str]) -> dict[str, dict[str, PrecisionRecallCurve]]:
    methods = {}
    for source in sources:
        name, is_named, path = source.partition("=")
        if is_named:
            methods[name] = load_curves(path)
            continue
        for method, curves in read_official_curves(source).items():
            methods[method] = {subset: PrecisionRecallCurve(*curve) for subset, curve in curves.items()}
    return methods


def run_fddb(args: argparse.Namespace) -> FddbResult:
    annotations = fddb.read_annotations(args.ground_truth)
    detections = fddb.read_detections(args.predictions)
    sizes = image_sizes_of(args.images, list(annotations)) if args.images else {}
    if args.images and not sizes:
        raise ValueError(f"{args.images}: has no image of FDDB; need files like {next(iter(annotations))}.jpg")
    result = evaluate_fddb(annotations, detections, sizes, fit_ellipses=args.fit_ellipses)
    if len(result.missing) == result.num_images:
        raise ValueError(f"{args.predictions}: no image of {args.ground_truth} in it; need names as in the lists")
    present(result, {}, args.output, name=args.name)
    print_missing(result.missing, result.num_images, result.num_unknown, "images of the detections")
    return result


def run_face_eval(args: argparse.Namespace) -> FaceEvalResult:
    annotations = face_eval.read_annotations(args.ground_truth, args.benchmark)
    detections = face_eval.read_detections(args.predictions)
    result = evaluate_face_eval(annotations, detections, y_shift=args.y_shift)
    if len(result.missing) == result.num_images and result.num_unknown:
        example = next(iter(annotations.boxes))
        raise ValueError(f"{args.predictions}: no image of {args.benchmark} in it; need names like {example}")
    present(result, {}, args.output, name=args.name)
    print_missing(result.missing, result.num_images, result.num_unknown, "images (all their detections count as false)")
    return result


if __name__ == "__main__":
    main()
