#!/usr/bin/env python
"""Where the time of a training step goes, by part: for anyone who wants to make one faster.

    benchmarks/profile_step.py --config-file configs/wider/fpn_finest_sampling.yaml
    benchmarks/profile_step.py --config-file configs/quick/demo.yaml --size 256 256 MODEL.GS.CHANNELS_LAST False

One image of random pixels and random weights: times depend on neither. A part's time is its own, without the parts that
it calls; "other" is what no part claims. Data loading reads and augments a crowd image of WIDER FACE's size as the
config says; in training, worker processes do that beside the step, so it is no part of the total.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import (
    LEARNING_RATE,
    Stopwatch,
    check_least,
    device_of,
    faces,
    machine,
    on,
    parts_of,
    random_input,
    random_model,
    table,
    train_step,
)
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from PIL import Image

from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.config import load_config
from gs_d2.data import FaceDatasetMapper

FILE_SIZE = (1024, 768)  # width and height of WIDER FACE's images, most of which are 1024 wide


@bad_input_ends()
def main(argv: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the detector")
    parser.add_argument("--faces", type=int, default=100, help="in the image (default: 100)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 800), metavar=("HEIGHT", "WIDTH"), help="default: 800 800"
    )
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--steps", type=int, default=7, help="steps whose median is given, after one that is not timed")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args(argv)
    check_least(0, faces=args.faces)
    check_least(1, size=min(args.size), steps=args.steps)
    device_of(args.device)
    cfg = load_config(args.config_file, ["MODEL.DEVICE", args.device, *args.opts])
    times = profile_steps(cfg, tuple(args.size), args.faces, args.steps)
    loading = profile_loading(cfg, args.faces, args.steps)
    print(report(times, loading, machine(torch.device(cfg.MODEL.DEVICE))))


def profile_steps(cfg, size, num_faces, steps):
    """Seconds of each part in each of `steps` training steps."""
    model = random_model(cfg).train()
    cfg.SOLVER.BASE_LR = LEARNING_RATE
    optimizer = build_optimizer(cfg, model)
    inputs = random_input(size, num_faces)
    times = []
    with EventStorage() as storage:
        for _ in range(1 + steps):
            stopwatch = Stopwatch(cfg.MODEL.DEVICE)
            with stopwatch.methods(parts_of(model)), stopwatch.part("other"):
                train_step(model, optimizer, inputs, stopwatch)
            times.append(dict(stopwatch.seconds))
            storage.step()
    return times[1:]


def profile_loading(cfg, num_faces, repeats):
    """Seconds of each of `repeats` calls of the mapper, on one JPEG file."""
    width, height = FILE_SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "crowd.jpg"
        Image.fromarray(pixels).resize(FILE_SIZE, Image.BICUBIC).save(path, quality=90)
        boxes = faces(num_faces, height, width).numpy()
        image = {"file_name": str(path), "gt_boxes": boxes, "gt_ignore": np.zeros(num_faces, dtype=bool)}
        mapper, times = FaceDatasetMapper(cfg, is_train=True), []
        for _ in range(8 * repeats):  # it samples a scale each time
            begin = time.perf_counter()
            mapper(image)
            times.append(time.perf_counter() - begin)
    return times[1:]


def report(times, loading, info):
    total = statistics.median(sum(step.values()) for step in times)
    parts = {name: statistics.median(step.get(name, 0.0) for step in times) for name in times[0]}
    other = {"other": parts.pop("other")}
    rows = [
        [name, f"{1e3 * seconds:.2f}", f"{seconds / total:.2%}"]
        for name, seconds in (*parts.items(), *other.items(), ("training step", total))
    ]
    mean, slowest = statistics.mean(loading), max(loading)
    rows.append(["data loading (beside it)", f"{1e3 * mean:.2f}", f"{mean / total:.2%}"])
    return (
        f"Medians of {len(times)} steps on {on(info)}\n\n"
        + table(rows, ["part", "ms", "share"])
        + f"\n\nData loading is a mean over the sampled scales; the slowest took {1e3 * slowest:.1f} ms."
    )


if __name__ == "__main__":
    main()
