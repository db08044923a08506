#!/usr/bin/env python
"""A web page that finds the faces of a photograph, with the detector that comes with gs_d2 (needs gradio 6).

python demo/web.py

It serves this machine only, unless --host names another address (0.0.0.0 is all of this machine's). It sends nothing
anywhere. Photographs are kept in a temporary folder for at most twenty minutes, or until the page ends.
"""

import os
import signal
import sys
import tempfile
from functools import cache

import numpy as np
from PIL import Image

from gs_d2.anonymization import STYLES, THRESHOLD, anonymize
from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.formats.found_faces import record
from gs_d2.formats.images import as_rgb, pixels_only
from gs_d2.formats.json_text import json_text
from gs_d2.inference import FaceDetector
from gs_d2.visualization import FACE, draw

SCALES = [0.25, 0.5, 1.0, 2.0]
LOWEST = 0.05  # of the scores that can be asked for
MAX_PIXELS = 40e6  # at the largest scale; the memory that a detector needs grows with them
SHOWN_BUTTONS = ["download", "fullscreen"]
KEPT_SECONDS = 600  # a photograph, and as often it is looked for older ones


def main(argv=None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve (default 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to serve (default 7860)")
    args = parser.parse_args(argv)
    with bad_input_ends(RuntimeError):
        if not args.host.strip():
            raise ValueError("--host is empty")
        if not 0 < args.port < 2**16:
            raise ValueError(f"--port must be in 1 to 65535, got {args.port}")
        serve(args.host, args.port)
    return 0


def serve(host: str, port: int) -> None:
    """Serves the page until Ctrl-C is pressed."""
    with tempfile.TemporaryDirectory(prefix="gs_d2_web_") as folder:
        off = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
        os.environ.update(GRADIO_TEMP_DIR=folder, **off)  # read when gradio is imported
        import gradio

        detector_at((1.0,))  # what it lacks is said now
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # the default's are from elsewhere
        page(gradio).launch(
            server_name=host, server_port=port, share=False, ssr_mode=False, theme=gradio.themes.Default(**fonts)
        )


def page(gradio):
    """The page, which is not served yet."""

    def find(file, threshold, scales, marks):
        try:
            return find_faces(file, threshold, scales, marks)
        except (OSError, ValueError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title="gs_d2", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as blocks:
        gradio.Markdown("# Find faces\nCheck the result: a face that is not found stays visible.")
        with gradio.Row():
            with gradio.Column():
                file = gradio.Image(label="Photograph", type="filepath", image_mode=None, sources=["upload"])
                marks = gradio.Radio(["boxes", *STYLES], value="boxes", label="Boxes, or anonymized")
                threshold = gradio.Slider(LOWEST, 0.95, value=0.5, step=0.05, label="Lowest score of a face")
                scales = gradio.CheckboxGroup(
                    SCALES, value=[1.0], label="Scales (larger ones find smaller faces, and take longer)"
                )
                button = gradio.Button("Find faces", variant="primary")
            with gradio.Column():
                # Without the button that shares a picture on a server of others.
                picture = gradio.Image(label="Faces", format="png", interactive=False, buttons=SHOWN_BUTTONS)
                count = gradio.Textbox(label="Found", interactive=False)
                text = gradio.Code(label="JSON", language="json", interactive=False, max_lines=20)
        marks.change(threshold_for, marks, threshold)
        button.click(find, [file, threshold, scales, marks], [picture, count, text], api_name="find_faces")
    return blocks


def threshold_for(marks: str) -> float:
    """A lower one for faces that must not stay visible."""
    return 0.5 if marks == "boxes" else THRESHOLD


def find_faces(file: str | None, threshold: float, scales: list[float], marks: str) -> tuple[Image.Image, str, str]:
    """What the page shows of a photograph.

    Args:
        file: the photograph's path; None where none was chosen.
        threshold: lowest score of a face, at least LOWEST.
        scales: of the photograph's own size; the detector is run on each.
        marks: "boxes", or a style of :func:`gs_d2.anonymization.anonymize`.

    Returns:
        The picture with the faces marked, of pixels only; the number of faces in words; and the JSON of `demo.py
        --json` for this photograph.

    Raises:
        OSError, ValueError: there is no photograph, or it cannot be read; no scale; or too many pixels at the largest.
    """
    if not file:
        raise ValueError("choose a photograph first")
    if not scales:
        raise ValueError("choose at least one scale")
    image = as_rgb(file)
    pixels = image.width * image.height * max(scales) ** 2
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels at scale {max(scales):g} are more than {MAX_PIXELS / 1e6:.0f} "
            "million: choose a smaller scale"
        )
    boxes, scores = detector_at(tuple(sorted(scales))).detect(image)
    is_face = scores >= np.float32(threshold)
    boxes, scores = boxes[is_face], scores[is_face]
    if marks == "boxes":
        marked = pixels_only(draw(image, boxes, [FACE] * len(boxes), scores))
    else:
        marked = anonymize(image, boxes, marks)
    count = "1 face" if len(boxes) == 1 else f"{len(boxes)} faces"
    return marked, count, json_text(record(os.path.basename(file), image, boxes, scores), indent=1)


@cache
def detector_at(scales: tuple[float, ...]) -> FaceDetector:
    """The trained detector, run at these scales; there are 15 selections, and a model is small."""
    pyramid = ["INPUT.MIN_SIZE_TEST", 0, "TEST.GS.PYRAMID", True, "TEST.GS.SCALES", list(scales)]
    return FaceDetector(confidence_threshold=LOWEST, opts=pyramid)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the photographs are removed
    sys.exit(main())
