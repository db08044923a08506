#!/usr/bin/env python
"""Where the time of a training step goes, by part: for anyone who wants to make one faster.

    tools/profile_step.py --config-file configs/wider/fpn_finest_sampling.yaml
    tools/profile_step.py --config-file configs/quick/demo.yaml --size 256 256 --faces 20 MODEL.GS.CHANNELS_LAST False

One image of random pixels and random weights: times depend on neither. A part's time is its own, without the parts that
it calls; "other" is what no part claims. Data loading reads and augments a crowd image of WIDER FACE's size as the
config says; in training, worker processes do that beside the step, so it is no part of the total.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the tools beside this one

from benchmark_ops import faces, machine
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

import gs_d2.modeling.group_loss
from gs_d2.config import load_config
from gs_d2.data import FaceDatasetMapper
from gs_d2.modeling import GroupSampler, TwoPassMatcher
from gs_d2.modeling.group_loss import GroupLoss

FILE_SIZE = (1024, 768)  # width and height of WIDER FACE's images, most of which are 1024 wide


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--faces", type=int, default=100, help="in the image (default: 100)")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 800), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=7, help="steps whose median is given, after one that is not timed")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.config_file, ["MODEL.DEVICE", args.device, *args.opts])
    except (OSError, KeyError, ValueError, AssertionError) as error:
        print(f"profile_step: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    times = profile_steps(cfg, tuple(args.size), args.faces, args.steps)
    loading = profile_loading(cfg, args.faces, args.steps)
    print(report(times, loading, machine(torch.device(cfg.MODEL.DEVICE))))
    return 0


class Stopwatch:
    """Time by part: what runs within a part that is itself within another counts for the inner one only."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.seconds = defaultdict(float)
        self._running = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name):
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    @contextlib.contextmanager
    def methods(self, parts):
        """Within this context the methods (owner, name) count for the part that `parts` gives them."""
        with contextlib.ExitStack() as stack:
            for (owner, name), part in parts.items():
                stack.enter_context(self._method(owner, name, part))
            yield

    @contextlib.contextmanager
    def _method(self, owner, name, part):
        had_own, original = name in vars(owner), getattr(owner, name)

        def timed(*args, **kwargs):
            with self.part(part):
                return original(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original) if had_own else delattr(owner, name)

    def _switch(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def parts_of(model):
    """The methods of one of our detectors, and the part that each is."""
    rpn = model.proposal_generator
    return {
        (model.backbone, "forward"): "backbone",
        (rpn.rpn_head, "forward"): "head",
        (rpn, "losses"): "losses",
        (rpn, "_decode"): "proposals",
        (rpn, "_select"): "proposals",
        (model, "select_detections"): "proposals",
        (rpn.anchor_generator, "forward"): "labelling",
        (TwoPassMatcher, "match_images"): "labelling",
        (GroupLoss, "group"): "labelling",
        (GroupSampler, "__call__"): "sampling",
        (gs_d2.modeling.group_loss, "prune_overlapping"): "sampling",
    } | ({(model.roi_heads, "forward"): "second stage"} if hasattr(model, "roi_heads") else {})


def random_model(cfg):
    """A model of random weights whose activations neither overflow nor become denormal."""
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):  # never trained it normalises nothing
            module.weight.fill_(0.5)
    return model


def random_input(size, num_faces):
    """One image, as a detector takes it in training and at test."""
    height, width = size
    instances = Instances(size)
    instances.gt_boxes = Boxes(faces(num_faces, height, width))
    instances.gt_boxes.clip(size)
    instances.gt_classes = torch.zeros(num_faces, dtype=torch.int64)
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return [{"image": image, "instances": instances, "height": height, "width": width}]


def train_step(model, optimizer, inputs, stopwatch):
    """One step as Detectron2's trainer makes it, of which `stopwatch` times the last two parts."""
    losses = sum(model(inputs).values())
    with stopwatch.part("backward"):
        optimizer.zero_grad()
        losses.backward()
    with stopwatch.part("optimizer"):
        optimizer.step()
    if not torch.isfinite(losses):
        raise FloatingPointError("the loss is not finite, and times of NaN are not those of numbers")


def profile_steps(cfg, size, num_faces, steps):
    """Seconds of each part in each of `steps` training steps."""
    model = random_model(cfg).train()
    cfg.SOLVER.BASE_LR = 1e-6  # random weights stay where they are
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
        for _ in range(8 * repeats):  # it draws a scale each time
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
        f"Medians of {len(times)} steps on {info['device']}, {info['threads']} threads, torch {info['torch']}\n\n"
        + tabulate(rows, ["part", "ms", "share"], tablefmt="github", disable_numparse=True)
        + f"\n\nData loading is a mean over the scales drawn; the slowest took {1e3 * slowest:.1f} ms."
    )


if __name__ == "__main__":
    sys.exit(main())
