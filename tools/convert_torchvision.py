#!/usr/bin/env python
"""Converts torchvision's ImageNet weights of a ResNet (18, 34, 50, 101, 152) into a file for MODEL.WEIGHTS.

    tools/convert_torchvision.py resnet18-f37072fd.pth

The output is a .pth that Detectron2's checkpointer loads into a ResNet, alone or inside a detector. Whatever is
missing, unknown, of another shape or not a finite number is an error, and then nothing is written. Prints the config
that these weights need, as YAML.
"""

from pathlib import Path

from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.conversion.converted import check_suffix
from gs_d2.conversion.torchvision import convert_file


@bad_input_ends()
def main(argv: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument("weights", type=Path, help="torchvision's file (.pth): a state dict")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write (.pth; default: weights/resnet<depth>.pth)"
    )
    args = parser.parse_args(argv)
    check_suffix(args.output, ".pth")
    print(convert_file(args.weights).save(args.output))


if __name__ == "__main__":
    main()
