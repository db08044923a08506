"""demo/demo.py: every picture is drawn, anonymized or named as failing, and no input is overwritten."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image, ImageCms, ImageShow
from PIL.PngImagePlugin import PngInfo

from demo import main
from gs_d2.anonymization import anonymize
from gs_d2.config import load_config
from gs_d2.formats.images import as_rgb
from gs_d2.inference import FaceDetector
from gs_d2.visualization import FACE, draw

CONFIG = "configs/quick/demo.yaml"
BOXES = np.array([[20.0, 10, 60, 55], [70, 30, 100, 64]], np.float32)
SCORES = np.array([0.9, 0.6], np.float32)


@pytest.fixture
def made(monkeypatch):
    """The script's detector finds two faces in every picture; this is what its detectors were made with."""
    made = []

    class Detector:
        def __init__(self, cfg, confidence_threshold):
            made.append((cfg, confidence_threshold))

        def detect(self, image):
            return BOXES, SCORES

    monkeypatch.setattr("demo.FaceDetector", Detector)
    return made


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, mode in (("b.jpg", "L"), ("a.png", "RGBA"), ("c[1].jpg", "CMYK"), ("d.tif", "I;16")):
        grey = np.full((80, 120), 90, np.uint8)
        image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
        image.save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(*arguments, opts=()):
    return main(["--config-file", CONFIG, *map(str, arguments), *(["--opts", *opts] if opts else [])])


def is_drawn(path):
    """Whether both boxes are on the picture."""
    with Image.open(path) as image:
        assert image.size == (120, 80)
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    green = np.abs(pixels - FACE).max(axis=2) < 90
    return green[20:50, 18:23].any(axis=1).all() and green[35:60, 68:73].any(axis=1).all()


def test_a_folder(made, pictures, tmp_path, capsys):
    assert run("--input", pictures, "--output", tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.png", "b.jpg", "c[1].jpg", "d.png"]
    assert all(is_drawn(tmp_path / "out" / name) for name in names)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.strip()]
    assert len(lines) == 4
    for name, line in zip(sorted(os.listdir(pictures))[:4], lines, strict=True):
        assert re.fullmatch(rf"\s*{re.escape(str(pictures / name))}: 2 faces in \d+\.\d\d s -> .*", line)
    assert "4/4" in err  # the progress bar


def test_globs_files_and_one_file(made, pictures, tmp_path):
    assert run("--input", pictures / "*.jpg", pictures / "a.png", "--output", tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "b.jpg", "c[1].jpg"]
    # A file whose name looks like a pattern, and one output file in a new folder.
    assert run("--input", pictures / "c[1].jpg", "--output", tmp_path / "new" / "one.png") == 0
    assert is_drawn(tmp_path / "new" / "one.png")


def test_equal_names_get_files_of_their_own(made, pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (120, 80)).save(other / "b.jpg")
    assert run("--input", pictures / "b.jpg", other / "b.jpg", "--output", tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["b.jpg", "b_2.jpg"]


def test_a_bad_picture_is_named_and_skipped(made, pictures, tmp_path, capsys):
    (pictures / "b.jpg").write_bytes(b"no picture")
    assert run("--input", pictures, tmp_path / "none.jpg", "--output", tmp_path / "out") == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "c[1].jpg", "d.png"]
    err = capsys.readouterr().err
    assert f"demo: {pictures / 'b.jpg'}: cannot be read as an image" in err
    assert f"demo: no such image: {tmp_path / 'none.jpg'}" in err
    assert "2 of 5 pictures failed" in err


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        (["b.jpg"], "pictures", r"would overwrite the input .*b\.jpg"),
        (["b.jpg"], "pictures/b.jpg", r"would overwrite the input .*b\.jpg"),
        (["."], "out.jpg", "one file for 4 pictures: name a folder"),
        (["b.jpg"], "out.txt", r"must end in \.bmp"),
        (["*.gif"], "out", r"no pictures: .*\*\.gif"),
        (["b.jpg"], None, "no screen to show pictures on: add --output"),
    ],
)
def test_what_is_refused(made, pictures, tmp_path, monkeypatch, inputs, output, message, refused):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    before = {path.name: path.read_bytes() for path in pictures.iterdir()}
    outputs = [] if output is None else ["--output", tmp_path / output]
    with refused(message):
        run("--input", *(pictures / name for name in inputs), *outputs)
    assert {path.name: path.read_bytes() for path in pictures.iterdir()} == before
    assert not made, "it is said before the model is built"


