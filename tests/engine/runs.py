"""Training runs of a few tiny iterations, in fresh processes: alone, or two that form a gloo group."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")  # each run is a fork of a process that has imported everything
_CONTEXT.set_forkserver_preload(["gs_d2.engine", "tensorboard", "torch.utils.tensorboard", "runs"])
SMALL = """
    SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 4 SOLVER.STEPS (3,) SOLVER.WARMUP_ITERS 2 SOLVER.CHECKPOINT_PERIOD 100
    INPUT.GS.SCALES [1.0,1.25] INPUT.GS.MAX_CROP_SIZE 96 DATALOADER.NUM_WORKERS 0 TEST.EVAL_PERIOD 0
    MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 32
""".split()


def small_config(datasets, output, *opts):
    """The demo's config on the session's drawn images, without tests; `opts` are keys and values."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog

    from gs_d2.config import add_gs_config
    from gs_d2.data import register_wider_face

    if "engine_train" not in DatasetCatalog.list():
        base = Path(datasets) / "widerface"
        annotations = base / "wider_face_split" / "wider_face_train_bbx_gt.txt"
        register_wider_face("engine_train", annotations, base / "WIDER_train" / "images")
    cfg = get_cfg()
    add_gs_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/quick/demo.yaml"))
    cfg.merge_from_list([*SMALL, "DATASETS.TRAIN", ("engine_train",), "DATASETS.TEST", (), "OUTPUT_DIR", str(output)])
    cfg.merge_from_list([str(opt) for opt in opts])
    return cfg


def train(datasets, output, *opts, resume=False, prepare=None):
    """What train_net.py does; `prepare(trainer)` is called before training, and what it returns is returned."""
    from detectron2.utils import comm
    from detectron2.utils.env import seed_all_rng

    from gs_d2.engine import Trainer

    Path(output).mkdir(parents=True, exist_ok=True)
    cfg = small_config(datasets, output, *opts)
    seed_all_rng(cfg.SEED + comm.get_rank() if cfg.SEED >= 0 else None)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    result = prepare(trainer) if prepare else None
    trainer.train()
    return result


def final(output) -> dict:
    """The last checkpoint."""
    return torch.load(Path(output) / "model_final.pth", weights_only=False)


def assert_same_bits(a, b):
    """Of two state dicts."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} differ: {different[:3]}"


# train_net.py, which also writes what each pass trains on: a line of the iteration and the images' names.
RECORDING = f"""
import os, runpy
from gs_d2.engine import AccumulatingTrainer
forward_backward = AccumulatingTrainer._forward_backward
def recording(self, batches):
    with open(f"{{self.output_dir}}/seen_{{os.environ['RANK']}}.txt", "a") as file:
        print(self.iter, *(os.path.basename(image["file_name"]) for image in batches[-1]), file=file)
    return forward_backward(self, batches)
AccumulatingTrainer._forward_backward = recording
# more
runpy.run_path({str(ROOT / "train_net.py")!r}, run_name="__main__")
"""


def start_torchrun(datasets, output, *opts, processes=2, flags=("--resume",), more="", torchrun=()):
    """train_net.py on the demo's config, small, under a torchrun that has just been started.

    Args:
        opts: keys and values.
        more: Python code that is run before train_net.py.
        torchrun: flags of torchrun.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    script = output / "recording.py"
    script.write_text(RECORDING.replace("# more", more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [*torchrun, str(script), "--config-file", "configs/quick/demo.yaml", *flags, *SMALL]
    command += ["DATASETS.TEST", "()", "OUTPUT_DIR", str(output), *map(str, opts)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def torchrun(datasets, output, *opts, **options) -> tuple[int, str]:
    """Its exit code and what it printed."""
    process = start_torchrun(datasets, output, *opts, **options)
    try:
        printed, _ = process.communicate(timeout=200)
    except BaseException:
        process.kill()
        raise
    return process.returncode, printed


def seen(output) -> dict[int, list[str]]:
    """Iteration -> names of the images that it trained on in all processes, sorted."""
    names = {}
    for path in Path(output).glob("seen_*.txt"):
        for line in path.read_text().splitlines():
            iteration, *images = line.split()
            names.setdefault(int(iteration), []).extend(images)
    return {iteration: sorted(images) for iteration, images in sorted(names.items())}


class Processes:
    """`function(*arguments)` in `world_size` processes at once; with more than one they form a gloo group.

    `wait()` returns what each of them returned; `exitcodes()` waits, and minds no failure.
    """

    def __init__(self, function, *arguments, world_size=1, **keywords):
        self._queue = _CONTEXT.SimpleQueue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes = [
            _CONTEXT.Process(target=_run, args=(self._queue, rank, world_size, port, function, arguments, keywords))
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def exitcodes(self):
        for process in self._processes:
            process.join(timeout=240)
        return [process.exitcode for process in self._processes]

    def wait(self) -> list:
        results = {}
        while len(results) < len(self._processes):
            if not self._queue._reader.poll(90):  # one has died, or waits for another for ever
                for process in self._processes:
                    process.kill()
                raise AssertionError(
                    f"only of ranks {sorted(results)} of {len(self._processes)} processes came a result"
                )
            rank, result = self._queue.get()
            results[rank] = result
        self.exitcodes()
        for result in results.values():
            if isinstance(result, str) and result.startswith("Traceback"):
                raise AssertionError(result)
        return [results[rank] for rank in range(len(results))]


def _run(queue, rank, world_size, port, function, arguments, keywords):
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process that a user starts
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.1  # how soon workers see that a killed process is gone
    try:
        if world_size > 1:
            from gs_d2 import compat

            address = f"tcp://127.0.0.1:{port}"
            torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
            compat.create_local_process_group(world_size)
        result = function(*arguments, **keywords)
    except BaseException:
        result = traceback.format_exc()
    queue.put((rank, result))
    if world_size > 1:
        # Rank 0 has the store: if it ended first, another that still sets up its groups would fail.
        with contextlib.suppress(RuntimeError):  # a process that failed is gone
            torch.distributed.barrier()
        os._exit(0)  # gloo's threads, which Detectron2 keeps a group of, now and then abort an orderly exit
