#!/usr/bin/env python
"""Fits the map from rectangles to ellipses that `tools/evaluate.py fddb --fit-ellipses` uses.

    dev/fit_fddb_ellipse.py --ground-truth FDDB-folds/ [--write]

FDDB annotates faces by ellipses, detectors give rectangles, and the continuous score rewards the right shape.
The fit uses FDDB's annotations only, no detector. The rectangle of a face is taken to be the upright one with
the centre, the area and the proportions (those of the bounding box) of its ellipse: a detector's box covers
as much as the face, it does not enclose the whole ellipse. The map must not depend on where a face is nor on
how large it is, so it is linear in width and height without a constant, keeps the centre and has a fixed
angle. Errors count relative to the face's size. Prints the fit and its error; --write replaces
gs_d2/evaluation/fddb_ellipse_fit.py.
"""

from pathlib import Path

import numpy as np

from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.formats.fddb import bounding_boxes, read_annotations
from gs_d2.formats.whole_file import write_text

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "gs_d2" / "evaluation" / "fddb_ellipse_fit.py"
TEMPLATE = '''"""How a rectangle becomes an ellipse: FDDB's annotations fitted by dev/fit_fddb_ellipse.py."""

# (major radius, minor radius) = RADII @ (width, height); the centre is that of the rectangle.
RADII = (({:.6f}, {:.6f}), ({:.6f}, {:.6f}))
ANGLE = {:.6f}  # of the major radius, radians from the x axis
'''


def rectangle_sizes(ellipses: np.ndarray) -> np.ndarray:
    """Width and height (n, 2) of the rectangles that stand for ellipses (n, 5)."""
    boxes = bounding_boxes(ellipses)
    sizes = boxes[:, 2:] - boxes[:, :2]
    areas = np.pi * ellipses[:, :2].prod(axis=1)
    return sizes * np.sqrt(areas / sizes.prod(axis=1))[:, None]


def fit(ellipses: np.ndarray) -> tuple[np.ndarray, float]:
    """Fits the map to ellipses (n, 5); returns the matrix (2, 2) of the radii and the angle in radians."""
    sizes = rectangle_sizes(ellipses)
    weights = 1 / np.sqrt(sizes.prod(axis=1, keepdims=True))
    radii = np.linalg.lstsq(sizes * weights, ellipses[:, :2] * weights, rcond=None)[0].T
    # An axis has no direction: the mean is taken over doubled angles.
    angle = np.angle(np.exp(2j * ellipses[:, 2]).mean()) / 2 % np.pi
    return radii, float(angle)


@bad_input_ends()
def main(argv: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument("--ground-truth", required=True, type=Path, metavar="PATH", help="FDDB's ellipse lists")
    parser.add_argument("--write", action="store_true", help=f"replace {TARGET.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    ellipses = np.concatenate([np.zeros((0, 5)), *read_annotations(args.ground_truth).values()])
    if not len(ellipses):
        raise ValueError(f"{args.ground_truth}: has no ellipse")
    radii, angle = fit(ellipses)
    errors = rectangle_sizes(ellipses) @ radii.T / ellipses[:, :2] - 1
    text = TEMPLATE.format(*radii.ravel(), angle)
    print(text)
    major, minor = np.sqrt((errors**2).mean(axis=0))
    print(f"{len(ellipses)} ellipses; relative error of the radii: {major:.1%}, {minor:.1%} (root mean square)")
    if args.write:
        write_text(TARGET, text)


if __name__ == "__main__":
    main()
