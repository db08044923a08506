#!/usr/bin/env python
"""The paper's Fig. 6: average precision against N, the samples per group (per image without group sampling).

    tools/sweep_samples.py prepare --run --num-gpus 8
    tools/sweep_samples.py prepare --config-file configs/quick/mini_wider.yaml --values 16 64 -- SOLVER.MAX_ITER 400
    tools/sweep_samples.py plot

`prepare` writes run.sh, one train_net.py command for each config, N and seed; it skips what is finished and continues
with what is not, so it can be started again at any time. `plot` shows AP on all faces of whatever is finished.
"""

import math
import statistics
import subprocess
from pathlib import Path

from matplotlib.figure import Figure

from gs_d2 import model_zoo
from gs_d2.analysis.sweep import prepare, read_results, spread, write_script
from gs_d2.command_line import bad_input_ends, folder_for, parser_of, picture_for
from gs_d2.evaluation.report import format_table

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"
FIG_6 = ("wider/fpn.yaml", "wider/fpn_finest.yaml", "wider/fpn_finest_sampling.yaml")
VALUES = (256, 512, 1024, 2048, 4096)
RUNS = "output/sweep_samples"


@bad_input_ends()
def main(argv=None):
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="write the commands, and run them with --run")
    preparing.add_argument("--config-file", nargs="+", metavar="FILE", help="default: Fig. 6's three")
    preparing.add_argument("--values", nargs="+", type=int, metavar="N", default=VALUES, help="default: %(default)s")
    preparing.add_argument("--seeds", nargs="+", type=int, metavar="SEED", default=[1], help="default: %(default)s")
    preparing.add_argument("--num-gpus", type=int, default=1, help="as train_net.py's")
    preparing.add_argument("--output", default=RUNS, help="folder of the runs (default: %(default)s)")
    preparing.add_argument("--run", action="store_true", help="run what is not finished, one after another")
    preparing.add_argument("opts", nargs="*", help="config overrides of every run, after --: KEY VALUE ...")
    plotting = commands.add_parser("plot", help="show what is finished")
    plotting.add_argument("--input", default=RUNS, help="folder of the runs (default: %(default)s)")
    plotting.add_argument("--output", help="picture to write (default: sweep.png in the folder of the runs)")
    plotting.add_argument("--dataset", default="wider_face_val", help="tested on (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        if args.num_gpus < 0:
            parser.error("--num-gpus must be at least 0")
        configs = args.config_file or [model_zoo.get_config_file(name) for name in FIG_6]
        runs = prepare(TRAIN_NET, configs, args.values, args.seeds, args.output, args.opts, args.num_gpus)
        script = write_script(runs, folder_for("--output", args.output))
        print(f"{len(runs)} runs, {sum(run['results'].is_file() for run in runs)} finished. Written: {script}")
        if args.run and subprocess.run(["sh", str(script)]).returncode != 0:
            raise ValueError("a run failed, its messages are above; the same command continues from here")
    else:
        found = read_results(Path(args.input), args.dataset)
        print_table(found)
        picture = picture_for("--output", args.output or Path(args.input) / "sweep.png")
        plot(found, picture)
        print(f"Written: {picture}")


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
    figure = Figure(figsize=(5.2, 3.8), layout="tight")
    axis = figure.subplots()
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
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main()
