#!/usr/bin/env python
"""Converts published weights into a file for MODEL.GS.TIMM.WEIGHTS, a backbone by timm's names.

    tools/convert_to_timm.py efficientnet-lite0-57934424.pth
    tools/convert_to_timm.py centerface.onnx

gs_d2/conversion/timm.py names the packages that these files are from. Whatever is missing, unknown, of another shape or
not a finite number is an error, as is a convolution of other stride, padding or activation, and then nothing is
written. Prints the config that these weights need, as YAML. Needs timm, and onnx for a .onnx.
"""

from pathlib import Path

from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.conversion.converted import check_suffix
from gs_d2.conversion.timm import convert_file


@bad_input_ends()
def main(argv: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument("weights", type=Path, help="the published file, .pth or .onnx")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (.safetensors or .pth; default: weights/<timm's name>.safetensors)",
    )
    args = parser.parse_args(argv)
    check_suffix(args.output, ".safetensors", ".pth")
    print(convert_file(args.weights).save(args.output))


if __name__ == "__main__":
    main()
