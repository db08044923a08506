"""Builds fuzz.cpp with the CUDA kernels, compiled by g++ against the shim, and runs it."""

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
OPS = ("box_iou", "two_pass_match", "group_subsample")

FLAGS = ["-std=c++17", "-g", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE", f"-I{HERE / 'shim'}"]  # fortify refuses fibers
SANITIZERS = {
    None: ["-O2"],
    "thread": ["-O1", "-fsanitize=thread"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def build(folder, backend="fibers", sanitizer=None, cuda_sources=None, flags=()):
    """Returns the executable; `cuda_sources` replaces csrc/cuda/*.cu."""
    sources = list(cuda_sources or sorted((CSRC / "cuda").glob("*.cu"))) + sorted((CSRC / "cpu").glob("*.cpp"))
    sources += [HERE / "fuzz.cpp", HERE / "shim" / f"{backend}.cpp", HERE / "shim" / "poison.cpp"]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *SANITIZERS[sanitizer], *flags]
    objects, running = [], []
    for number, source in enumerate(sources):
        objects.append(str(Path(folder) / f"{number}-{source.stem}.o"))
        include = f"-I{CSRC / 'cuda'}"
        running.append(subprocess.Popen([*command, include, "-x", "c++", "-c", str(source), "-o", objects[-1]]))
    if any(process.wait() != 0 for process in running):
        raise RuntimeError("the shim build failed")
    executable = Path(folder) / "fuzz"
    subprocess.run([*command, *objects, "-o", str(executable)], check=True)
    return executable


def run_fuzz(executable, op, num_cases, schedule=1, mode="", timeout=600, env=None):
    """Runs num_cases cases; returns the finished process, its output in stdout and stderr."""
    command = [str(executable), op, str(num_cases), str(schedule), *([mode] if mode else [])]
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
