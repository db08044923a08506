#!/usr/bin/env python
"""Multiply-adds and parameters of our models, beside the paper's (Tables 10, 11 and 15).

    tools/analyze_model.py
    tools/analyze_model.py --config-file configs/wider/fpn.yaml --size 1080 1920 MODEL.FPN.OUT_CHANNELS 128

gs_d2/analysis/complexity.py says what is counted and what is not. Exit code 1 where a metric of the paper is missed by
more than 0.5 %, or an operation was not counted; 2 where a model cannot be analysed.
"""

import argparse
import sys
from pathlib import Path

from gs_d2 import model_zoo
from gs_d2.analysis.complexity import AT_OUTPUT, Complexity, analyze
from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.config import load_config

TOLERANCE = 0.005
PAPER_SIZE = (800, 800)
UNITS = {"flop": "G", "parameter": "M"}

# (table, its row, our config, what the paper prints: G multiply-adds and M parameters)
PAPER = [
    ("10", "CenterNet (R18)", "pipelines/centernet.yaml", {AT_OUTPUT: 98.61}),
    ("10", "FPN-finest-sampling (R18)", "wider/fpn_finest_sampling_r18.yaml", {"total": 29.73}),
    ("11", "FPN", "wider/fpn.yaml", {"feature extraction": 52.42, "RPN head": 36.50, "total": 88.92}),
    (
        "11",
        "FPN-finest-sampling",
        "wider/fpn_finest_sampling.yaml",
        {"feature extraction": 52.42, "RPN head": 28.91, "total": 81.33},
    ),
    ("15", "Ours(R18)", "wider/fpn_finest_sampling_r18.yaml", {"total": 29.8, "parameters": 12.5}),
    ("15", "Ours(R50)", "wider/fpn_finest_sampling.yaml", {"total": 81.3, "parameters": 27.1}),
    ("15", "Ours(R152)", "wider/fpn_finest_sampling_r152.yaml", {"total": 155.7, "parameters": 61.7}),
]


@bad_input_ends()
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--config-file", metavar="FILE", help="a config to analyse; without it, the paper's tables")
    parser.add_argument("--tasks", nargs="+", choices=UNITS, default=list(UNITS), help="default: both")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the image, in pixels (default: 800 800)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args(argv)
    if args.config_file is None and (args.size or args.opts):
        parser.error("--size and config overrides need --config-file: the paper's tables are of its own settings")
    if args.config_file is None:
        problems = print_paper(args.tasks)
    else:
        problems = print_one(args.config_file, tuple(args.size or PAPER_SIZE), args.opts, args.tasks)
    for problem in problems:
        print(f"analyze_model: {problem}", file=sys.stderr)
    return int(bool(problems))


def task_of(metric: str) -> str:
    return "parameter" if metric == "parameters" else "flop"


def print_paper(tasks) -> list[str]:
    print(f"{'table':7}{'row':27}{'':20}{'paper':>8}{'ours':>12}{'difference':>13}")
    analysed, problems = {}, []
    for table, row, name, paper in PAPER:
        if name not in analysed:
            analysed[name] = analyze(model_zoo.get_config(name), PAPER_SIZE)
            problems += complaints(analysed[name], name)
        for metric, expected in paper.items():
            if task_of(metric) not in tasks:
                continue
            ours, unit = analysed[name].metrics[metric], UNITS[task_of(metric)]
            difference = ours / expected - 1
            print(f"{table:7}{row:27}{metric:20}{expected:8g} {unit}{ours:10.2f} {unit}{difference:+11.2%}")
            if abs(difference) > TOLERANCE:
                problems.append(f"table {table}, {row}: {metric} is not the paper's, to within {TOLERANCE:.1%}")
    print_units(PAPER_SIZE)
    for name, found in analysed.items():
        print_transposed(found, f"{Path(name).stem}: ")
    fc = ", ".join(f"{Path(name).stem} {x.fc_parameters / 1e6:.3f} M" for name, x in analysed.items())
    print(f"Parameters include the unused ImageNet fc layer: {fc}.")
    return problems


def print_one(config_file: str, size: tuple[int, int], opts: list[str], tasks) -> list[str]:
    found = analyze(load_config(config_file, opts), size)
    for metric, value in found.metrics.items():
        if task_of(metric) in tasks:
            print(f"{metric:20}{value:10.2f} {UNITS[task_of(metric)]}")
    print_units(found.size)
    print_transposed(found)
    if found.fc_parameters:
        print(f"Parameters include the unused ImageNet fc layer: {found.fc_parameters / 1e6:.3f} M.")
    return complaints(found, config_file)


def print_units(size):
    print(f"G: 10^9 multiply-adds at {size[0]} x {size[1]} (height x width); M: 10^6 parameters.")


def print_transposed(found: Complexity, name: str = ""):
    if AT_OUTPUT in found.metrics:
        at_input, at_output = found.metrics["total"], found.metrics[AT_OUTPUT]
        print(
            f"{name}{at_output:.2f} G where transposed convolutions are counted at the size of their output, as by the "
            f"paper's tool; {at_input:.2f} G at that of their input, where they multiply."
        )


def complaints(found: Complexity, name) -> list[str]:
    ops = ", ".join(f"{op} ({times} times)" for op, times in sorted(found.not_counted.items()))
    return [f"{name}: too low, for nothing counts {ops}"] if ops else []


if __name__ == "__main__":
    sys.exit(main())
