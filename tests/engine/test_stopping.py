"""SIGTERM: with real signals, under a real torchrun, and what a process does with one."""

import os
import signal
import subprocess
import time

import pytest
import torch
from detectron2.utils.events import EventStorage
from runs import Processes, assert_same_bits, final, seen, start_torchrun, torchrun, train
from test_step import image, trainer_of

from gs_d2.engine.stopping import EXIT_CODE, Stopped, StopSignal

OPTS = ("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4,), "SOLVER.CHECKPOINT_PERIOD", 100)
# In iteration 2 a process waits for the signal that the test sends.
WAITING = """
import time, signal
run_step = AccumulatingTrainer.run_step
def waiting(self):
    if self.iter == 2 and os.environ["RANK"] == "1":
        open(f"{self.output_dir}/pid.part", "w").write(str(os.getpid()))
        os.rename(f"{self.output_dir}/pid.part", f"{self.output_dir}/pid")
        while not self.should_stop():
            time.sleep(0.02)
    run_step(self)
AccumulatingTrainer.run_step = waiting
"""


def wait_for(path, process) -> str:
    end = time.monotonic() + 150
    while not path.exists():
        assert process.poll() is None, process.stdout.read()[-5000:]
        assert time.monotonic() < end
        time.sleep(0.05)
    return path.read_text()


def below(pid) -> list[int]:
    """Its children, theirs, and so on."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [each for child in map(int, found) for each in (child, *below(child))]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one process", "every process"])
def test_a_signal_is_a_checkpoint_and_resuming_as_if_nothing_had_been(drawn_datasets, tmp_path, to):
    """To torchrun, as containers send it; to one of its processes; to all, loader workers too, as Slurm does."""
    opts = (*OPTS, "DATALOADER.NUM_WORKERS", 0 if to == "one process" else 1)
    process = start_torchrun(drawn_datasets, tmp_path / "stopped", *opts, more=WAITING)
    pid = int(wait_for(tmp_path / "stopped" / "pid", process))
    targets = {"torchrun": [process.pid], "one process": [pid], "every process": [process.pid, *below(process.pid)]}
    for target in targets[to]:
        os.kill(target, signal.SIGTERM)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "SIGTERM: saving after iteration 2 and ending with exit code 75" in printed, printed[-5000:]
    assert to != "one process" or f"exitcode  : {EXIT_CODE}" in printed or f"exitcode: {EXIT_CODE}" in printed
    output = tmp_path / "stopped"
    assert (output / "last_checkpoint").read_text() == "model_0000002.pth"
    assert list(seen(output)) == [0, 1, 2] and not (output / "model_final.pth").exists()

    status, printed = torchrun(drawn_datasets, output, *opts)
    assert status == 0 and "Starting training from iteration 3" in printed, printed[-5000:]
    Processes(train, drawn_datasets, tmp_path / "whole", *OPTS, world_size=2).wait()
    assert_same_bits(final(output)["model"], final(tmp_path / "whole")["model"])


def send(trainer, iteration):
    """A hook that sends this process SIGTERM in the iteration."""
    from detectron2.engine import HookBase

    class Send(HookBase):
        def before_step(self):
            if self.trainer.iter == iteration:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.register_hooks([Send()])


def train_and_be_stopped(datasets, output, *opts, iteration):
    """The exit code, and whether the handler is the one before."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        train(datasets, output, *opts, prepare=lambda trainer: send(trainer, iteration))
    except SystemExit as end:
        return end.code, signal.getsignal(signal.SIGTERM) == before
    return 0, signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("iteration", "last"),
    [
        (0, "model_0000000.pth"),
        (1, "model_final.pth"),  # the last iteration: only the evaluation is left out
    ],
)
def test_a_process_alone(drawn_datasets, tmp_path, iteration, last):
    opts = (*OPTS, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ())
    ((code, restored),) = Processes(train_and_be_stopped, drawn_datasets, tmp_path, *opts, iteration=iteration).wait()
    assert (code, restored) == (EXIT_CODE, True)
    assert (tmp_path / "last_checkpoint").read_text() == last


def stopped_while_evaluating(datasets, output, *opts):
    from gs_d2.engine import Trainer

    def test(cfg, model, evaluators=None):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        raise AssertionError("the evaluation went on")

    Trainer.test = test
    try:
        train(datasets, output, *opts)
    except SystemExit as end:
        return end.code


def test_an_evaluation_ends_at_once(drawn_datasets, tmp_path):
    """With the averaged weights out of the model again: the checkpoint is that of the iteration, in every bit."""
    opts = (*OPTS, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "SOLVER.GS.EMA_DECAY", 0.5)
    periodic = ("SOLVER.CHECKPOINT_PERIOD", 2)
    Processes(train, drawn_datasets, tmp_path / "whole", *opts, *periodic, world_size=2).wait()
    evaluating = (*opts, "TEST.EVAL_PERIOD", 2)
    run = Processes(stopped_while_evaluating, drawn_datasets, tmp_path / "stopped", *evaluating, world_size=2)
    assert run.wait() == [EXIT_CODE] * 2
    assert (tmp_path / "stopped" / "last_checkpoint").read_text() == "model_0000001.pth"
    stopped, whole = (torch.load(tmp_path / x / "model_0000001.pth", weights_only=True) for x in ("stopped", "whole"))
    assert_same_bits(stopped["model"], whole["model"])
    averages = [x["trainer"]["_trainer"]["weight_average"]["training_weights"] for x in (stopped, whole)]
    assert_same_bits(*averages)


def test_at_once():
    with StopSignal() as stop:
        with pytest.raises(Stopped) as end, stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert end.value.code == EXIT_CODE and stop.received
        os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
        with pytest.raises(Stopped), stop.at_once():
            raise AssertionError("it was begun")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_all_processes_agree(tmp_path):
    both = Processes(stop_second, str(tmp_path), world_size=2).wait()
    assert both == [[False, True]] * 2


def stop_second(output):
    rank, agreed = torch.distributed.get_rank(), []
    trainer = trainer_of([[image(1.0)]] * 2, output)
    trainer.should_stop = lambda: rank == 1 and trainer.iter == 1
    with EventStorage():
        for trainer.iter in range(2):
            trainer.run_step()
            agreed.append(trainer.stop_agreed)
    return agreed


def child(rank, output):
    with StopSignal() as stop:
        open(f"{output}/{rank}", "w").close()
        while not stop.received:
            time.sleep(0.01)
    raise Stopped


def spawn(main, num_gpus, args, **_):
    """What Detectron2's launch does, on the CPU."""
    torch.multiprocessing.start_processes(main, args=args, nprocs=num_gpus, start_method="fork")


def launched(output):
    """In a process of its own, whose children wait for the signal that it gets."""
    import argparse
    import threading

    from gs_d2.engine import launch

    launch.__globals__["detectron2_launch"] = spawn
    args = argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", resume=True, eval_only=False)

    def send_when_ready():
        while not all(os.path.exists(f"{output}/{rank}") for rank in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send_when_ready).start()
    try:
        launch(child, args, "cuda", (output,))
    except SystemExit as end:
        return end.code


def test_processes_that_detectron2_has_started_get_the_signal_too(tmp_path):
    assert Processes(launched, str(tmp_path)).wait() == [EXIT_CODE]
