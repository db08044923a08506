"""Removes each barrier of the CUDA kernels in turn and reports whether the shim notices.

A barrier whose loss nothing notices is either redundant, and goes, or a hole in the tests. Prints a table.

    python tests/cuda_on_cpu/mutate_barriers.py
"""

import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shim_build import CSRC, build, run_fuzz

BARRIER = re.compile(r"__sync(threads|warp)\(.*?\);")
SCHEDULES = (1, 2, 3)
FIBER_CASES = 150
THREAD_CASES = 3


@dataclass
class Row:
    file: str
    line: int
    function: str
    fibers: int  # schedules that gave a wrong result
    thread_sanitizer: bool

    @property
    def caught(self):
        return self.fibers > 0 or self.thread_sanitizer


def barriers():
    """(file, line, function) of each barrier."""
    for path in sorted((CSRC / "cuda").glob("*.cu")):
        function = ""
        for number, line in enumerate(path.read_text().splitlines()):
            definition = re.match(r"^(?:__|\s+\w+\(const).*?(\w+)\((?!kThreads\))[^;]*$", line)
            function = definition[1] if definition else function
            if BARRIER.search(line):
                yield path, number, function


def mutate(path, number, function):
    lines = path.read_text().splitlines()
    lines[number] = BARRIER.sub("", lines[number], count=1)
    sources = [p for p in sorted((CSRC / "cuda").glob("*.cu")) if p != path]
    with tempfile.TemporaryDirectory() as folder:
        mutant = Path(folder) / path.name
        mutant.write_text("\n".join(lines) + "\n")
        fibers = build(folder, cuda_sources=[mutant, *sources])
        wrong = sum(run_fuzz(fibers, path.stem, FIBER_CASES, s).returncode != 0 for s in SCHEDULES)
        threads = build(folder, "threads", "thread", cuda_sources=[mutant, *sources])
        reported = run_fuzz(threads, path.stem, THREAD_CASES, mode="small").returncode != 0
    return Row(path.name, number + 1, function, wrong, reported)


def mutate_all():
    rows = []
    for barrier in barriers():
        rows.append(mutate(*barrier))
        print(rows[-1], file=sys.stderr)
    return rows


def main():
    rows = mutate_all()
    print("| kernel file | function | barrier | wrong results, schedules of 3 | ThreadSanitizer |")
    print("|---|---|---|---|---|")
    numbers = Counter()  # of a function's barriers; line numbers would not last
    for row in rows:
        numbers[row.file, row.function] += 1
        number, report = numbers[row.file, row.function], "reported" if row.thread_sanitizer else "silent"
        print(f"| {row.file} | `{row.function}` | {number} | {row.fibers} | {report} |")
    missed = sum(not row.caught for row in rows)
    print(f"\n{len(rows)} barriers, {len(rows) - missed} caught, {missed} missed")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
