#!/usr/bin/env python
"""Times the ops against what a Detectron2 user would otherwise run, interleaved in one run, and draws the cost curves.

Cases (anchors x ground truths): W1 800 x 800 at stride 4 with 4 scales; W2-m the same at 1200 x 1200 with m faces; C1
800 x 1200 with 5 scales x 3 ratios; R1 proposals in no spatial order. Peers: Detectron2's label step (pairwise_iou,
Matcher, subsample_labels), torchvision's box_iou, the same IoU and maxima under torch.compile, and a group sampler
written with torch.topk. Each case has a process of its own, because glibc's heap adapts to what ran before. On the CPU
Detectron2 is timed twice, since up to half of its time is fresh memory: with the default heap, and with glibc told to
keep its memory. On a GPU times are CUDA events, and ours are also given as a captured graph.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from common import (
    benchmark_parser,
    checked,
    device_of,
    faces,
    record_of,
    summary_of,
    table,
    time_once,
    use_all_cores,
    write_record,
)
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, pairwise_iou

from gs_d2 import ops
from gs_d2.command_line import bad_input_ends

WIDER_SCALES, COCO_SCALES = (16, 32, 64, 128), (32, 64, 128, 256, 512)
NUM_PER_GROUP = 512
WARM_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "30000000000"}
SECONDS_PER_ENTRY, MAX_REPEATS = 2.0, 25


@bad_input_ends()
def main(argv: list[str] | None = None):
    parser = benchmark_parser(__doc__, quick="few repeats and no curves, to see that it runs")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="only these (default: all)")
    parser.add_argument("--only", default="", help="only entries whose name has this in it; prints JSON (internal)")
    args = parser.parse_args(argv)
    device = device_of(args.device) if args.only else checked(args)
    use_all_cores(device)
    names = args.cases or list(CASES)

    if args.only:
        print(json.dumps({name: measure(CASES[name](), device, args.quick, args.only) for name in names}))
        return
    results = {}
    for name in names:
        anchors, gts = CASES[name]()
        print(f"{name}: {len(anchors):,} x {len(gts):,}", flush=True)
        measured = in_own_process(name, args, only=": ")
        if device.type == "cpu":
            warm = in_own_process(name, args, only="Detectron2", environment=WARM_HEAP)
            measured |= {f"{who} (warm heap)": entry for who, entry in warm.items()}
        results[name] = {"num_anchors": len(anchors), "num_gts": len(gts), "entries": measured}
    curves = {} if args.quick else measure_curves(device)
    write_record(args.output, "ops", record_of(device, argv, cases=results, curves=curves), table_of(results))
    if curves:
        plot_curves(curves, Path(args.output) / "ops_cost.png")


# Cases


def grid(height, width, scales, ratios=(1.0,), stride=4):
    """Anchors in Detectron2's (row, column, anchor) order."""
    y, x = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
    centres = ((torch.stack([x, y], dim=-1) + 0.5) * stride).view(-1, 1, 2)
    half = torch.tensor([[s / r**0.5, s * r**0.5] for s in scales for r in ratios]) / 2
    return torch.cat([centres - half, centres + half], dim=-1).view(-1, 4)


CASES = {
    "W1": lambda: (grid(800, 800, WIDER_SCALES), faces(50, 800, 800)),
    "W2-10": lambda: (grid(1200, 1200, WIDER_SCALES), faces(10, 1200, 1200)),
    "W2-100": lambda: (grid(1200, 1200, WIDER_SCALES), faces(100, 1200, 1200)),
    "W2-1000": lambda: (grid(1200, 1200, WIDER_SCALES), faces(1000, 1200, 1200)),
    "C1": lambda: (grid(800, 1200, COCO_SCALES, (0.5, 1.0, 2.0)), faces(20, 800, 1200, 24, 512)),
    "R1-2k": lambda: (faces(2000, 800, 800, seed=1), faces(100, 800, 800)),
    "R1-50k": lambda: (faces(50000, 800, 800, seed=1), faces(100, 800, 800)),
}


# What is timed. An entry is "<group>: <who>"; ratios are within a group, against ours.