def test_on_a_screen(made, pictures, monkeypatch):
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(ImageShow, "show", lambda image: shown.append(image) or True)
    assert run("--input", pictures / "b.jpg") == 0
    assert [image.size for image in shown] == [(120, 80)]


@pytest.mark.parametrize(
    ("opts", "pyramid", "scales"),
    [
        ([], True, [0.25, 0.5, 1.0]),
        (["TEST.GS.SCALES", "[0.5,2.0]"], True, [0.5, 2.0]),
        (["TEST.GS.PYRAMID", "False"], False, None),
        (["TEST.GS.PYRAMID", "True"], True, [0.25 * n for n in range(1, 9)]),
        (["INPUT.MIN_SIZE_TEST", "300"], None, None),
    ],
)
def test_scales(made, pictures, tmp_path, opts, pyramid, scales):
    """Several unless they are chosen; what contradicts them stays as given, for the detector to refuse."""
    run("--input", pictures / "b.jpg", "--output", tmp_path, "--confidence-threshold", "0.3", opts=opts)
    ((cfg, threshold),) = made
    assert threshold == 0.3
    if pyramid is None:
        assert cfg.INPUT.MIN_SIZE_TEST == 300
        return
    assert cfg.TEST.GS.PYRAMID == pyramid
    assert scales is None or cfg.TEST.GS.SCALES == scales


def test_a_config_with_a_pyramid_keeps_it(made, pictures, tmp_path):
    arguments = ["--config-file", "configs/wider_gs.yaml", "--input", pictures / "b.jpg", "--output", tmp_path]
    assert main([str(argument) for argument in arguments]) == 0
    assert len(made[0][0].TEST.GS.SCALES) == 8


def jpeg_with_all(path, face):
    """A sideways picture with its EXIF thumbnail, owner, XMP, comment, profile and a second picture (MPO)."""
    thumbnail = io.BytesIO()
    face.resize((60, 40)).save(thumbnail, "JPEG")
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "the owner's name"  # orientation, artist
    exif.get_ifd(0x8769)[0x927C] = b"maker's note " + thumbnail.getvalue()
    plain = exif.tobytes()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    face.rotate(90, expand=True).save(
        path,
        "MPO",
        save_all=True,
        append_images=[face],
        exif=plain + thumbnail.getvalue(),
        xmp=b"<x:xmpmeta>the owner's name</x:xmpmeta>",
        comment=b"the owner's name",
        icc_profile=profile,
    )
    with Image.open(path) as file:
        assert file.n_frames == 2 and file.info["exif"] and file.info["comment"] and file.info["icc_profile"]
    content = path.read_bytes()
    assert content.count(thumbnail.getvalue()) >= 2 and content.count(b"the owner's name") >= 3


def animation(path, face):
    face.save(path, save_all=True, append_images=[face.rotate(180)], duration=50)


