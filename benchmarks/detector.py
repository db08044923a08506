#!/usr/bin/env python
"""Times a training step and inference of FPN-finest-sampling against Detectron2's own network, interleaved in one run.

Both have a ResNet-50 of random weights, the four square anchor scales 16..128 on P2 at stride 4, and one image of 800 x
800 with 100 faces; at test 50,000 boxes go into an NMS at 0.5, of which 2,000 are kept. Detectron2's is its
ProposalNetwork with FPN, whose label step takes as many samples in all (8,192). Ours is timed in float32 without and
with channels-last convolutions (MODEL.GS.CHANNELS_LAST), and with those in bfloat16 (MODEL.GS.AUTOCAST_DTYPE). A
training step is forward, backward and SGD's update; Detectron2's also makes proposals then, as it always does. At test
our BatchNorm is folded, as `--eval-only` and FaceDetector do it (gs_d2.modeling.fuse). `--compile` adds
MODEL.GS.COMPILE, and Detectron2's network under torch.compile, each compiled before it is timed. A second table gives
the parts of what is not compiled. CPU time is that of all threads, which other work on the machine changes less.
"""

import copy
import functools
import statistics
import time

import torch
from common import (
    CONFIGS,
    LEARNING_RATE,
    Stopwatch,
    benchmark_parser,
    check_least,
    checked,
    parts_of,
    random_input,
    random_model,
    record_of,
    summary_of,
    table,
    time_once,
    train_step,
    use_all_cores,
    write_record,
)
from detectron2.config import get_cfg
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from gs_d2.command_line import bad_input_ends
from gs_d2.config import load_config
from gs_d2.modeling import fuse

CONFIG = CONFIGS / "wider" / "fpn_finest_sampling.yaml"
STOCK = "Detectron2"
OURS = {
    "gs_d2, contiguous": ["MODEL.GS.CHANNELS_LAST", False],
    "gs_d2, channels-last": ["MODEL.GS.CHANNELS_LAST", True],
    "gs_d2, channels-last, bfloat16": ["MODEL.GS.CHANNELS_LAST", True, "MODEL.GS.AUTOCAST_DTYPE", "bfloat16"],
}
COMPILED = "gs_d2, channels-last, compiled"
COMPILED_STOCK = "Detectron2, compiled"
QUICK = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
PART_COLUMNS = ("backbone", "head", "labelling", "losses", "backward", "optimizer", "proposals", "other")


@bad_input_ends()
def main(argv: list[str] | None = None):
    parser = benchmark_parser(__doc__, quick="a ResNet-18 on a small image, once, to see that it runs")
    parser.add_argument("--repeats", type=int, default=5, help="of each entry, after one call that is not timed")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well; compiling takes minutes")
    args = parser.parse_args(argv)
    check_least(1, repeats=args.repeats)
    device = checked(args)
    if not args.quick:
        use_all_cores(device)
    size, num_faces, repeats = ((128, 128), 10, 1) if args.quick else ((800, 800), 100, args.repeats)

    calls, parts = entries(args.device, random_input(size, num_faces), QUICK if args.quick else [], args.compile)
    with EventStorage():
        results = measure(calls, device, repeats)
        shares = {name: measure_parts(calls[name], parts[name], device, repeats) for name in parts}
    record = record_of(device, argv, size=size, num_faces=num_faces, entries=results, parts_ms=shares)
    write_record(args.output, "detector", record, tables_of(record))


# What is timed. An entry is "<what>: <who>"; ratios are within a what, against Detectron2's.


