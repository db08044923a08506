"""Starting a program in one or many processes: by torchrun, by Detectron2's own launch, or simply here."""

import logging
import multiprocessing
import os
import signal
import sys

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException

from gs_d2 import compat
from gs_d2.engine.stopping import EXIT_CODE, Stopped


def launch(main, args, device: str, main_args: tuple):
    """Calls `main(*main_args)` in each process, and returns what it returns where Detectron2 has started none.

    Under torchrun this process is one of those that it started, and joins their group; otherwise --num-gpus and
    --num-machines say how many Detectron2 is to start. Ends the program with a message where that cannot work.

    Args:
        args: what `detectron2.engine.default_argument_parser` gives.
        device: MODEL.DEVICE; decides how the processes talk to each other (nccl on GPUs, gloo on the CPU).
    """
    num_processes = args.num_gpus * args.num_machines
    if "LOCAL_WORLD_SIZE" in os.environ and "RANK" in os.environ:
        if num_processes > 1:
            sys.exit("torchrun has started the processes already: leave --num-gpus and --num-machines to it")
        return _run_under_torchrun(main, args, device, main_args)
    if num_processes > 1 and device == "cpu" and (compat.LAUNCH_NEEDS_GPUS or torch.cuda.is_available()):
        sys.exit(
            f"--num-gpus {args.num_gpus} asks for several processes, which Detectron2 cannot start on this CPU: "
            f"use torchrun --nproc_per_node {args.num_gpus} train_net.py ... without --num-gpus"
        )
    if num_processes == 1:
        return main(*main_args)
    _launch_by_detectron2(main, args, main_args)


def _launch_by_detectron2(main, args, main_args):
    """With SIGTERM passed on to the processes, which end with stopping.EXIT_CODE then, as this one does."""

    def pass_on(*_):
        for process in multiprocessing.active_children():
            process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        detectron2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=main_args,
        )
    except ProcessExitedException as error:
        if error.exit_code in (2, EXIT_CODE):  # bad input, which that process has named, or a stop by SIGTERM
            sys.exit(error.exit_code)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_under_torchrun(main, args, device, main_args):
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and not (args.resume or args.eval_only):
        sys.exit("torchrun has restarted the processes, and without --resume training would start over: add --resume")
    on_gpu = device != "cpu"
    if on_gpu:
        if local_world_size > torch.cuda.device_count():
            sys.exit(
                f"torchrun started {local_world_size} processes on this machine, which has "
                f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node"
            )
        torch.cuda.set_device(local_rank)
    store, rank, world_size = next(distributed.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store for all restarts, where processes would wait for the addresses of the ended ones.
        # Machines can count restarts differently: several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/training.md).
        store = distributed.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=DEFAULT_TIMEOUT
    )
    compat.create_local_process_group(local_world_size)
    try:
        result = main(*main_args)
    except Stopped as stopped:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stopped.code)  # an orderly end could wait for processes that are still evaluating
    # Only after success: a process that failed must end at once, so that torchrun ends or restarts the others.
    comm.synchronize()
    distributed.destroy_process_group()
    return result
