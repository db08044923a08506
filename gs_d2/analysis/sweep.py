"""Runs of configs that differ in N, the samples per group: their commands, and the AP of those that are finished."""

import json
import math
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from gs_d2.config import check_config, load_config

NUM_SAMPLES = "MODEL.RPN.BATCH_SIZE_PER_IMAGE"
OWN_KEYS = (NUM_SAMPLES, "SEED", "OUTPUT_DIR", "TEST.EVAL_PERIOD")


def prepare(train_net, config_files, values, seeds, output, opts=(), num_gpus=1) -> list[dict]:
    """The runs: `title`, `command` (list of words) and `results` (a file, which is there once the run is finished).

    Args:
        train_net: path of train_net.py.
        config_files, values, seeds: of the configs, their N and their seeds; each with each is a run.
        output: folder that all runs write into.
        opts: config overrides of every run.

    Raises:
        ValueError: a config that train_net.py would refuse, or nothing that tells two runs apart.
    """
    names = [Path(config).stem for config in config_files]
    for what, items in (("--config-file", names), ("--values", values), ("--seeds", seeds)):
        if len(set(items)) < len(items):
            raise ValueError(f"{what} has one of {', '.join(map(str, items))} twice")
    own = [key for key in opts[::2] if key in OWN_KEYS]
    if own or min(values) < 1 or min(seeds) < 0:
        raise ValueError(
            f"--values must be at least 1 and --seeds at least 0, got {list(values)} and {list(seeds)}; "
            f"{', '.join(OWN_KEYS)} are set here, got {own or 'none of them'} as overrides"
        )
    runs = []
    for config, name in zip(config_files, names, strict=True):
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
                            *(sys.executable, str(train_net), "--resume", "--num-gpus", str(num_gpus)),
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
