"""sweep_samples.py: its commands are train_net.py's, it resumes, and it shows what is finished."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from PIL import Image
from sweep_samples import main

from gs_d2.analysis.sweep import read_results
from gs_d2.config import add_gs_config, check_config

ROOT = Path(__file__).resolve().parents[2]


def parse(command):
    """(arguments, config) as train_net.py has them."""
    args = default_argument_parser().parse_args(command[2:])
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    return args, cfg


def commands_of(script):
    return [shlex.split(line) for line in script.read_text().splitlines() if "train_net.py" in line]


def test_fig_6_is_fifteen_runs_that_parse(tmp_path, run_command):
    _, out, _ = run_command(main, "prepare", "--output", tmp_path, "--num-gpus", 8)
    assert "15 runs, 0 finished" in out
    commands = commands_of(tmp_path / "run.sh")
    seen = set()
    for command in commands:
        assert command[0] == sys.executable and os.path.isfile(command[1])
        args, cfg = parse(command)
        assert args.num_gpus == 8 and args.resume and not args.eval_only
        check_config(cfg)  # 256 is Detectron2's default, which is refused elsewhere
        assert cfg.MODEL.GS.KEEP_DEFAULTS == ["MODEL.RPN.BATCH_SIZE_PER_IMAGE"]
        assert cfg.TEST.EVAL_PERIOD == 0 and cfg.SEED == 1
        assert cfg.OUTPUT_DIR.startswith(str(tmp_path))
        name = os.path.basename(args.config_file)
        assert cfg.MODEL.GS.GROUP_SAMPLING == (name == "fpn_finest_sampling.yaml")
        seen.add((name, cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE, cfg.OUTPUT_DIR))
    assert len(seen) == 15 == len(commands)
    assert {(name, value) for name, value, _ in seen} == {
        (name, value)
        for name in ("fpn.yaml", "fpn_finest.yaml", "fpn_finest_sampling.yaml")
        for value in (256, 512, 1024, 2048, 4096)
    }
    assert len({output for *_, output in seen}) == 15


QUICK = ["--config-file", str(ROOT / "configs/quick/demo.yaml"), "--values", "32", "64", "--seeds", "3", "4"]


def test_what_can_be_overridden(tmp_path):
    output = tmp_path / "it's a sweep"
    opts = ["SOLVER.MAX_ITER", "5", "DATASETS.TEST", "('a', 'b')", "INPUT.GS.SCALES", "[0.5, 1.0]"]
    main(["prepare", *QUICK, "--output", str(output), "--", *opts])
    runs = [parse(command)[1] for command in commands_of(output / "run.sh")]
    assert [(cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE, cfg.SEED) for cfg in runs] == [(32, 3), (32, 4), (64, 3), (64, 4)]
    for cfg in runs:
        assert cfg.SOLVER.MAX_ITER == 5 and cfg.INPUT.GS.SCALES == [0.5, 1.0]
        assert cfg.OUTPUT_DIR == str(output / "demo" / f"n{cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE}_seed{cfg.SEED}")
    # Data sets are tested on in this order: with the results of the last a run is finished.
    assert "demo/n32_seed3/inference/b/results.json" in (output / "run.sh").read_text()


@pytest.fixture
def fake_training(tmp_path, monkeypatch):
    """Replaces train_net.py by a script that notes its output folder, writes results, and can be told to fail."""
    script = tmp_path / "train_net.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "output = pathlib.Path(sys.argv[sys.argv.index('OUTPUT_DIR') + 1])\n"
        f"with open({str(tmp_path / 'calls')!r}, 'a') as calls: print(output.name, file=calls)\n"
        f"if output.name == 'n64_seed3' and pathlib.Path({str(tmp_path / 'fail')!r}).exists(): sys.exit(3)\n"
        "folder = output / 'inference' / 'wider_face_val'\n"
        "folder.mkdir(parents=True)\n"
        "n, seed = map(int, output.name[1:].split('_seed'))\n"
        "(folder / 'results.json').write_text(json.dumps({'all': (n + seed) / 100}))\n"
    )
    monkeypatch.setattr("sweep_samples.TRAIN_NET", script)
    return lambda: (tmp_path / "calls").read_text().split()


def test_run_resumes(tmp_path, fake_training, capfd):
    command = ["prepare", *QUICK, "--output", str(tmp_path / "sweep"), "--run"]
    (tmp_path / "fail").touch()
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2 and "error: a run failed, its messages are above" in capfd.readouterr().err
    assert fake_training() == ["n32_seed3", "n32_seed4", "n64_seed3"]
    (tmp_path / "fail").unlink()
    capfd.readouterr()
    main(command)
    assert fake_training() == ["n32_seed3", "n32_seed4", "n64_seed3", "n64_seed3", "n64_seed4"]
    printed = capfd.readouterr().out
    assert "4 runs, 2 finished" in printed
    assert "[2/4] demo, N = 32, seed 4: finished" in printed
    assert "[3/4] demo, N = 64, seed 3\n" in printed

    main(["plot", "--input", str(tmp_path / "sweep")])
    assert "demo  35.50 ± 0.71 (2)  67.50 ± 0.71 (2)" in capfd.readouterr().out


def write_results(folder, ap, dataset="wider_face_val"):
    path = folder / "inference" / dataset / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"easy": 0.9, "all": ap}))
    return path


def test_plot(tmp_path, run_command):
    for name, value, seed, ap in (
        ("fpn", 2048, 1, 0.80),
        ("fpn", 256, 1, 0.82),
        ("fpn_finest_sampling", 256, 1, 0.80),
        ("fpn_finest_sampling", 256, 2, 0.81),
        ("fpn_finest_sampling", 256, 10, 0.82),
        ("fpn_finest_sampling", 1024, 1, 0.85),
    ):
        write_results(tmp_path / name / f"n{value}_seed{seed}", ap)
    write_results(tmp_path / "fpn" / "n512_seed1", 0.1, dataset="fddb")
    write_results(tmp_path / "fpn" / "n512_seed1_old", 0.1)
    found = read_results(tmp_path, "wider_face_val")
    assert {name: list(by_value) for name, by_value in found.items()} == {
        "fpn": [256, 2048],
        "fpn_finest_sampling": [256, 1024],
    }
    assert sorted(found["fpn_finest_sampling"][256]) == pytest.approx([80, 81, 82])

    status, out, _ = run_command(main, "plot", "--input", tmp_path)
    assert status == 0
    lines = out.splitlines()
    assert lines[1].split() == ["256", "1024", "2048"]
    assert lines[3].split() == ["fpn", "82.00", "-", "80.00"]
    assert lines[4].split() == ["fpn_finest_sampling", "81.00", "±", "1.00", "(3)", "85.00", "-"]
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.size[0] > image.size[1] > 100
        assert len(image.convert("RGB").getcolors(10**6)) > 10


def test_plot_without_results(tmp_path, run_command):
    def refused(message):
        status, _, err = run_command(main, "plot", "--input", tmp_path)
        assert status == 2 and re.search(f"error: .*{message}", err), err

    refused(r"No finished run in .*: there is no <config>/n<N>_seed")
    path = write_results(tmp_path / "fpn" / "n256_seed1", None)
    refused(r"results\.json: not the results of a WIDER FACE evaluation")
    path.write_text('{"all"')
    refused(r"results\.json: not the results of a WIDER FACE evaluation")
    assert not (tmp_path / "sweep.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--values", "256", "256"], "--values has one of 256, 256 twice"),
        (["--values", "0"], "--values must be at least 1"),
        (["--", "OUTPUT_DIR", "x"], r"OUTPUT_DIR, TEST.EVAL_PERIOD are set here, got \['OUTPUT_DIR'\]"),
        (["--", "SOLVER.MAX_ITERS", "3"], "Non-existent key: SOLVER.MAX_ITERS"),
        (["--", "SOLVER.MAX_ITER"], "has odd length"),
        (["--", "MODEL.RPN.NMS_THRESH", "0.7"], "MODEL.RPN.NMS_THRESH is Detectron2's default 0.7"),
        (["--config-file", "none.yaml"], "none.yaml"),
    ],
)
def test_what_cannot_be_prepared(tmp_path, run_command, arguments, message):
    status, _, err = run_command(main, "prepare", "--output", tmp_path, *arguments)
    assert status == 2 and re.search(message, err), err
    assert not (tmp_path / "run.sh").exists()


@pytest.mark.slow
def test_real_runs(tmp_path, drawn_datasets):
    """Two iterations each, at N = 256 too; the second start finds everything finished."""
    command = [sys.executable, str(ROOT / "tools" / "sweep_samples.py"), "prepare", "--run", "--config-file"]
    command += [str(ROOT / "configs" / "quick" / "demo.yaml"), "--values", "64", "256", "--output", str(tmp_path)]
    command += "-- SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0".split()
    environment = {**os.environ, "DETECTRON2_DATASETS": str(drawn_datasets), "OMP_NUM_THREADS": "1"}
    for finished in (0, 2):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        assert f"2 runs, {finished} finished" in result.stdout
        assert result.stdout.count(": finished") == finished
    assert list(read_results(tmp_path, "wider_face_val")["demo"]) == [64, 256]
