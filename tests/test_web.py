"""demo/web.py: what the page shows, without gradio; and that it is served to this machine only."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import web
from PIL import Image

from gs_d2.anonymization import STYLES, THRESHOLD, anonymize
from gs_d2.visualization import FACE, draw

BOXES = np.array([[20.0, 10, 60, 55], [70, 30, 100, 64]], np.float32)
SCORES = np.array([0.9, 0.3], np.float32)


@pytest.fixture
def asked(monkeypatch):
    """The page's detectors find two faces in every picture; these are the scales that they were made with."""
    asked = []

    def detector_at(scales):
        asked.append(scales)
        return SimpleNamespace(detect=lambda image: (BOXES, SCORES))

    monkeypatch.setattr("web.detector_at", detector_at)
    return asked


@pytest.fixture
def photograph(tmp_path):
    """Sideways, as a phone's."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).rotate(90, expand=True).save(tmp_path / "x.png", exif=exif)
    return tmp_path / "x.png", Image.fromarray(pixels)


def test_boxes(asked, photograph):
    path, image = photograph
    picture, count, text = web.find_faces(str(path), 0.5, [1.0, 0.5], "boxes")
    assert np.array_equal(picture, draw(image, BOXES[:1], [FACE], SCORES[:1])) and picture.info == {}
    assert count == "1 face" and asked == [(0.5, 1.0)]
    expected = {"file": "x.png", "width": 120, "height": 80, "boxes": BOXES[:1].tolist(), "scores": [0.9]}
    assert json.loads(text) == expected


@pytest.mark.parametrize("style", STYLES)
def test_anonymized(asked, photograph, style):
    path, image = photograph
    picture, count, _ = web.find_faces(str(path), 0.3, [1.0], style)
    assert np.array_equal(picture, anonymize(image, BOXES, style)) and count == "2 faces"
    assert web.threshold_for(style) == THRESHOLD < web.threshold_for("boxes")


def test_what_is_refused(asked, photograph, tmp_path, monkeypatch):
    path = str(photograph[0])
    with pytest.raises(ValueError, match="choose a photograph first"):
        web.find_faces(None, 0.5, [1.0], "boxes")
    with pytest.raises(ValueError, match="choose at least one scale"):
        web.find_faces(path, 0.5, [], "boxes")
    (tmp_path / "y.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        web.find_faces(str(tmp_path / "y.jpg"), 0.5, [1.0], "boxes")
    monkeypatch.setattr("web.MAX_PIXELS", 4 * 120 * 80)
    web.find_faces(path, 0.5, [2.0], "boxes")
    monkeypatch.setattr("web.MAX_PIXELS", 4 * 120 * 80 - 1)
    with pytest.raises(ValueError, match=r"120 x 80 pixels at scale 2 .* choose a smaller scale"):
        web.find_faces(path, 0.5, [0.25, 2.0], "boxes")


def test_the_detectors(monkeypatch):
    """One for each selection of scales; it is asked for all scores that the page can show."""
    made = []
    monkeypatch.setattr("web.FaceDetector", lambda **options: made.append(options) or len(made))
    web.detector_at.cache_clear()
    assert [web.detector_at(scales) for scales in ((1.0,), (0.5, 1.0), (1.0,))] == [1, 2, 1]
    web.detector_at.cache_clear()
    assert made[1]["opts"][-1] == [0.5, 1.0] and made[1]["confidence_threshold"] == web.LOWEST


def test_without_gradio(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with refused("pip install gradio$"):
        web.main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port must be in 1 to 65535, got 0"),
        (["--port", "x"], "int"),
        (["--host", " "], "--host is"),
    ],
)
def test_wrong_arguments(arguments, message, refused):
    with refused(message):
        web.main(arguments)


class Gradio:
    """Stands in for the module, and keeps what the page is made of and how it is served."""

    class Error(Exception):
        def __init__(self, message, print_exception):
            super().__init__(message)

    def __init__(self):
        self.blocks, self.served, self.clicked = {}, {}, []
        self.themes = SimpleNamespace(Default=lambda **fonts: fonts)

    def __getattr__(self, name):
        def component(*_, **options):
            if name == "Blocks":
                self.blocks = options
            return self

        return component

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def change(self, *_):
        pass

    def click(self, function, *_, **__):
        self.clicked.append(function)

    def launch(self, **options):
        self.served = {**options, "environment": dict(os.environ)}


@pytest.mark.parametrize("arguments", [[], ["--host", "0.0.0.0", "--port", "8000"]])
def test_how_it_is_served(asked, monkeypatch, arguments):
    gradio = Gradio()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        monkeypatch.setenv(name, "")  # as before, afterwards
    assert web.main(arguments) == 0
    served, environment = gradio.served, gradio.served["environment"]
    assert (served["server_name"], served["server_port"]) == (("0.0.0.0", 8000) if arguments else ("127.0.0.1", 7860))
    assert served["share"] is False and gradio.blocks["analytics_enabled"] is False
    assert environment["GRADIO_ANALYTICS_ENABLED"] == environment["GRADIO_RUN_HISTORY"] == "False"
    assert not os.path.exists(environment["GRADIO_TEMP_DIR"]), "the photographs are gone"
    with pytest.raises(Gradio.Error, match="choose a photograph first"):  # what the page says
        gradio.clicked[0](None, 0.5, [1.0], "boxes")