def png_with_texts(path, face):
    texts = PngInfo()
    texts.add_text("Raw profile type exif", "the owner's name")
    texts.add_itxt("XML:com.adobe.xmp", "the owner's name")
    face.save(path, pnginfo=texts, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".bmp"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("x.jpg", jpeg_with_all),
        ("x.gif", animation),
        ("x.webp", animation),
        ("x.tif", animation),
        ("x.png", png_with_texts),
    ],
)
def test_an_anonymized_picture_is_pixels_only(made, tmp_path, name, make, ending):
    rng = np.random.default_rng(0)
    face = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).resize((120, 80), Image.Resampling.NEAREST)
    make(tmp_path / name, face)
    expected = anonymize(as_rgb(tmp_path / name), BOXES, "mosaic")
    output = tmp_path / f"out{ending}"
    for opts in (["--anonymize", "mosaic"], []):
        assert run("--input", tmp_path / name, "--output", output, *opts) == 0
        content = output.read_bytes()
        assert content.count(b"\xff\xd8\xff") == (ending == ".jpg"), "one JPEG in it at most: no thumbnail"
        for mark in (b"Exif", b"eXIf", b"EXIF", b"owner", b"xmp", b"XMP", b"MPF", b"ICC", b"iCCP", b"tEXt", b"iTXt"):
            assert mark not in content, mark
        with Image.open(output) as image:
            assert getattr(image, "n_frames", 1) == 1 and image.size == (120, 80)
            assert (
                not set(image.info)
                - {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "compression"}
                - {*("loop", "background", "timestamp", "duration")}
            )
            if opts:
                difference = np.asarray(image.convert("RGB")).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 12 and (ending not in (".png", ".bmp") or not difference.any())


@pytest.mark.parametrize(
    ("arguments", "threshold"),
    [([], 0.5), (["--anonymize", "solid"], 0.15), (["--anonymize", "solid", "--confidence-threshold", "0.4"], 0.4)],
)
def test_the_threshold_is_lower_for_what_must_not_be_missed(made, pictures, tmp_path, arguments, threshold):
    assert run("--input", pictures / "b.jpg", "--output", tmp_path / "out", *arguments) == 0
    assert made[0][1] == threshold


def test_json_crops_and_pictures_together(made, pictures, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (120, 80)).save(other / "b.jpg")
    (other / "broken.jpg").touch()
    out, crops, faces = tmp_path / "out", tmp_path / "crops", tmp_path / "new" / "faces.json"
    inputs = [pictures / "b.jpg", other]
    flags = ["--output", out, "--save-crops", crops, "--json", faces, "--anonymize", "solid"]
    assert run("--input", *inputs, *flags) == 1
    assert sorted(os.listdir(out)) == ["b.jpg", "b_2.jpg"]
    read = json.loads(faces.read_text())
    of = {"width": 120, "height": 80, "boxes": BOXES.tolist(), "scores": [0.9, 0.6]}
    assert read == [{"file": str(path), **of} for path in (pictures / "b.jpg", other / "b.jpg")]
    with open(crops / "faces.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["crop"] for row in rows} | {"faces.csv"} == set(os.listdir(crops)) and len(rows) == 4
    assert [row["file"] for row in rows] == [str(pictures / "b.jpg")] * 2 + [str(other / "b.jpg")] * 2
    with Image.open(crops / rows[0]["crop"]) as crop:  # as the face was, though the picture is anonymized
        assert np.asarray(crop).min() > 80
    with Image.open(out / "b.jpg") as image:
        assert np.asarray(image)[30, 40].max() < 8


def test_json_or_crops_alone_need_no_screen_and_write_no_pictures(made, pictures, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    before = set(tmp_path.rglob("*"))
    assert run("--input", pictures, "--json", tmp_path / "faces.json") == 0
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "faces.json"}
    assert len(json.loads((tmp_path / "faces.json").read_text())) == 4
    assert run("--input", pictures, "--save-crops", tmp_path / "crops") == 0
    assert len(os.listdir(tmp_path / "crops")) == 9
    with refused("no screen"):  # where the anonymized pictures would be
        run("--input", pictures, "--json", tmp_path / "faces.json", "--anonymize", "blur")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "{pictures}/b.jpg"], r"--json would overwrite the input .*b\.jpg"),
        (["--json", "{out}/b.jpg"], r"--json .*b\.jpg is a file of --output: name another"),
        (["--json", "{pictures}"], "--json .*is a folder: name a file"),
        (["--json", "{out}/faces.csv", "--save-crops", "{out}"], "is the table of --save-crops"),
        (["--save-crops", "{pictures}/b.jpg"], "--save-crops .*cannot be made a folder"),
        (["--anonymize", "pixels"], "invalid choice"),
    ],
)
def test_what_is_refused_of_json_and_crops(made, pictures, tmp_path, flags, message, refused):
    before = (pictures / "b.jpg").read_bytes()
    flags = [flag.format(pictures=pictures, out=tmp_path / "out") for flag in flags]
    with refused(message):
        run("--input", pictures / "b.jpg", "--output", tmp_path / "out", *flags)
    assert (pictures / "b.jpg").read_bytes() == before and not made


