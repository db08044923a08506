#!/usr/bin/env python
"""Generates a small data set in WIDER FACE's layout, for demos and tests (gs_d2/data/generated_faces.py).

    tools/synthesize_faces.py --output output/demo/datasets

The same command gives the same files.
"""

from gs_d2.command_line import bad_input_ends, folder_for, parser_of
from gs_d2.data.generated_faces import synthesize


@bad_input_ends()
def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument(
        "--output", required=True, help="folder that receives widerface/ (use it as DETECTRON2_DATASETS)"
    )
    parser.add_argument("--train", type=int, default=240, help="number of training images")
    parser.add_argument("--val", type=int, default=60, help="number of validation images")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(288, 384), metavar=("HEIGHT", "WIDTH"), help="of the images, in pixels"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is generated")
    args = parser.parse_args(argv)
    if min(args.train, args.val, args.seed) < 0 or min(args.size) < 1:
        parser.error("--train, --val and --seed must be at least 0, and --size at least 1")
    synthesize(
        folder_for("--output", args.output), {"train": args.train, "val": args.val}, tuple(args.size[::-1]), args.seed
    )


if __name__ == "__main__":
    main()
