#!/usr/bin/env python
"""Runs our detector (torch, ONNX) beside those of other packages, on photographs in WIDER FACE's layout.

    DETECTRON2_DATASETS=datasets python benchmarks/face_detectors.py --yunet-model face_detection_yunet.onnx \\
        --results other_detectors/ --output output/bench

Of each detector that is installed, and at each input size: AP by our evaluator where the data set has annotations, the
median time on the CPU with one and two threads, and the peak memory with the first of these. Each runs in a process of
its own, which begins with the timing, of ten photographs at the score threshold that its users get. What is not
installed is named with the command that installs it. --results adds the AP of others' result files. Writes
face_detectors.json, .md and .png (AP against time), and the predictions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from adapters import ADAPTERS, at_size
from common import record_of, table, write_record
from tqdm import tqdm

from gs_d2 import model_zoo
from gs_d2.command_line import bad_input_ends, folder_for, parser_of
from gs_d2.data.catalog import load_records
from gs_d2.evaluation.wider_face import SCALE_SUBSETS, evaluate_wider_face
from gs_d2.evaluation.wider_face_evaluator import ground_truth_of
from gs_d2.formats.images import as_rgb
from gs_d2.formats.wider_predictions import read_wider_predictions
from gs_d2.inference.export import ExportableDetector, to_onnx
from gs_d2.inference.exported import compare, load_exported

PROCESS = Path(__file__).with_name("face_detector_process.py")
ORIGINAL = "original"


@bad_input_ends()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    output = folder_for("--output", args.output)
    results = files_of_results(args.results)
    if args.yunet_model and not os.path.isfile(args.yunet_model):
        raise FileNotFoundError(f"--yunet-model {args.yunet_model}: no such file")
    records = load_records(args.dataset, for_training=False)
    paths = {record["image_id"]: str(Path(record["file_name"]).resolve()) for record in records}
    chosen = list(paths.values())[:: max(1, len(paths) // args.timed_images)][: args.timed_images]
    files = {"yunet-model": args.yunet_model}
    skipped = [line for name in args.detectors if (line := ADAPTERS[name].missing(files))]
    print("".join(f"Left out: {line}\n" for line in skipped), end="")
    names = [name for name in args.detectors if not ADAPTERS[name].missing(files)]
    load, equality = os.getloadavg() if hasattr(os, "getloadavg") else None, None
    if "gs_d2_onnx" in names:
        files["gs_d2_onnx"], equality = export(output / "gs_d2.onnx", chosen, args.sizes)
    ground_truth = ground_truth_of(args.dataset, paths)
    rows, failed = [], []
    runs = [(name, size) for name in names for size in args.sizes]
    for name, size in tqdm(runs, desc="detectors", unit="run"):
        file = files.get(ADAPTERS[name].file or name)
        row = {"detector": ADAPTERS[name].title, "input": size, "times": {}, "ap": {}}
        for threads in args.threads:
            folder = output / "predictions" / f"{name}_{size}"
            job = {
                "detector": name,
                "file": file and str(Path(file).resolve()),
                "threads": threads,
                "side": None if size == ORIGINAL else int(size),
                "timed": chosen,
                "repeats": args.repeats,
                "images": paths if threads == args.threads[0] and not args.time_only else {},
                "output": str(folder),
                "answer": str(output / "answer.json"),
            }
            done = subprocess.run([sys.executable, PROCESS], input=json.dumps(job), text=True, capture_output=True)
            if done.returncode:
                failed.append(f"{ADAPTERS[name].title}, {size}: {(done.stderr.strip() or '?').splitlines()[-1]}")
                break
            row["times"][threads] = json.loads((output / "answer.json").read_text())
        else:
            rows.append({**row, "ap": ap_of(folder, ground_truth)})
    (output / "answer.json").unlink(missing_ok=True)
    rows += [{"detector": n, "input": "files", "times": {}, "ap": ap_of(p, ground_truth)} for n, p in results.items()]
    about = {"data set": args.dataset, "images": len(paths), "load": load, "skipped": skipped, "failed": failed}
    record = record_of(torch.device("cpu"), argv, **about, rows=rows, equality=equality)
    write_record(output, "face_detectors", record, tables_of(record, args.threads))
    plot(rows, args.threads[0], output / "face_detectors.png")
    print("".join(f"FAILED: {line}\n" for line in failed), end="", file=sys.stderr)
    return int(bool(failed))


def parse(argv):
    parser = parser_of(__doc__)
    parser.add_argument("--output", default="output/bench", help="folder for results and predictions")
    parser.add_argument("--dataset", default="wider_face_val", help="a registered data set (default: %(default)s)")
    parser.add_argument("--detectors", nargs="+", choices=ADAPTERS, default=list(ADAPTERS), help="default: all")
    parser.add_argument("--yunet-model", metavar="FILE", help="YuNet as ONNX, which OpenCV does not bring")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="PATH", help="result files of others, in WIDER's form"
    )
    parser.add_argument("--sizes", nargs="+", type=size, default=["640", ORIGINAL], help="a square's side, or original")
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--timed-images", type=positive, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", help="calls timed (default: %(default)s)")
    parser.add_argument(
        "--time-only", action="store_true", help="AP is of the predictions that --output has from before"
    )
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


def size(text: str) -> str:
    return text if text == ORIGINAL else str(positive(text))


def files_of_results(paths: list[str]) -> dict[str, Path]:
    """Name -> folder or zip of one method's files. A folder of zips has a method in each."""
    found = [zipped for path in map(Path, paths) for zipped in (sorted(path.glob("*.zip")) if path.is_dir() else ())]
    found += [path for path in map(Path, paths) if path not in {zipped.parent for zipped in found}]
    absent = [path for path in found if not path.exists()]
    if absent:
        raise FileNotFoundError(f"--results {absent[0]}: no such folder or zip")
    return {path.stem: path for path in found}


