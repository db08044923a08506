"""Pictures of any kind become RGB, or are refused with their name."""

import contextlib
import errno
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from gs_d2.formats.images import TransientReadError, as_rgb, pixels_only

EXIF_ORIENTATION = 0x0112
DAMAGED_EXIF = b"Exif\0\0II*\0\x08\0\0"


def picture(size=(24, 16)):
    """A smooth RGB image whose corners differ."""
    x, y = np.meshgrid(np.linspace(40, 200, size[0]), np.linspace(10, 120, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).round().astype(np.uint8))


def near(image, expected, tolerance):
    assert image.mode == "RGB" and image.size == expected.size
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected.convert("RGB"), dtype=int))
    return difference.max() <= tolerance


def turned(orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


def deep(image):
    """Its grey values in 16 bits; the low byte must not matter."""
    grey = np.asarray(image.convert("L"), dtype=np.uint16)
    return Image.fromarray(grey * 256 + 77)


ODD_BUT_FINE = {  # name -> (saved image, options, what it is, tolerance)
    "grey": (picture().convert("L"), {}, picture().convert("L"), 0),
    "grey with alpha": (picture().convert("LA"), {}, picture().convert("L"), 0),
    "palette": (picture().quantize(256), {}, picture(), 12),
    "palette, transparent": (picture().quantize(8), {"transparency": bytes([0, 9, 200])}, picture().quantize(8), 0),
    "alpha": (picture().convert("RGBA"), {}, picture(), 0),
    "two colours": (picture().convert("1"), {}, picture().convert("1"), 0),
    "16 bit": (deep(picture()), {}, picture().convert("L"), 0),
    "1 x 1": (Image.new("RGB", (1, 1), (9, 8, 7)), {}, Image.new("RGB", (1, 1), (9, 8, 7)), 0),
    "20,000 px": (picture((20_000, 20)), {}, picture((20_000, 20)), 0),
    "turned": (picture(), {"exif": turned(6)}, picture().transpose(Image.Transpose.ROTATE_270), 0),
    "mirrored": (picture(), {"exif": turned(2)}, picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT), 0),
    "orientation of no meaning": (picture(), {"exif": turned(77)}, picture(), 0),
    "damaged EXIF": (
        picture(),
        {"exif": DAMAGED_EXIF},
        picture(),
        0,
    ),
}


@pytest.mark.parametrize("name", ODD_BUT_FINE)
def test_odd_pictures_are_read(tmp_path, name):
    image, options, expected, tolerance = ODD_BUT_FINE[name]
    image.save(tmp_path / "a.png", **options)
    assert near(as_rgb(tmp_path / "a.png"), expected, tolerance)


def test_cmyk_is_read(tmp_path):
    smooth = picture((64, 48))
    smooth.convert("CMYK").save(tmp_path / "a.jpg", quality=98, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.mode == "CMYK"
    assert near(as_rgb(tmp_path / "a.jpg"), smooth, 6)


def test_the_ending_does_not_matter(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert near(as_rgb(tmp_path / "a.jpg"), picture(), 0)


def jpeg(path, size=(64, 48)):
    picture(size).save(path, quality=95)
    return path.read_bytes()


def bomb(path):
    """A PNG of a few bytes that says it has 50,000 x 50,000 pixels."""
    picture().save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 50_000, 50_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def link_to_itself(path):
    path.symlink_to(path)


BAD = {  # name -> (what makes the file, what the message says)
    "truncated": (lambda p: p.write_bytes(jpeg(p)[:-200]), "truncated"),
    "header only": (lambda p: p.write_bytes(jpeg(p)[:30]), "cannot be read as an image"),
    "zero bytes": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text": (lambda p: p.write_text("<html>404</html>"), "cannot identify"),
    "folder": (lambda p: p.mkdir(), "it is not a file"),
    "pipe": (os.mkfifo, "it is not a file"),
    "bomb": (bomb, r"2500000000 pixels.* raise PIL\.Image\.MAX_IMAGE_PIXELS"),
    "floats": (lambda p: Image.fromarray(np.ones((4, 4), np.float32)).save(p, format="TIFF"), "floats"),
    "link to itself": (link_to_itself, "no such image"),
    "missing": (lambda p: None, "no such image"),
}


def test_no_program_is_run_for_a_picture(tmp_path, monkeypatch):
    """Pillow starts Ghostscript for what is PostScript by content, whatever its name."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once, then remembered
    path = tmp_path / "a.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match=r"a\.jpg: .*PostScript is a program"):
        as_rgb(path)
    with Image.open(path) as file, pytest.raises(ValueError, match="PostScript is a program"):
        as_rgb(file)
    assert not (tmp_path / "ran").exists()
    with Image.open(path) as file, contextlib.suppress(Exception):
        file.load()
    assert (tmp_path / "ran").exists(), "Pillow would have run nothing: this test shows nothing"


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_refused_by_name(tmp_path, name):
    make, message = BAD[name]
    path = tmp_path / "broken_1.jpg"
    make(path)
    error = FileNotFoundError if message == "no such image" else ValueError
    with pytest.raises(error, match=f"(?s)broken_1.jpg.*{message}|{message}.*broken_1.jpg"):
        as_rgb(path)


def test_the_limit_is_pillows(tmp_path, monkeypatch):
    """Who trusts larger pictures raises it for all of Pillow, and nobody's setting is changed."""
    picture((100, 90)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    assert as_rgb(tmp_path / "a.png").size == (100, 90)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ValueError, match=r"9000 pixels.*exceeds limit of 8000.* raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        as_rgb(tmp_path / "a.png")
    assert Image.MAX_IMAGE_PIXELS == 4000


@pytest.mark.parametrize("where", ["PIL.Image.open", "os.stat"])
def test_a_drive_that_does_not_answer_is_no_bad_picture(tmp_path, monkeypatch, where):
    path = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(path)

    def fail(code):
        def no_answer(*_, **__):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(where, no_answer)

    for code in (errno.EIO, errno.ESTALE):
        fail(code)
        with pytest.raises(TransientReadError, match=r"x\.png: cannot be read at the moment") as error:
            as_rgb(path)
        assert error.value.errno == code
    fail(errno.ENOENT)
    with pytest.raises(FileNotFoundError if where == "os.stat" else ValueError, match=r"x\.png"):
        as_rgb(path)


def test_colours_of_another_profile_are_converted():
    """A phone's pictures have a profile of their own; without it their colours would be others."""
    image = Image.new("RGB", (8, 8), (200, 60, 60))
    same = pixels_only(image)
    assert np.array_equal(same, image) and same is not image
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(np.asarray(pixels_only(image)).astype(int) - np.asarray(image)).max() <= 1
    image.info["icc_profile"] = wide_profile()
    converted = np.asarray(pixels_only(image)).astype(int)[0, 0]
    assert converted[0] > 205 and pixels_only(image).info == {}
    for profile in (b"damaged", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()):
        image.info["icc_profile"] = profile
        assert np.array_equal(pixels_only(image), image)


def wide_profile() -> bytes:
    """sRGB with the red primary's and the green primary's places changed, so that the same values are more red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    for i in range(count):
        entry = 132 + 12 * i
        if bytes(profile[entry : entry + 4]) == b"rXYZ":
            at = int.from_bytes(profile[entry + 4 : entry + 8], "big") + 8
            profile[at : at + 4] = int(0.6 * 65536).to_bytes(4, "big")  # X of red, 0.436 in sRGB
    return bytes(profile)