def test_videos_without_opencv(made, tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "cv2", None)
    for source in (["--webcam"], ["--video-input", "x.mp4"]):
        with refused(r"need OpenCV .*pip install opencv-python"):
            run(*source, "--output", tmp_path)


def made_up_cv2(frames, written, says=None, lost=0, rate=24.0):
    """OpenCV's interface, as far as the demo uses it: the video has these frames, and `written` gets the others.

    Args:
        frames: an exception among them is raised.
        says: how many frames the container names, if others than there are.
        lost: how many of those written are not in the file.
    """
    left = iter(frames)

    class Writer:
        def __init__(self, path, codec, rate, size):
            written.append((path, rate, size))

        def isOpened(self):
            return True

        def write(self, frame):
            written.append(frame)

        def release(self):
            written.append("released")

    def read():
        frame = next(left, None)
        if isinstance(frame, BaseException):
            raise frame
        return frame is not None, frame

    def capture(source):
        named = len(frames) if says is None else says
        num_written = sum(isinstance(frame, np.ndarray) for frame in written) - lost
        count = num_written if written and written[-1] == "released" else named
        return SimpleNamespace(
            isOpened=lambda: True, read=read, release=lambda: None, get=lambda what: {1: count, 2: rate}[what]
        )

    return SimpleNamespace(
        VideoCapture=capture,
        VideoWriter=Writer,
        VideoWriter_fourcc=lambda *letters: "".join(letters),
        CAP_PROP_FRAME_COUNT=1,
        CAP_PROP_FPS=2,
    )


def test_a_video(made, tmp_path, monkeypatch, capsys, refused):
    blue = np.zeros((80, 120, 3), np.uint8)
    blue[:, :, 0] = 200  # BGR
    written = []
    monkeypatch.setitem(sys.modules, "cv2", made_up_cv2([blue, blue, blue], written))
    (tmp_path / "x.avi").touch()
    assert run("--video-input", tmp_path / "x.avi", "--output", tmp_path / "out") == 0
    (path, rate, size), *frames, end = written
    assert (path, rate, size, end) == (str(tmp_path / "out" / "x.mp4"), 24.0, (120, 80), "released")
    expected = np.asarray(draw(Image.new("RGB", (120, 80), (0, 0, 200)), BOXES, [FACE] * 2, SCORES))[:, :, ::-1]
    assert len(frames) == 3 and all(np.array_equal(frame, expected) for frame in frames)
    assert "6 faces in 3 frames" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "cv2", made_up_cv2([], written))
    with refused("has no frame that can be read"):
        run("--video-input", tmp_path / "x.avi", "--output", tmp_path / "out")


@pytest.fixture
def blinking(monkeypatch):
    """The script's detector finds a face in these frames of a video only; it moves by 2 px a frame."""

    def blinking(found_in):
        class Detector:
            def __init__(self, cfg, confidence_threshold):
                self.frame = -1

            def detect(self, image):
                self.frame += 1
                n = int(self.frame in found_in)
                return BOXES[:n] + np.float32([2, 0, 2, 0]) * self.frame, SCORES[:n]

        monkeypatch.setattr("demo.FaceDetector", Detector)

    return blinking


