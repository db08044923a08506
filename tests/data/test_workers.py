"""Loader workers that fail or die: an error with the reason and what to do, within seconds, in place of a wait."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from gs_d2.data.dataset_mapper import BadDataError
from gs_d2.data.workers import InWorkers, explained
from gs_d2.engine import TrainLoader

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def never_for_ever():
    def too_long(*_):
        raise TimeoutError("still waiting for workers")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Items(Dataset):
    """Tensors, but where the function of the row makes something else."""

    def __init__(self, make):
        self._make = make

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"row": row, "image": torch.full((3, 64, 64), row), "other": self._make(row)}


def unpicklable(row):
    return (lambda: row) if row == 3 else row


def too_many_files(row):
    if row == 3:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return row


def too_large_a_file(row):
    if row == 3:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    return row


def dies_of(number):
    def make(row):
        if row == 3:
            os.kill(os.getpid(), number)
        return row

    return make


def through_test_loader(make):
    with explained():
        return [item for (item,) in DataLoader(InWorkers(Items(make)), 1, num_workers=2, collate_fn=list)]


def through_train_loader(make):
    loader = iter(TrainLoader(Items(make), seed=0, total_batch_size=2, num_workers=2))
    with explained():
        return [item for _ in range(4) for item in next(loader)]


LOADERS = [through_test_loader, through_train_loader]


@pytest.mark.parametrize("loader", LOADERS)
def test_what_works_arrives(loader):
    items = loader(lambda row: row)
    assert sorted(item["row"] for item in items) == list(range(8))
    assert all((item["image"] == item["row"]).all() for item in items)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unpicklable, "cannot hand over what it has loaded: .*pickle.*Correct what the data set's mapper returns"),
        (too_large_a_file, r"cannot hand over .*File too large.* in /dev/shm, which has \d+ MB, \d+ MB of them free"),
        # How many files it still gets before that depends on the time.
        (too_many_files, r"cannot hand over .*(Too many open f|closed the c).*\(ulimit -n\), or set DATALOADER"),
    ],
)
def test_what_cannot_be_handed_over_is_an_error(loader, make, message):
    with pytest.raises(RuntimeError, match=f"(?s){message}") as error:
        loader(make)
    assert "DATALOADER.NUM_WORKERS" in str(error.value)


def test_what_can_no_longer_be_fetched_from_a_worker_is_an_error():
    """The worker has sent an image, and is out of file descriptors when this process asks for the image's memory."""

    def make(row):
        if row == 3:
            time.sleep(1)  # until those before are sent
        return too_many_files(row)

    loader = iter(DataLoader(InWorkers(Items(make)), 1, num_workers=1, collate_fn=list, prefetch_factor=8))
    time.sleep(3)
    for _ in range(2):  # the first time it can accept the connection but send nothing, the second time not even that
        with pytest.raises(RuntimeError, match=r"cannot hand over .*\(ulimit -n\), or set DATALOADER\.NUM_WORKERS 0"):
            with explained():
                next(loader)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_an_error(loader, number):
    with pytest.raises(RuntimeError, match=r"(?s)DataLoader worker.*/dev/shm.*DATALOADER\.NUM_WORKERS.*'Killed'"):
        loader(dies_of(number))


def unreadable(row):
    if row == 3:
        raise BadDataError(f"{row}.jpg: cannot be read as an image (of a kind: that there is not)")
    return row


def gives_up(row):
    try:
        return unreadable(row)
    except BadDataError as error:
        raise RuntimeError("too many images are bad") from error


@pytest.mark.parametrize("loader", LOADERS)
def test_what_a_worker_says_is_said_in_one_line(loader):
    with pytest.raises(BadDataError) as error:
        loader(unreadable)
    assert str(error.value) == "3.jpg: cannot be read as an image (of a kind: that there is not)"
    with pytest.raises(RuntimeError) as error:
        loader(gives_up)
    assert str(error.value) == "too many images are bad"


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match=r"^something else$"), explained():
        raise RuntimeError("something else")


def test_a_full_shared_memory(tmp_path):
    """As in a container, by a file system of 1 MB in a mount namespace of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from gs_d2.engine import TrainLoader

            class Large(torch.utils.data.Dataset):
                def __len__(self):
                    return 8

                def __getitem__(self, row):
                    return {"image": torch.zeros(3, 500, 500)}

            next(iter(TrainLoader(Large(), seed=0, total_batch_size=2, num_workers=2)))
            """
        )
    )
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small /dev/shm")
    command = f"{mount} && exec {sys.executable} {script}"
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: A loader worker cannot hand over what it has loaded: ")
    assert "/dev/shm, which has 1 MB" in last and "--shm-size" in last and "DATALOADER.NUM_WORKERS" in last