def entries(device, inputs, opts, compiled):
    """By name the calls, each of which takes a Stopwatch, and the methods that their parts are."""
    calls, parts = {}, {}
    configs = {STOCK: stock_config()} | {who: load_config(CONFIG, settings) for who, settings in OURS.items()}
    if compiled:
        settings = ["MODEL.GS.CHANNELS_LAST", True, "MODEL.GS.COMPILE", True]
        configs |= {COMPILED_STOCK: stock_config(), COMPILED: load_config(CONFIG, settings)}
    for who, cfg in configs.items():
        cfg.merge_from_list(["MODEL.DEVICE", device, *opts])
        cfg.SOLVER.BASE_LR = LEARNING_RATE
        is_stock = who in (STOCK, COMPILED_STOCK)
        model = random_model(cfg)
        tested = model if is_stock else fuse(copy.deepcopy(model))
        for part in (model.backbone, model.proposal_generator.rpn_head) if who == COMPILED_STOCK else ():
            part.compile(dynamic=True)
        for part in (tested.backbone, tested.proposal_generator.rpn_head) if who == COMPILED else ():
            part.compile(dynamic=True)  # a copy is not compiled
        train_name, test_name = f"training step: {who}", f"inference: {who}"
        calls[train_name] = functools.partial(train, model, build_optimizer(cfg, model), inputs)
        calls[test_name] = functools.partial(infer, tested, inputs)
        if who not in (COMPILED, COMPILED_STOCK):
            of = stock_parts_of if is_stock else parts_of
            parts |= {train_name: of(model), test_name: of(tested)}
    return calls, parts


def stock_config():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32, 64, 128]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    cfg.MODEL.RPN.IN_FEATURES = ["p2"]
    cfg.MODEL.RPN.IOU_THRESHOLDS = [0.4, 0.6]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 4 * 2048
    cfg.MODEL.RPN.POSITIVE_FRACTION = 0.25
    cfg.MODEL.RPN.NMS_THRESH = 0.5
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50000
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 2000
    return cfg


def stock_parts_of(model):
    rpn = model.proposal_generator
    return {
        (model.backbone, "forward"): "backbone",
        (rpn.rpn_head, "forward"): "head",
        (rpn.anchor_generator, "forward"): "labelling",
        (rpn, "label_and_sample_anchors"): "labelling",
        (rpn, "losses"): "losses",
        (rpn, "predict_proposals"): "proposals",
    }


def train(model, optimizer, inputs, stopwatch):
    train_step(model.train(), optimizer, inputs, stopwatch)


@torch.no_grad()
def infer(model, inputs, stopwatch):
    model.eval()(inputs)


# Measuring


def measure(calls, device, repeats):
    times = {name: [] for name in calls}
    unread = Stopwatch("cpu")  # no waiting for a GPU within a call
    # One of each in turn, so that a slow moment of the machine hits all alike.
    for turn in tqdm(range(1 + repeats), desc="turns", unit="turn"):
        for name, call in calls.items():
            cpu_begin = time.process_time()
            seconds = time_once(lambda call=call: call(unread), device)
            if turn > 0:
                times[name].append((seconds, time.process_time() - cpu_begin))
    return {
        name: {**summary_of(wall), "cpu_ms": 1e3 * statistics.median(cpu)}
        for name, (wall, cpu) in ((name, zip(*pairs, strict=True)) for name, pairs in times.items())
    }


def measure_parts(call, parts, device, repeats):
    """Median milliseconds of each part, on a GPU with a wait at each of its ends."""
    runs = []
    for _ in range(min(repeats, 3)):
        stopwatch = Stopwatch(device)
        with stopwatch.methods(parts), stopwatch.part("other"):
            call(stopwatch)
        stopwatch.seconds["labelling"] += stopwatch.seconds.pop("sampling", 0.0)
        runs.append(stopwatch.seconds)
    return {name: 1e3 * statistics.median(run[name] for run in runs) for name in PART_COLUMNS}


# Reporting


def tables_of(record):
    times, parts = [], []
    for name in sorted(record["entries"], key=lambda name: name.startswith("inference")):
        what, who = name.split(": ", 1)
        entry, stock = record["entries"][name], record["entries"][f"{what}: {STOCK}"]
        milliseconds = [f"{entry[key]:.0f}" for key in ("median_ms", "min_ms", "max_ms", "cpu_ms")]
        ratios = [f"{stock[key] / entry[key]:.2f}x" if who != STOCK else "" for key in ("median_ms", "cpu_ms")]
        times.append([what, who, *milliseconds, *ratios])
        if name in record["parts_ms"]:
            parts.append([what, who, *(f"{record['parts_ms'][name][part]:.1f}" for part in PART_COLUMNS)])
    return (
        table(times, ["what", "who", "median ms", "min", "max", "CPU ms", "faster by", "by CPU time"])
        + '\n\nParts in ms ("labelling" is anchors, matching and sampling):\n\n'
        + table(parts, ["what", "who", *PART_COLUMNS])
    )


if __name__ == "__main__":
    main()
