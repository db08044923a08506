#!/usr/bin/env python
"""Converts Darknet's weights of Darknet-53 or YOLOv3 into a file for MODEL.WEIGHTS of configs/pipelines/yolov3.yaml.

    tools/convert_darknet.py darknet53.conv.74

The output is a .pth of tensors alone, by the names of our detector. A file of another size than these nets', or with a
value that is not a finite number or no variance, is an error, and then nothing is written. Prints the config that these
weights need, as YAML.
"""

from pathlib import Path

from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.conversion.converted import check_suffix
from gs_d2.conversion.darknet import convert_file


@bad_input_ends()
def main(argv: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument("weights", type=Path, help="Darknet's file")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write (.pth; default: weights/darknet53.pth or yolov3.pth)"
    )
    parser.add_argument(
        "--stem-channels",
        type=int,
        default=32,
        metavar="N",
        help="channels of the first convolution, if the net is narrower or wider than the published 32",
    )
    args = parser.parse_args(argv)
    check_suffix(args.output, ".pth")
    print(convert_file(args.weights, args.stem_channels).save(args.output))


if __name__ == "__main__":
    main()
