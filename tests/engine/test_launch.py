"""How processes start: train_net.py under a real torchrun, and what is refused before anything starts."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, SMALL, Processes, assert_same_bits, final, train

from gs_d2 import compat
from gs_d2.engine import launch

# train_net.py, where in iteration 3 the second process dies by kill -9, the first time.
DYING = f"""
import os, runpy, signal, sys
from gs_d2.engine import AccumulatingTrainer
run_step = AccumulatingTrainer.run_step
def dying(self):
    if self.iter == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    run_step(self)
AccumulatingTrainer.run_step = dying
runpy.run_path({str(ROOT / "train_net.py")!r}, run_name="__main__")
"""
OPTS = ("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4,), "SOLVER.CHECKPOINT_PERIOD", 2)


@pytest.mark.slow
def test_torchrun_trains_evaluates_and_survives_the_loss_of_a_process(drawn_datasets, tmp_path):
    """The weights are those of two processes that nothing happened to; rates scale to the two."""
    (tmp_path / "dying.py").write_text(DYING)
    # For one process: 12 iterations of one image at half the rate, which two processes make 6 of two.
    scaled = ("SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.BASE_LR", 0.005)
    scaled += ("SOLVER.MAX_ITER", 12, "SOLVER.STEPS", (8,), "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.WARMUP_ITERS", 4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", "1", str(tmp_path / "dying.py"), "--config-file", "configs/quick/demo.yaml"]
    command += ["--resume", *SMALL, *map(str, scaled), "OUTPUT_DIR", str(tmp_path / "output")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "DETECTRON2_DATASETS": str(drawn_datasets), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    printed = result.stdout + result.stderr
    assert result.returncode == 0, printed[-5000:]
    assert re.findall(r"Starting training from iteration (\d+)", printed) == ["0", "2"]
    assert "exitcode: -9" in printed and "batch_size=2, learning_rate=0.01, max_iter=6" in printed
    inference = tmp_path / "output" / "inference" / "wider_face_val"
    assert json.loads((inference / "results.json").read_text())["num_images"] == 4
    assert len(list((inference / "predictions").rglob("*.txt"))) == 4

    Processes(train, drawn_datasets, tmp_path / "whole", *OPTS, "SOLVER.BASE_LR", 0.01, world_size=2).wait()
    assert final(tmp_path / "output")["iteration"] == 5
    assert_same_bits(final(tmp_path / "output")["model"], final(tmp_path / "whole")["model"])


def arguments(**changes):
    return argparse.Namespace(
        **{"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "resume": False, "eval_only": False}
        | changes
    )


@pytest.fixture
def torchrun(monkeypatch):
    """Variables that torchrun sets, in a process that it did not start."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def refuse(*_):
    raise AssertionError("main was called")


def test_one_process_runs_here():
    called = []
    assert launch(lambda *args: called.append((os.getpid(), args)) or "done", arguments(), "cpu", (1, 2)) == "done"
    assert called == [(os.getpid(), (1, 2))]


def test_detectron2_05_is_not_asked_for_processes_on_the_cpu(monkeypatch):
    monkeypatch.setattr(compat, "LAUNCH_NEEDS_GPUS", True)
    with pytest.raises(SystemExit, match=r"use torchrun --nproc_per_node 2 train_net\.py \.\.\. without --num-gpus"):
        launch(refuse, arguments(num_gpus=2), "cpu", ())


@pytest.mark.parametrize("flags", [{"num_gpus": 2}, {"num_machines": 2}])
def test_torchrun_and_detectron2s_flags_do_not_mix(torchrun, flags):
    with pytest.raises(SystemExit, match="leave --num-gpus and --num-machines to it"):
        launch(refuse, arguments(**flags), "cpu", ())


def test_a_restart_that_would_start_again_is_refused(torchrun, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit, match="would start over: add --resume"):
        launch(refuse, arguments(), "cpu", ())


def test_more_processes_than_gpus_are_refused(torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match=r"2 processes on this machine, which has 1 GPUs: lower --nproc_per_node"):
        launch(refuse, arguments(), "cuda", ())


def test_processes_wait_as_long_as_detectron2s(torchrun, monkeypatch):
    from detectron2.engine.launch import DEFAULT_TIMEOUT

    given = {}
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda _: iter([(torch.distributed.HashStore(), 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **options: given.update(options))
    monkeypatch.setattr(compat, "create_local_process_group", lambda _: None)
    with pytest.raises(AssertionError, match="main was called"):
        launch(refuse, arguments(), "cpu", ())
    assert given["timeout"] == DEFAULT_TIMEOUT


def local_ranks():
    from detectron2.utils import comm

    return comm.get_rank(), comm.get_local_rank(), comm.get_local_size()


def test_processes_know_their_place_on_the_machine():
    assert Processes(local_ranks, world_size=2).wait() == [(0, 0, 2), (1, 1, 2)]


def test_train_net_stays_a_thin_command_line():
    assert len(Path(ROOT / "train_net.py").read_text().splitlines()) <= 100


@pytest.mark.parametrize("code", [1, 2])
def test_bad_input_in_a_process_of_several_ends_the_program_alike(monkeypatch, code):
    """It has said what is wrong, and torch's own traceback says no more; any other end is a traceback."""
    from torch.multiprocessing import ProcessExitedException

    def launch_processes(*_, **__):
        raise ProcessExitedException("process 1 terminated", error_index=1, error_pid=9, exit_code=code)

    monkeypatch.setattr(sys.modules["gs_d2.engine.launch"], "detectron2_launch", launch_processes)
    with pytest.raises(SystemExit if code == 2 else ProcessExitedException) as error:
        launch(refuse, arguments(num_gpus=2), "cuda", ())
    assert code != 2 or error.value.code == 2
