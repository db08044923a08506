#!/usr/bin/env python
"""Times one face detector, and finds the faces of photographs with it, in a process of its own.

face_detectors.py runs this with a job on standard input, and reads the answer, both as JSON. It imports nothing that a
detector does not need, such as torch, so that the memory is that detector's.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from adapters import ADAPTERS, at_size

from gs_d2.formats.images import as_rgb
from gs_d2.formats.json_text import json_text
from gs_d2.formats.wider_predictions import write_wider_predictions


def main():
    job = json.load(sys.stdin)
    adapter, side = ADAPTERS[job["detector"]], job["side"]
    detect = adapter(job["threads"], adapter.usual_thresh, job["file"])
    answer = timed(detect, [at_size(as_rgb(path), side)[0] for path in job["timed"]], job["repeats"])
    answer["peak_mib"] = peak_mib()
    if job["images"]:
        detect = adapter(job["threads"], adapter.low_thresh, job["file"])
        found = {image_id: faces_of(detect, path, side) for image_id, path in job["images"].items()}
        write_wider_predictions(found, job["output"])
    Path(job["answer"]).write_text(json_text(answer), encoding="utf-8")


def faces_of(detect, path: str, side: int | None) -> np.ndarray:
    """`x y w h score` [n, 5] in pixels of the file."""
    pixels, factor = at_size(as_rgb(path), side)
    rows = detect(pixels)
    return np.concatenate([rows[:, :4] / factor, rows[:, 4:]], axis=1)


def timed(detect, images: list[np.ndarray], repeats: int) -> dict[str, float]:
    """Median milliseconds of `repeats` calls, the images in turn, after one call with each that does not count."""
    wall, cpu = [], []
    for call in range(-len(images), repeats):
        wall_begin, cpu_begin = time.perf_counter(), time.process_time()
        detect(images[call % len(images)])
        if call >= 0:
            wall.append(1e3 * (time.perf_counter() - wall_begin))
            cpu.append(1e3 * (time.process_time() - cpu_begin))
    return {"wall_ms": float(np.median(wall)), "min_ms": min(wall), "cpu_ms": float(np.median(cpu))}


def peak_mib() -> float | None:
    """The most memory that this process has had. None where the system does not say it of a process alone."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
