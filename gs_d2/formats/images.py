"""Pictures of any kind as RGB, for training, evaluation and demo alike; with Pillow and numpy only."""

import errno
import io
import os

import numpy as np
from PIL import Image, ImageCms, ImageOps

# What a drive, mostly of a network, answers while it cannot; of a bad file it says something else.
_TRANSIENT = {
    getattr(errno, name)
    for name in "EAGAIN EBUSY ECONNRESET EHOSTDOWN EHOSTUNREACH EIO EMFILE ENETUNREACH ENFILE ENOLINK ENOTCONN "
    "EREMOTEIO ESTALE ETIMEDOUT".split()
    if hasattr(errno, name)
}


class TransientReadError(OSError):
    """The drive did not answer, which says nothing of the file; names the path."""


# What Pillow knows by name and are no pictures: documents, programs, measured data, videos.
_NO_PICTURES = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")
_HEIF_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")  # what phones write
# Pictures that Pillow reads in no version, or in some; most of them are what cameras call raw.
_OTHER_SUFFIXES = (".arw", ".avif", ".cr2", ".cr3", ".dng", ".jxl", ".jxr", ".nef", ".orf", ".raf", ".rw2", ".svg")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevm", b"hevs", b"hevx", b"mif1", b"msf1")


def picture_suffixes() -> tuple[str, ...]:
    """The endings, in lower case, of files that are pictures: those that Pillow reads, and others such as HEIC, of
    which :func:`as_rgb` says what to do."""
    suffixes = Image.registered_extensions()  # loads all formats
    known = [suffix for suffix, name in suffixes.items() if name in Image.OPEN and name not in _NO_PICTURES]
    return (*known, *_HEIF_SUFFIXES, *(suffix for suffix in _OTHER_SUFFIXES if suffix not in known))


def as_rgb(image) -> Image.Image:
    """A picture as an RGB image of 8 bits.

    A file's EXIF orientation is applied, as viewers do (and Detectron2's `read_image`); damaged EXIF data is passed
    over. 16-bit values become their high byte, alpha is dropped, and grey, palette and CMYK colours are converted. HEIC
    is read where the package pillow-heif is installed.

    Args:
        image: a path; a PIL image; or an array uint8 [H, W, 3], RGB.

    Raises:
        FileNotFoundError: there is no such file.
        TransientReadError: the drive, say of a network, did not answer.
        ValueError: the file is no image, damaged, PostScript (a program, which Pillow would run), or has more pixels
            than Pillow's limit against decompression bombs (2 * PIL.Image.MAX_IMAGE_PIXELS, by default 178,956,970);
            names the path. Or an array of another type or shape, an image without pixels, or one whose pixels are
            floats.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image must be uint8 [H, W, 3] (RGB) and not empty, got {image.dtype} {image.shape}")
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        _refuse_programs(image)
        return _to_rgb(image)
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(f"image must be a path, a PIL image or a numpy array, got {type(image).__name__}")
    path = os.fspath(image)
    try:
        os.stat(path)
    except OSError as error:
        _raise_if_transient(path, error)
        raise FileNotFoundError(f"no such image: {path}") from error
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"{path}: cannot be read as an image (it is not a file)")
    if not os.path.getsize(path):
        raise ValueError(f"{path}: cannot be read as an image (the file is empty)")
    try:
        with _opened(path) as file:
            _refuse_programs(file)
            file.load()
            _turn_upright(file)
            return _to_rgb(file)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path}: cannot be read as an image ({error}) Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # of a broken file Pillow's decoders raise nearly anything
        _raise_if_transient(path, error)
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


def pixels_only(image: Image.Image) -> Image.Image:
    """A copy of an RGB image without anything that a file had beside its pixels.

    EXIF, XMP, maker notes, comments and colour profiles can hold a second picture, such as a thumbnail, the place and
    the owner; Pillow keeps some of them in the files that it writes. Colours of another RGB profile, such as a phone's
    Display P3, are converted to sRGB, since viewers expect sRGB where there is no profile. A damaged profile is passed
    over.
    """
    profile = image.info.get("icc_profile")
    return Image.fromarray(np.array(_to_srgb(image, profile) if profile else image))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != "RGB ":  # of the CMYK or grey values that these were converted from
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB")) or image
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):  # ImportError: a Pillow without it
        return image


def save_picture(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a picture in the format of its name's ending: :func:`pixels_only` of it, in one frame.

    Args:
        image: RGB.
        path: in a folder that is made where missing.

    Raises:
        OSError: it cannot be written.
        ValueError: Pillow writes no such format.
    """
    os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
    pixels_only(image).save(path, quality=92)


def _raise_if_transient(path: str, error: Exception) -> None:
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        raise TransientReadError(error.errno, f"{path}: cannot be read at the moment ({error.strerror})") from error


def _opened(path: str) -> Image.Image:
    """`Image.open`, and a word on what reads the pictures that it does not."""
    try:
        return Image.open(path)
    except Image.UnidentifiedImageError as error:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in _OTHER_SUFFIXES and suffix not in Image.registered_extensions():
            raise ValueError("a kind of pictures that this Pillow does not read: convert it to JPEG") from error
        if not _is_heif(path):
            raise
    try:
        import pillow_heif
    except ImportError as error:
        raise ValueError("HEIC, which needs a package: pip install pillow-heif, or convert it to JPEG") from error
    pillow_heif.register_heif_opener()
    return Image.open(path)


def _is_heif(path: str) -> bool:
    with open(path, "rb") as file:
        head = file.read(12)
    return path.lower().endswith(_HEIF_SUFFIXES) or (head[4:8] == b"ftyp" and head[8:] in _HEIF_BRANDS)


def _refuse_programs(image: Image.Image) -> None:
    """Pillow starts Ghostscript on PostScript, whatever the file's name, but only when pixels are asked for."""
    if image.format == "EPS":
        raise ValueError("PostScript is a program, not a picture: convert it yourself if you trust it")


def _turn_upright(file: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(file, in_place=True)  # a copy of a huge picture would double its memory
    except Exception:  # its pixels are fine all the same
        pass


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"image must not be empty, got {image.width} x {image.height} pixels")
    if image.mode == "F":
        raise ValueError("pixels are floats, whose range is unknown: convert them to uint8")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 255
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:  # "I" is also what 8-bit values may come in
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