def test_a_face_that_blinks_out_stays_covered(blinking, tmp_path, monkeypatch):
    """24 frames a second: gaps of 12 frames, and 12 frames before and after."""
    blinking({0, 1, 10, 30})
    white = np.full((80, 120, 3), 255, np.uint8)
    written = []
    monkeypatch.setitem(sys.modules, "cv2", made_up_cv2([white] * 50, written))
    (tmp_path / "x.avi").touch()
    flags = ["--anonymize", "solid", "--json", tmp_path / "x.json", "--save-crops", tmp_path / "crops"]
    assert run("--video-input", tmp_path / "x.avi", "--output", tmp_path / "out", *flags) == 0
    _, *frames, end = written
    assert end == "released" and len(frames) == 50
    black = [(frame.max(axis=2) == 0) for frame in frames]
    for i in (*range(11), 30):
        assert black[i][10:55, 20 + 2 * i : 60 + 2 * i].all(), f"the moving box of frame {i}"
    assert all(black[i][10:55, 40:80].all() for i in range(11, 23)), "held after frame 10"
    assert all(black[i][10:55, 80:].all() for i in range(18, 43)), "held before and after frame 30"
    assert not any(black[i].any() for i in range(43, 50))
    read = json.loads((tmp_path / "x.json").read_text())
    assert [record["frame"] for record in read] == list(range(50))
    assert [record["frame"] for record in read if record["boxes"]] == [0, 1, 10, 30], "as found, without those added"
    names = {f"x_{frame:06d}_1.png" for frame in (0, 1, 10, 30)}
    assert set(os.listdir(tmp_path / "crops")) == {"faces.csv", *names}


def test_a_video_to_json_alone(made, tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setitem(sys.modules, "cv2", made_up_cv2([np.zeros((80, 120, 3), np.uint8)] * 3, written))
    (tmp_path / "x.avi").touch()
    assert run("--video-input", tmp_path / "x.avi", "--json", tmp_path / "x.json") == 0
    assert written == [] and "6 faces in 3 frames" in capsys.readouterr().out
    assert [len(record["boxes"]) for record in json.loads((tmp_path / "x.json").read_text())] == [2, 2, 2]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), ArithmeticError("codec")])
def test_what_was_found_before_a_video_ends_early_is_written(made, tmp_path, monkeypatch, end):
    """Ctrl-C is how a webcam's video ends."""
    frames, written = [np.zeros((80, 120, 3), np.uint8)] * 4, []
    monkeypatch.setitem(sys.modules, "cv2", made_up_cv2([*frames, end], written))
    flags = ["--output", tmp_path / "y.mp4", "--json", tmp_path / "y.json", "--anonymize", "blur"]
    if isinstance(end, KeyboardInterrupt):
        assert run("--webcam", *flags) == 0
        assert len(written) == 6, "the frames that waited, too"
    else:
        (tmp_path / "x.avi").touch()
        with pytest.raises(SystemExit):
            run("--video-input", tmp_path / "x.avi", *flags)
    assert len(json.loads((tmp_path / "y.json").read_text())) == 4


@pytest.mark.parametrize(("rate", "taken"), [(0, 25), (float("nan"), 25), (-5, 25), (90000, 25), (60, 60)])
def test_a_frame_rate_that_cannot_be(made, tmp_path, monkeypatch, rate, taken):
    written = []
    cv2 = made_up_cv2([np.zeros((80, 120, 3), np.uint8)], written, rate=rate)
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    (tmp_path / "x.avi").touch()
    assert run("--video-input", tmp_path / "x.avi", "--output", tmp_path / "y.mp4", "--anonymize", "solid") == 0
    assert written[0] == (str(tmp_path / "y.mp4"), taken, (120, 80)) and len(written) == 3


