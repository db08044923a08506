"""What the benchmarks share: clocks, the machine, a model and an image at random, and results as files."""

import argparse
import contextlib
import functools
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

import gs_d2.modeling.group_loss
from gs_d2.collect_env import cpu_name
from gs_d2.command_line import folder_for, parser_of
from gs_d2.formats.json_text import json_text
from gs_d2.formats.whole_file import write_text
from gs_d2.modeling import GroupSampler, TwoPassMatcher
from gs_d2.modeling.group_loss import GroupLoss

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LEARNING_RATE = 1e-6  # random weights stay where they are
table = functools.partial(tabulate, tablefmt="github", disable_numparse=True)


# The command line and what is written


def benchmark_parser(text: str, quick: str) -> argparse.ArgumentParser:
    """--output, --device and --quick, which `quick` explains."""
    parser = parser_of(text)
    parser.add_argument("--output", default="output/bench", help="folder for the results as .json and .md")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def checked(args: argparse.Namespace) -> torch.device:
    """The device of :func:`benchmark_parser`'s --device, after a look at --output too.

    Raises:
        ValueError: one of them cannot be used; names it.
    """
    folder_for("--output", args.output)
    return device_of(args.device)


def device_of(name: str) -> torch.device:
    """Raises ValueError, naming --device, unless torch can compute there."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no reason"])[0]
        raise ValueError(f"--device {name!r} cannot be used ({reason}): name cpu, cuda or cuda:0") from error
    return device


def check_least(least: int, **counts: int):
    """Raises ValueError for the first of the flags' numbers that is below the least."""
    for flag, count in counts.items():
        if count < least:
            raise ValueError(f"--{flag} must be at least {least}, got {count}")


def use_all_cores(device: torch.device):
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count())


def record_of(device: torch.device, argv=None, **results) -> dict:
    """Results with the machine and the command that they are of."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *(sys.argv[1:] if argv is None else argv)]
    return {"machine": machine(device), "command": " ".join(words), **results}


def write_record(folder: str, name: str, record: dict, tables: str):
    """Prints the tables under a line that says where they were measured, and writes record and text into the folder."""
    text = f"Measured {record['machine']['date']} on {on(record['machine'])}: `{record['command']}`\n\n{tables}\n"
    write_text(Path(folder) / f"{name}.json", json_text(record, indent=1) + "\n")
    write_text(Path(folder) / f"{name}.md", text)
    print(f"{text}\nWritten: {folder}/{name}.json, {name}.md")


def machine(device: torch.device) -> dict:
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }


def on(machine: dict) -> str:
    return f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"


# Clocks


def time_once(call, device: torch.device) -> float:
    """Seconds of one call: of its kernels on a GPU, and by the wall clock on a CPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def summary_of(seconds: list[float]) -> dict:
    """Of the repeats of one entry, in milliseconds."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
        "repeats": len(seconds),
    }


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


# What is timed


def faces(count, height, width, low=8, high=128, seed=0):
    """Square-ish boxes, log-uniform in scale, as crowds have them."""
    generator = torch.Generator().manual_seed(seed)
    scale = low * (high / low) ** torch.rand(count, 1, generator=generator)
    aspect = 0.8 + 0.5 * torch.rand(count, 1, generator=generator)
    half = torch.cat([scale / aspect.sqrt(), scale * aspect.sqrt()], dim=1) / 2
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    return torch.cat([centres - half, centres + half], dim=1)


def random_input(size, num_faces):
    """One image, as a detector takes it in training and at test."""
    height, width = size
    instances = Instances(size)
    instances.gt_boxes = Boxes(faces(num_faces, height, width))
    instances.gt_boxes.clip(size)
    instances.gt_classes = torch.zeros(num_faces, dtype=torch.int64)
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return [{"image": image, "instances": instances, "height": height, "width": width}]


def random_model(cfg):
    """A model of random weights whose activations neither overflow nor become denormal."""
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):  # never trained it normalises nothing
            module.weight.fill_(0.5)
    return model


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
