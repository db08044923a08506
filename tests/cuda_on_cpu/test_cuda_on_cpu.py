"""The CUDA kernels, run on the CPU: the bits of the CPU kernels, whatever the order in which threads run."""

import re
import shutil

import mutate_barriers
import pytest
from shim_build import OPS, build, run_fuzz

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++")


@pytest.fixture(scope="module")
def fibers(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fibers"))


@pytest.fixture(scope="module")
def thread_sanitizer(tmp_path_factory):
    return build(tmp_path_factory.mktemp("thread_sanitizer"), "threads", "thread")


@pytest.fixture(scope="module")
def address_sanitizer(tmp_path_factory):
    return build(tmp_path_factory.mktemp("address_sanitizer"), "threads", "address")


def check(process, num_cases):
    if "unexpected memory mapping" in process.stderr:
        pytest.skip("ThreadSanitizer does not start under this kernel's address layout")
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{num_cases} cases" in process.stdout and " 0 mismatches" in process.stdout


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("schedule", [1, 2, 3])
def test_shuffled_threads_give_the_bits_of_the_cpu(fibers, op, schedule):
    check(run_fuzz(fibers, op, 200, schedule), 200)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("schedule", [1, 2, 3])
def test_shuffled_threads_at_length(fibers, op, schedule):
    check(run_fuzz(fibers, op, 1500, schedule), 1500)


@pytest.mark.parametrize("op", OPS)
def test_no_unordered_access(thread_sanitizer, op):
    check(run_fuzz(thread_sanitizer, op, 2, mode="small"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_no_unordered_access_at_length(thread_sanitizer, op):
    check(run_fuzz(thread_sanitizer, op, 20, mode="small"), 20)


@pytest.mark.parametrize("op", OPS)
def test_no_access_outside(address_sanitizer, op):
    check(run_fuzz(address_sanitizer, op, 10, mode="small"), 10)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_no_access_outside_at_length(address_sanitizer, op):
    check(run_fuzz(address_sanitizer, op, 100, mode="small"), 100)


@pytest.mark.parametrize("op", OPS)
def test_cpu_kernels_under_sanitizers(address_sanitizer, op):
    checksums = set()
    for capability in ("baseline", "avx2", "avx512"):  # one that this machine lacks falls back to the next
        env = {"GS_D2_CPU_CAPABILITY": capability}
        process = run_fuzz(address_sanitizer, op, 1500, mode="cpu", env=env)
        check(process, 1500)
        checksums.add(re.search(r"checksum (\w+)", process.stdout)[1])
    assert len(checksums) == 1


@pytest.mark.slow
def test_every_barrier_is_needed():
    rows = mutate_barriers.mutate_all()
    assert len(rows) > 0
    assert [row for row in rows if not row.caught] == []