@pytest.mark.parametrize(
    ("says", "status", "printed", "err"),
    [
        (100, 1, "in 40 of 100 frames", r"x\.avi: ends early, or cannot be decoded further: 40 of 100 frames are done"),
        (41, 1, "in 40 of 41 frames", "40 of 41 frames are done"),
        (40, 0, "in 40 frames", "^$"),
        (39, 0, "in 40 frames", "^$"),
        (0, 0, "in 40 frames", "^$"),
        (-(2**63), 0, "in 40 frames", "^$"),
        (2**62, 0, "in 40 frames", "^$"),
    ],
)
def test_a_video_that_ends_early(made, tmp_path, monkeypatch, capsys, says, status, printed, err):
    """The container's number of frames may be missing, or wrong."""
    frames = [np.zeros((80, 120, 3), np.uint8)] * 40
    monkeypatch.setitem(sys.modules, "cv2", made_up_cv2(frames, [], says))
    (tmp_path / "x.avi").touch()
    assert run("--video-input", tmp_path / "x.avi", "--output", tmp_path / "new" / "deep" / "y.mp4") == status
    assert (tmp_path / "new" / "deep").is_dir(), "made for the video"
    out = capsys.readouterr()
    assert printed in out.out
    assert re.search(err, "\n".join(line for line in out.err.splitlines() if line.startswith("demo: ")))


def test_a_video_that_cannot_be_decoded_or_written(made, tmp_path, monkeypatch, capsys, refused):
    frames, written = [np.zeros((80, 120, 3), np.uint8)] * 4, []
    (tmp_path / "x.avi").touch()
    monkeypatch.setitem(sys.modules, "cv2", made_up_cv2([*frames, ArithmeticError("codec")], written))
    with refused(r"x\.avi: stopped after 4 frames: codec"):
        run("--video-input", tmp_path / "x.avi", "--output", tmp_path / "y.mp4")
    assert written[-1] == "released", "what was written can be played"
    monkeypatch.setitem(sys.modules, "cv2", made_up_cv2(frames, [], lost=3))
    assert run("--video-input", tmp_path / "x.avi", "--output", tmp_path / "y.mp4") == 1
    assert "y.mp4: only 1 of 4 frames could be written" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with refused(r"--output .*file: cannot be made a folder"):
        run("--video-input", tmp_path / "x.avi", "--output", tmp_path / "file" / "y.mp4")


def test_what_is_no_picture_in_a_folder_is_passed_over(made, pictures, tmp_path, capsys):
    names = "a.pdf b.h5 c.eps d.fits e.mpg f.json Thumbs.db ._b.jpg .DS_Store g.wmf h.grib i.hdf j.txt".split()
    for name in names:
        (pictures / name).write_bytes(b"x")
    (pictures / "folder.jpg").mkdir()
    (pictures / "b.jpg").rename(pictures / "b.JPG")
    for source in (pictures, pictures / "*"):
        assert run("--input", source, "--output", tmp_path / "out") == 0
        assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "b.JPG", "c[1].jpg", "d.png"]
    # A pattern that names such files is taken at its word, and so is a file.
    assert run("--input", pictures / "*.json", pictures / "b.h5", "--output", tmp_path / "out") == 1
    assert "2 of 2 pictures failed" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["jxl", "SVG", "cr3", "NEF", "avif"])
