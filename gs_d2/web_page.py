"""What a web page shows of a photograph, and the page itself, for whichever gradio it is given (`demo/web.py`)."""

import os
from functools import cache

import numpy as np
from PIL import Image

from gs_d2.anonymization import STYLES, THRESHOLD, anonymize
from gs_d2.formats.found_faces import record
from gs_d2.formats.images import as_rgb, pixels_only
from gs_d2.formats.json_text import json_text
from gs_d2.inference import FaceDetector
from gs_d2.visualization import FACE, draw

SCALES = [0.25, 0.5, 1.0, 2.0]
LOWEST = 0.05  # of the scores that can be asked for
MAX_PIXELS = 40e6  # at the largest scale; the memory that a detector needs grows with them
KEPT_SECONDS = 600  # a photograph, and as often it is looked for older ones
SHOWN_BUTTONS = ["download", "fullscreen"]  # without the one that shares a picture on a server of others


def page(gradio):
    """The page, which is not served yet.

    Args:
        gradio: the module; it is no dependency of the package.
    """

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
