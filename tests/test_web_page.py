"""What the web page shows of a photograph, without gradio."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gs_d2 import web_page
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

    monkeypatch.setattr("gs_d2.web_page.detector_at", detector_at)
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
    picture, count, text = web_page.find_faces(str(path), 0.5, [1.0, 0.5], "boxes")
    assert np.array_equal(picture, draw(image, BOXES[:1], [FACE], SCORES[:1])) and picture.info == {}
    assert count == "1 face" and asked == [(0.5, 1.0)]
    expected = {"file": "x.png", "width": 120, "height": 80, "boxes": BOXES[:1].tolist(), "scores": [0.9]}
    assert json.loads(text) == expected


@pytest.mark.parametrize("style", STYLES)
def test_anonymized(asked, photograph, style):
    path, image = photograph
    picture, count, _ = web_page.find_faces(str(path), 0.3, [1.0], style)
    assert np.array_equal(picture, anonymize(image, BOXES, style)) and count == "2 faces"
    assert web_page.threshold_for(style) == THRESHOLD < web_page.threshold_for("boxes")


def test_what_is_refused(asked, photograph, tmp_path, monkeypatch):
    path = str(photograph[0])
    with pytest.raises(ValueError, match="choose a photograph first"):
        web_page.find_faces(None, 0.5, [1.0], "boxes")
    with pytest.raises(ValueError, match="choose at least one scale"):
        web_page.find_faces(path, 0.5, [], "boxes")
    (tmp_path / "y.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        web_page.find_faces(str(tmp_path / "y.jpg"), 0.5, [1.0], "boxes")
    monkeypatch.setattr("gs_d2.web_page.MAX_PIXELS", 4 * 120 * 80)
    web_page.find_faces(path, 0.5, [2.0], "boxes")
    monkeypatch.setattr("gs_d2.web_page.MAX_PIXELS", 4 * 120 * 80 - 1)
    with pytest.raises(ValueError, match=r"120 x 80 pixels at scale 2 .* choose a smaller scale"):
        web_page.find_faces(path, 0.5, [0.25, 2.0], "boxes")


def test_the_detectors(monkeypatch):
    """One for each selection of scales; it is asked for all scores that the page can show."""
    made = []
    monkeypatch.setattr("gs_d2.web_page.FaceDetector", lambda **options: made.append(options) or len(made))
    web_page.detector_at.cache_clear()
    assert [web_page.detector_at(scales) for scales in ((1.0,), (0.5, 1.0), (1.0,))] == [1, 2, 1]
    web_page.detector_at.cache_clear()
    assert made[1]["opts"][-1] == [0.5, 1.0] and made[1]["confidence_threshold"] == web_page.LOWEST