def entries(case, device):
    anchors, gts = (boxes.to(device) for boxes in case)
    n = len(anchors)
    groups = (torch.arange(n, device=device) * 4 // n) if n % 4 else torch.arange(n, device=device) % 4
    losses = torch.rand(n, generator=torch.Generator().manual_seed(2)).to(device) ** 4
    labels = ops.two_pass_match(gts, anchors).match_labels
    compiled = torch.compile(iou_and_maxima, dynamic=False)
    matcher = Matcher([0.4, 0.6], [0, -1, 1], allow_low_quality_matches=True)

    def detectron2_label_step():
        quality = pairwise_iou(Boxes(gts), Boxes(anchors))
        _, match_labels = matcher(quality)
        subsample_labels(match_labels, 4 * NUM_PER_GROUP, 0.25, 0)

    def group_subsample(method):
        return lambda: ops.group_subsample(
            labels,
            groups,
            num_groups=4,
            num_per_group=NUM_PER_GROUP,
            method=method,
            losses=None if method == "random" else losses,
            seed=1,
        )

    timed = {
        "match: gs_d2": lambda: ops.two_pass_match(gts, anchors),
        "match: Detectron2 label step": detectron2_label_step,
        "match: torch.compile IoU + maxima": lambda: compiled(gts, anchors),
        "box_iou: gs_d2": lambda: ops.box_iou(gts, anchors),
        "box_iou: torchvision": lambda: torchvision.ops.box_iou(gts, anchors),
    }
    for method in ("random", "wrs", "ohem"):
        timed[f"{method}: gs_d2"] = group_subsample(method)
        timed[f"{method}: torch"] = lambda method=method: torch_group_sampler(labels, groups, losses, method)
    return timed


def iou_and_maxima(gts, anchors):
    return torchvision.ops.box_iou(gts, anchors).max(dim=0)


def torch_group_sampler(labels, groups, losses, method):
    """Group sampling as one would write it: keys for all, then a top-k for each group and label."""
    if method == "ohem":
        keys = losses
    else:
        keys = torch.rand_like(losses).log_() / ((losses if method == "wrs" else 1.0) + 1e-6)
    sampled = torch.full_like(labels, -1)
    for group in range(4):
        drawn = 0
        for label, wanted in ((1, NUM_PER_GROUP // 4), (0, NUM_PER_GROUP)):
            members = torch.nonzero((labels == label) & (groups == group))[:, 0]
            count = min(len(members), wanted - drawn)
            sampled[members[keys[members].topk(count).indices]] = label
            drawn += count
    return sampled


# Measuring


def measure(case, device, quick, only):
    timed = {name: call for name, call in entries(case, device).items() if only in name}
    if device.type == "cuda":
        timed |= {f"{name} (graph)": captured(call) for name, call in list(timed.items()) if name.endswith("gs_d2")}
    budget = {}
    for name, call in timed.items():
        call()  # compiles, and fills caches
        budget[name] = time_once(call, device)
    times = {name: [] for name in timed}
    repeats = 2 if quick else MAX_REPEATS
    for turn in range(repeats):  # one of each in turn, so that a slow moment of the machine hits all alike
        for name, call in timed.items():
            if turn < 3 or turn * budget[name] < SECONDS_PER_ENTRY:
                times[name].append(time_once(call, device))
    return {
        name: {**summary_of(values), "extra_mib": extra_memory(timed[name], device)} for name, values in times.items()
    }


def captured(call):
    graph = torch.cuda.CUDAGraph()
    call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def extra_memory(call, device):
    """Peak memory of one call beyond what was there before and beyond its own results, in MiB; None if unknown."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return max(0.0, (peak - size_of(results)) / 2**20)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the heap kept would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = memory_status("VmRSS")
        results = call()
        return max(0.0, memory_status("VmHWM") - before - size_of(results) / 2**20)
    except (OSError, AttributeError):
        return None


def memory_status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


def size_of(results):
    if isinstance(results, torch.Tensor):
        return results.nbytes
    return sum(size_of(result) for result in results) if isinstance(results, tuple) else 0


def in_own_process(case, args, only, environment=None):
    """The measurements of one case by a fresh interpreter."""
    command = [sys.executable, __file__, "--device", args.device, "--cases", case, "--only", only]
    output = subprocess.run(
        command + (["--quick"] if args.quick else []),
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])[case]


def measure_curves(device):
    """Milliseconds of matching against m at 360,000 anchors, and against n at 100 faces."""
    print("Cost curves", flush=True)
    curves = {"gts": {}, "anchors": {}}
    settings = [("gts", m, 1200, m) for m in (1, 3, 10, 30, 100, 300, 1000)]
    settings += [("anchors", (side // 4) ** 2 * 4, side, 100) for side in (200, 400, 800, 1200, 1600)]
    for axis, at, side, count in settings:
        calls = entries((grid(side, side, WIDER_SCALES), faces(count, side, side)), device)
        for name in ("match: gs_d2", "match: Detectron2 label step"):
            calls[name]()
            values = [time_once(calls[name], device) for _ in range(3)]
            curves[axis].setdefault(name.removeprefix("match: "), []).append((at, 1e3 * statistics.median(values)))
    return curves


# Reporting


def table_of(results):
    rows = []
    for case, result in results.items():
        for name, entry in sorted(result["entries"].items(), key=lambda item: item[0].split(":")[0]):
            group, who = name.split(": ", 1)
            ours = result["entries"].get(f"{group}: gs_d2")
            ratio = entry["median_ms"] / ours["median_ms"] if ours else float("nan")
            faster = "" if who.startswith("gs_d2") else f"{ratio:.1f}x"
            extra = "" if entry["extra_mib"] is None else f"{entry['extra_mib']:.1f}"
            milliseconds = (f"{entry[key]:.3f}" for key in ("median_ms", "min_ms", "max_ms"))
            rows.append([case, group, who, *milliseconds, faster, extra])
    return table(rows, ["case", "what", "who", "median ms", "min", "max", "ours is faster by", "extra MiB"])


def plot_curves(curves, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="tight")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"gts": "ground-truth boxes (360,000 anchors)", "anchors": "anchors (100 ground-truth boxes)"}
    for axis, (name, series) in zip(axes, curves.items(), strict=True):
        for who, points in series.items():
            axis.loglog(*zip(*points, strict=True), marker="o", label=who)
        axis.set_xlabel(titles[name])
        axis.grid(True, which="both", alpha=0.2)
    axes[0].set_ylabel("ms")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
