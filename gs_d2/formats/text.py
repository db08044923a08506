"""Text files as editors and systems write them: one way of reading the lines of all lists."""

import codecs

_MARKS = (  # UTF-32's begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LOOKED_AT = 4096  # bytes


def lines_of(text: str) -> list[str]:
    """The lines of a text without blanks at their ends; those that are blank are "", so that line n is `lines[n - 1]`.

    Lines end with LF, CR LF, CR, or CR CR LF, which is what a text that Windows has saved twice has.
    """
    text = text.replace("\r\r\n", "\n").replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in text.removeprefix("\ufeff").split("\n")]


def end_of(lines: list[str], start: int, count: int) -> int:
    """The index after the next `count` lines that are not blank, from `start` on; the end's if there are fewer."""
    for at in range(start, len(lines)):
        if count == 0:
            return at
        count -= bool(lines[at])
    return len(lines)


def decoded(content: bytes, where: str, *, any_names: bool = False) -> str:
    """The text of a file.

    Read are UTF-8, UTF-16 and UTF-32, with a byte order mark or (UTF-16) recognised by the zeros in its letters.

    Args:
        where: the file, for messages.
        any_names: bytes that are no UTF-8 are replaced, for files in which names are not read.

    Raises:
        ValueError: it is no text; names the file and, where there is one, the line.
    """
    encoding = _encoding(content)
    try:
        text = content.decode(encoding, "replace" if any_names and encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        if not encoding.startswith("utf-8"):
            raise ValueError(f"{where}: {encoding.upper()} text that is damaged ({error.reason})") from error
        number = len(lines_of(error.object[: error.start].decode(encoding, "replace")))
        raise ValueError(f"{where}:{number}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    if text.count("\0") > len(text) // 4:
        raise ValueError(f"{where}: not a text file: much of it is zeros")
    return text


def _encoding(content: bytes) -> str:
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return encoding
    # Without a mark: of letters and digits every second byte is zero.
    head = content[:_LOOKED_AT]
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 4 and min(even, odd) == 0:
        return "utf-16-be" if even else "utf-16-le"
    return "utf-8"