def test_pictures_that_pillow_does_not_read_are_named(made, pictures, tmp_path, capsys, ending):
    """They count as failed, as HEIC does; documents and data in a folder are passed over."""
    (pictures / f"l.{ending}").write_bytes(b"a picture of another kind")
    (pictures / "k.pdf").write_bytes(b"%PDF-1.4")
    (pictures / "p.h5").write_bytes(b"\x89HDF")
    assert run("--input", pictures, "--output", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert f"l.{ending}: cannot be read as an image" in err and "1 of 5 pictures failed" in err
    assert "convert it to JPEG" in err or ending == "avif"


def test_heic_is_named_or_read(made, pictures, tmp_path, monkeypatch, capsys):
    (pictures / "l.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert run("--input", pictures, "--output", tmp_path / "out") == 1
    out = capsys.readouterr()
    assert re.search(r"l\.HEIC: cannot be read as an image \(HEIC.*pip install pillow-heif", out.err)
    assert "1 of 5 pictures failed" in out.err and len(os.listdir(tmp_path / "out")) == 4

    def register_heif_opener():  # in place of the real one, which gives Pillow the same
        Image.register_open("HEIF", lambda file, name: Image.new("RGB", (120, 80)), lambda head: b"ftypheic" in head)

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    assert run("--input", pictures / "l.HEIC", "--output", tmp_path / "out") == 0
    assert is_drawn(tmp_path / "out" / "l.png")


@pytest.mark.parametrize(
    ("name", "encoding"), [("\u9854 \u5199.jpg", "cp1252"), ("caf\udce9.jpg", "utf-8"), ("\u9854.jpg", "ascii")]
)
def test_a_name_that_the_console_cannot_print(made, pictures, tmp_path, monkeypatch, name, encoding):
    try:
        (pictures / "b.jpg").rename(pictures / name)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    assert run("--input", pictures / name, pictures / "a.png", tmp_path / name, "--output", tmp_path / "out") == 1
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["a.png", name])
    printed = [stream.detach().getvalue() for stream in streams]
    assert b".jpg: 2 faces in" in printed[0] and b"no such image: " in printed[1]


def test_the_folder_of_pictures_cannot_be_made(made, pictures, tmp_path, refused):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "x", tmp_path / "file" / "x.jpg", tmp_path / "file"):
        with refused(r"--output .*file.*: cannot be made a folder"):
            run("--input", pictures / "b.jpg", "--output", output)
    assert not made


def test_the_command_with_a_model(pictures, tmp_path):
    """From a checkpoint to pictures, in a process of its own; a wrong checkpoint is one line."""
    torch.manual_seed(0)
    weights, out = tmp_path / "model.pth", tmp_path / "out"
    torch.save(build_model(load_config(CONFIG)).state_dict(), weights)
    (pictures / "bad.jpg").touch()
    boxes, _ = FaceDetector(
        CONFIG, weights, opts=("TEST.GS.PYRAMID", True, "TEST.GS.SCALES", [0.25, 0.5, 1.0]), confidence_threshold=0.4
    ).detect(pictures / "b.jpg")

    def command(*opts):
        arguments = ["--config-file", CONFIG, "--input", pictures, "--output", out, "--confidence-threshold", "0.4"]
        line = [sys.executable, "demo/demo.py", *map(str, arguments), "--opts", *map(str, opts)]
        return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    result = command("MODEL.WEIGHTS", weights)
    assert result.returncode == 1
    assert f"{pictures / 'bad.jpg'}: cannot be read as an image" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(out)) == ["a.png", "b.jpg", "c[1].jpg", "d.png"]
    assert f"{pictures / 'b.jpg'}: {len(boxes)} faces in " in result.stdout and len(boxes) > 1
    result = command("MODEL.WEIGHTS", tmp_path / "none.pth")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("demo.py: error: no such weights: ")
    assert "Traceback" not in result.stderr


def test_lines_and_scores_fit_their_boxes():
    """A crowd's small boxes get thin lines and no scores, also on a large picture; a large box gets thick ones."""
    grey = Image.new("RGB", (2000, 1500), (90, 90, 90))

    def drawn(box, scores=None):
        return np.asarray(draw(grey, [box], [FACE], scores), dtype=int)

    def text_height(box):
        return (drawn(box, [0.5]) != drawn(box)).any(axis=(1, 2)).sum()

    small, middle, large = [100, 100, 120, 120], [100, 100, 150, 150], [100, 100, 1100, 1100]
    assert (drawn(small) == FACE).all(axis=2).sum() == 4 * 20  # one pixel wide
    assert (drawn(large) == FACE).all(axis=2)[500, 90:120].sum() == 5  # a 400th of the picture
    assert text_height(small) == 0
    assert 5 <= text_height(middle) < 15
    assert text_height(large) >= 20  # high enough to be read at this size
