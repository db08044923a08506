"""The one place that knows that Detectron2 may be missing, or be 0.5 or main.

Modules of gs_d2 that need Detectron2 import this one first, so that its absence is one clear message.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"gs_d2's detectors need Detectron2, which does not import here ({error}). "
        "Install it with: python tools/install_detectron2.py in gs_d2's source, or pip install --no-build-isolation "
        # of the same commit; for whoever has the wheel, which has no tools
        "'git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833' "
        "(gs_d2.ops and gs_d2.sampling alone need only torch)"
    ) from error

from detectron2.utils import comm

# Detectron2 0.5's launch starts several processes on GPUs only.
LAUNCH_NEEDS_GPUS = not hasattr(comm, "create_local_process_group")


def create_local_process_group(num_processes: int):
    """Tells Detectron2 which processes share a machine, as its own launch does; all processes must call this together.

    Args:
        num_processes: on each machine; divides the world size.
    """
    if not LAUNCH_NEEDS_GPUS:
        comm.create_local_process_group(num_processes)
        return
    from torch import distributed

    for first in range(0, comm.get_world_size(), num_processes):
        ranks = range(first, first + num_processes)
        group = distributed.new_group(list(ranks))
        if comm.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group
