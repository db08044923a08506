"""Tests a photograph on a pyramid whose largest level does not fit into memory: tiles must find the same faces.

On a GPU the process may have half of what the level has taken before. On a CPU memory is only said to be too small.

    python dev/provoke_out_of_memory.py --device cuda
"""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gs_d2 import ops
from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.engine.value_checks import check_device
from gs_d2.inference import FaceDetector

PHOTOGRAPH = Path(__file__).resolve().parent.parent / "demo" / "astronaut.jpg"
PYRAMID = ["TEST.GS.PYRAMID", True, "TEST.GS.SCALES", [0.25, 1.0], "TEST.GS.MAX_SIZE", 10000, "INPUT.MIN_SIZE_TEST", 0]
SAME = 0.7  # IoU of a face found in both
MOST_UNLIKE = 0.05  # of the faces: what the network sees beyond a tile differs


@bad_input_ends()
def main(argv: list[str] | None = None):
    args = parse(argv)
    check_device(args.device, "--device")
    if args.copies < 1:
        raise ValueError(f"--copies must be at least 1, got {args.copies}")
    picture = np.tile(np.asarray(Image.open(PHOTOGRAPH).convert("RGB")), (args.copies, args.copies, 1))
    device = torch.device(args.device)

    whole, peak = FaceDetector(device=device, opts=PYRAMID), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    expected = whole.detect(picture)[0]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    del whole

    detector, warnings = FaceDetector(device=device, opts=PYRAMID), Messages()
    logging.getLogger("gs_d2.inference.tiling").addHandler(warnings)
    limit_memory(detector, device, peak, picture.shape[0] * picture.shape[1])
    found = detector.detect(picture)[0]
    unlike = count_unlike(found, expected) + count_unlike(expected, found)
    print("\n".join(warnings.texts))
    print(f"{len(expected)} faces in the whole, {len(found)} in tiles, {unlike} of either are not in the other")
    if not any("overlapping tiles" in text for text in warnings.texts):
        sys.exit("Nothing ran in tiles: the level has fitted")
    if not len(expected) or unlike > MOST_UNLIKE * (len(expected) + len(found)):
        sys.exit("Tiles and the whole picture have not the same faces")


def parse(argv) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:0 or cpu (default: %(default)s)")
    parser.add_argument(
        "--copies", type=int, default=5, metavar="N", help="of the photograph, in each direction (default: %(default)s)"
    )
    return parser.parse_args(argv)


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def limit_memory(detector: FaceDetector, device: torch.device, peak: int, pixels: int):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.5 * peak / torch.cuda.get_device_properties(device).total_memory)
        return
    model = detector.model.model
    predict = model.predict_candidates

    def refuse_the_whole(inputs):
        if sum(x["image"][0].numel() for x in inputs) >= pixels:
            raise torch.OutOfMemoryError("as on a GPU")
        return predict(inputs)

    model.predict_candidates = refuse_the_whole


def count_unlike(boxes: np.ndarray, others: np.ndarray) -> int:
    if not len(boxes) or not len(others):
        return len(boxes)
    return int((ops.box_iou(torch.from_numpy(boxes), torch.from_numpy(others)).amax(dim=1) < SAME).sum())


if __name__ == "__main__":
    main()
