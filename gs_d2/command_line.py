"""What the project's scripts share: parsers that show a script's first words, and how bad input ends it."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

# What bad files, configs and arguments raise here and in Detectron2.
BAD_INPUT = (AssertionError, ImportError, KeyError, OSError, ValueError)

PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".tif", ".tiff")  # of those that matplotlib writes


def parser_of(text: str | None, **options) -> argparse.ArgumentParser:
    """A parser whose help begins with `text`, a script's `__doc__`, as it is.

    From here on what the script prints may have any file name in it (:func:`print_any_name`).

    Args:
        options: of `argparse.ArgumentParser`.
    """
    print_any_name()
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def print_any_name():
    """Has stdout and stderr write characters that the console does not have as `\\u9854`, instead of raising.

    Such are in file names: a Windows console knows few letters, and names from old zips are not even text.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not what a notebook or a test has put there
            stream.reconfigure(errors="backslashreplace")


def folder_for(flag: str, path: str | os.PathLike) -> Path:
    """The folder that a flag names for files to be written into, made where missing.

    Raises:
        ValueError: it cannot be made, or not written into; names flag and folder.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:  # ValueError: a zero in the name
        said = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{flag} {path}: cannot be made a folder ({said}): name another") from error
    if not writable:
        raise ValueError(f"{flag} {path}: may not be written into: name another folder")
    return path


def file_for(flag: str, path: str | os.PathLike) -> Path:
    """The file that a flag names to be written, in a folder that is made where missing.

    Raises:
        ValueError: it is a folder, or its folder cannot be made or written into; names flag and file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder: name a file")
    folder_for(flag, path.parent)
    return path


def picture_for(flag: str, path: str | os.PathLike) -> Path:
    """:func:`file_for` of a picture that matplotlib writes: `.png`, where the name has no ending.

    Raises:
        ValueError: as `file_for`, or matplotlib writes no such pictures.
    """
    path = Path(path)
    if not path.suffix:
        path = path.with_name(f"{path.name}.png") if path.name and not path.is_dir() else path
    elif path.suffix.lower() not in PICTURES:
        raise ValueError(f"{flag} {path}: must end in {', '.join(PICTURES)}")
    return file_for(flag, path)


@contextlib.contextmanager
def bad_input_ends(*others: type[Exception], one_line: bool = True):
    """Ends the program as argparse does where BAD_INPUT is raised: the message on stderr, and exit code 2.

    A context, or a decorator: `@bad_input_ends()`.

    Args:
        others: end it, too.
        one_line: False keeps the lines of a message, such as that of `check_config`, which has one for each key.
    """
    try:
        yield
    except (*BAD_INPUT, *others) as error:
        text = " ".join(str(error).split()) if one_line else str(error)
        if isinstance(error, LookupError) and " " not in text:  # but the name that was looked up
            text = f"something is named that is not there ({type(error).__name__}: {text})"
        if isinstance(error, ModuleNotFoundError):
            text += f"; install it: pip install {error.name}"
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(2)
