#!/usr/bin/env python
"""The paper's Fig. 6: average precision against N, the samples per group (per image without group sampling).

    tools/sweep_samples.py prepare --run --num-gpus 8
    tools/sweep_samples.py prepare --configs configs/quick/mini_wider.yaml --values 16 64 256 -- SOLVER.MAX_ITER 400
    tools/sweep_samples.py plot

`prepare` writes run.sh, one train_net.py command for each config, N and seed; it skips what is finished and goes on
with what is not, so it can be started again at any time. `plot` draws AP on all faces of whatever is finished.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from gs_d2.config import load_config  # isort: skip
from gs_d2.engine.checks import check_config  # isort: skip
from gs_d2.evaluation.report import format_table  # isort: skip


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [str(ROOT / f"configs/wider/{name}.yaml") for name in ("fpn", "fpn_finest", "fpn_finest_sampling")]
VALUES = (256, 512, 1024, 2048, 4096)
NUM_SAMPLES = "MODEL.RPN.BATCH_SIZE_PER_IMAGE"
OWN_KEYS = (NUM_SAMPLES, "SEED", "OUTPUT_DIR", "TEST.EVAL_PERIOD")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_parser = commands.add_parser("prepare", help="write the commands, and run them with --run")
    prepare_parser.add_argument("--configs", nargs="+", metavar="FILE", default=CONFIGS, help="default: Fig. 6's three")
    prepare_parser.add_argument("--values", nargs="+", type=int, metavar="N", default=VALUES, help="%(default)s")
    prepare_parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", default=[1], help="%(default)s")
    prepare_parser.add_argument("--num-gpus", type=int, default=1, help="as train_net.py's")
    prepare_parser.add_argument("--run", action="store_true", help="run what is not finished, one after another")
    prepare_parser.add_argument("opts", nargs="*", help="config overrides of every run, after --: KEY VALUE ...")
    plot_parser = commands.add_parser("plot", help="draw what is finished")
    plot_parser.add_argument("--dataset", default="wider_face_val", help="tested on; default: %(default)s")
    plot_parser.add_argument("--picture", help="default: sweep.png in the folder of the runs")
    for subparser in (prepare_parser, plot_parser):
        subparser.add_argument("--output", default="output/sweep_samples", help="folder of the runs: %(default)s")
    args = parser.parse_args(argv)
    try:
        if args.command == "prepare":
            runs = prepare(args.configs, args.values, args.seeds, args.output, args.opts, args.num_gpus)
            script = write_script(runs, Path(args.output))
            print(f"{len(runs)} runs, {sum(run['results'].is_file() for run in runs)} finished. Written: {script}")
            if args.run and subprocess.run(["sh", str(script)]).returncode != 0:
                raise ValueError("a run failed, its messages are above; the same command goes on from here")
        else:
            found = read_results(Path(args.output), args.dataset)
            print_table(found)
            picture = Path(args.picture or Path(args.output) / "sweep.png")
            picture.parent.mkdir(parents=True, exist_ok=True)
            plot(found, picture)
            print(f"Written: {picture}")
    except (OSError, KeyError, ValueError, AssertionError) as error:
        sys.exit(f"sweep_samples: {' '.join(str(error).split())}")


def prepare(configs, values, seeds, output, opts=(), num_gpus=1) -> list[dict]:
    """The runs: `title`, `command` (list of words for train_net.py) and `results` (a file; there once it is finished).

    Raises:
        ValueError: a config that train_net.py would refuse, or nothing that tells two runs apart.
    """
    names = [Path(config).stem for config in configs]
    for what, items in (("--configs", names), ("--values", values), ("--seeds", seeds)):
        if len(set(items)) < len(items):
            raise ValueError(f"{what} has one of {', '.join(map(str, items))} twice")
    own = [key for key in opts[::2] if key in OWN_KEYS]
    if own or min(values) < 1 or min(seeds) < 0:
        raise ValueError(
            f"--values must be at least 1 and --seeds at least 0, got {list(values)} and {list(seeds)}; "
            f"{', '.join(OWN_KEYS)} are set here, got {own or 'none of them'} as overrides"
        )
    runs = []
    for config, name in zip(configs, names, strict=True):
        base = load_config(config, opts)
        kept = sorted({*base.MODEL.GS.KEEP_DEFAULTS, NUM_SAMPLES})  # N = 256 is Detectron2's default
        for num_samples in values:
            for seed in seeds:
                folder = Path(output).resolve() / name / f"n{num_samples}_seed{seed}"
                # A single evaluation, at the end: its results then say that the run is finished.
                own = [NUM_SAMPLES, num_samples, "SEED", seed, "OUTPUT_DIR", folder, "TEST.EVAL_PERIOD", 0]
                overrides = [*opts, *map(str, own), "MODEL.GS.KEEP_DEFAULTS", str(kept)]
                check_config(load_config(config, overrides))
                runs.append(
                    {
                        "title": f"{name}, N = {num_samples}, seed {seed}",
                        "command": [
                            *(sys.executable, str(ROOT / "train_net.py"), "--resume", "--num-gpus", str(num_gpus)),
                            *("--config-file", str(Path(config).resolve()), *overrides),
                        ],
                        "results": folder / "inference" / base.DATASETS.TEST[-1] / "results.json",
                    }
                )
    return runs


def write_script(runs, output: Path) -> Path:
    """run.sh: stops at the first run that fails, and skips those that are finished."""
    lines = ["#!/bin/sh", "set -e"]
    for number, run in enumerate(runs, 1):
        title = shlex.quote(f"[{number}/{len(runs)}] {run['title']}")
        lines += [
            f"if [ -s {shlex.quote(str(run['results']))} ]; then echo {title}: finished; else",
            f"  echo {title}",
            f"  {shlex.join(run['command'])}",
            "fi",
        ]
    output.mkdir(parents=True, exist_ok=True)
    script = output / "run.sh"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return script


def read_results(output: Path, dataset: str) -> dict[str, dict[int, list[float]]]:
    """AP on all faces, percent: {"fpn": {256: [one for each seed], ...}, ...}, ascending in N.

    Raises:
        ValueError: no run is finished, or a file is not what an evaluation writes.
    """
    found = defaultdict(lambda: defaultdict(list))
    for path in sorted(output.glob(f"*/n*_seed*/inference/{dataset}/results.json")):
        folder = path.parents[2]
        num_samples, _, seed = folder.name[1:].partition("_seed")
        if not (num_samples.isdecimal() and seed.isdecimal()):
            continue
        try:
            ap = 100 * float(json.loads(path.read_text(encoding="utf-8"))["all"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the results of a WIDER FACE evaluation ({error!r})") from error
        found[folder.parent.name][int(num_samples)].append(ap)
    if not found:
        raise ValueError(
            f"No finished run in {output}: there is no <config>/n<N>_seed<seed>/inference/{dataset}/results.json. "
            "Start the runs with: tools/sweep_samples.py prepare --run"
        )
    return {name: dict(sorted(by_value.items())) for name, by_value in sorted(found.items())}


def spread(values) -> float:
    """Standard deviation over seeds; NaN for a single one."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def print_table(found):
    columns = sorted({value for by_value in found.values() for value in by_value})
    rows = []
    for name, by_value in found.items():
        rows.append([name])
        for aps in (by_value.get(value, []) for value in columns):
            mean = f"{statistics.fmean(aps):.2f}" if aps else "-"
            rows[-1].append(f"{mean} ± {spread(aps):.2f} ({len(aps)})" if len(aps) > 1 else mean)
    print("AP on all faces, percent, by N: mean ± standard deviation (seeds)")
    print(format_table(["", *map(str, columns)], rows))


def plot(found, picture):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.8))
    for name, by_value in found.items():
        means = [statistics.fmean(aps) for aps in by_value.values()]
        errors = [0 if math.isnan(spread(aps)) else spread(aps) for aps in by_value.values()]
        axis.errorbar(list(by_value), means, errors if any(errors) else None, marker="o", capsize=3, label=name)
    columns = sorted({value for by_value in found.values() for value in by_value})
    axis.set_xscale("log", base=2)
    axis.set_xticks(columns, [str(value) for value in columns])
    axis.minorticks_off()
    axis.set_xlabel("N, samples per group (per image without group sampling)")
    axis.set_ylabel("AP on all faces (%)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