def export(path: Path, photographs: list[str], sizes: list[str]) -> tuple[str, dict]:
    """Writes the graph of our detector, and says how its faces differ from the model's on the photographs."""
    graph = ExportableDetector(model_zoo.get(model_zoo.DEFAULT, trained=True, device="cpu"))
    path.write_bytes(to_onnx(graph).model_proto.SerializeToString())
    images = [
        np.ascontiguousarray(at_size(as_rgb(file), None if size == ORIGINAL else int(size))[0].transpose(2, 0, 1)[None])
        for size in sizes
        for file in photographs
    ]
    return str(path), {"images": len(images), **compare(load_exported(path), graph, images)._asdict()}


def ap_of(predictions: Path, ground_truth) -> dict[str, float]:
    """Subset -> AP in percent; {} without annotations or predictions."""
    if not len(ground_truth.boxes) or not predictions.exists():
        return {}
    detections = read_wider_predictions(predictions, ground_truth.image_ids).detections
    metrics = evaluate_wider_face(ground_truth, detections, score_thresholds=(), heights=()).metrics()
    return {name: metrics[name] for name in SCALE_SUBSETS if name in metrics}


# Reporting


def tables_of(record: dict, threads: list[int]) -> str:
    rows = record["rows"]
    subsets = [name for name in SCALE_SUBSETS if any(name in row["ap"] for row in rows)]
    header = ["detector", "input", *subsets, *(f"ms, threads {n}" for n in threads), "CPU ms", "peak MiB"]
    lines = []
    for row in rows:
        first = row["times"].get(threads[0], {})
        cells = [f"{row['ap'][name]:.1f}" if name in row["ap"] else "" for name in subsets]
        cells += [f"{row['times'][n]['wall_ms']:.0f}" if n in row["times"] else "" for n in threads]
        cells += [f"{first[key]:.0f}" if first.get(key) else "" for key in ("cpu_ms", "peak_mib")]
        lines.append([row["detector"], row["input"], *cells])
    text = f"{record['images']} images of {record['data set']}; AP in percent. "
    text += f"Medians; CPU ms and memory with {threads[0]} thread(s).\n\n{table(lines, header)}"
    if equal := record["equality"]:
        text += (
            f"\n\nONNX against torch on {equal['images']} images: {equal['num_faces']} faces; those of both differ by "
            f"at most {equal['box_error']:.1g} px and {equal['score_error']:.1g}, {len(equal['unlike'])} of one alone"
        )
    return text + "".join(f"\n\nLeft out: {line}" for line in record["skipped"])


def plot(rows: list[dict], threads: int, path: Path):
    """AP against milliseconds, a panel for each subset; results without a time are lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    subsets = [name for name in SCALE_SUBSETS if any(name in row["ap"] for row in rows)]
    if not subsets:
        return
    figure, panels = plt.subplots(
        1, len(subsets), figsize=(3.6 * len(subsets), 3.6), squeeze=False, layout="constrained"
    )
    titles = list(dict.fromkeys(row["detector"] for row in rows))
    for panel, name in zip(panels[0], subsets, strict=True):
        for row in (row for row in rows if name in row["ap"]):
            colour, label = f"C{titles.index(row['detector'])}", f"{row['detector']}, {row['input']}"
            if threads in row["times"]:
                marker = "s" if row["input"] == ORIGINAL else "o"
                panel.plot(row["times"][threads]["wall_ms"], row["ap"][name], marker, color=colour, label=label)
            else:
                panel.axhline(row["ap"][name], linestyle="--", linewidth=1, color=colour, label=label)
        panel.set(title=name, xscale="log", xlabel=f"ms, {threads} thread(s)")
    panels[0][0].set_ylabel("AP (%)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
