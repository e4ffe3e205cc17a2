"""Text files that are attached to a message: read, decoded and quoted."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kimi_mlx.cli.chat.files.media_files import media_kind, read_file
from kimi_mlx.cli.output import CONTROL_CHARS
from kimi_mlx.errors import UsageError
from kimi_mlx.units import format_bytes

MAX_TEXT_BYTES = 16_000_000
"""Maximum size of a text file: more than any context holds."""

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_BINARY_CONTROL = re.compile(r"[\x00-\x07\x0e-\x1a\x1c-\x1f]")  # not tab, line ends, backspace and escape
_BACKTICKS = re.compile("`+")


@dataclass(frozen=True)
class TextFile:
    """A text file.

    Attributes:
        name: path as the user wrote it, in one line.
        text: contents, without a byte order mark; line ends are those of the file.
        num_bytes: size of the file.
        encoding: encoding of the file: UTF-8, UTF-16, UTF-32 or Latin-1.
    """

    name: str
    text: str = field(repr=False)
    num_bytes: int
    encoding: str = "UTF-8"


def read_text_file(path: Path) -> TextFile:
    """Read a text file in UTF-8, in UTF-16 or UTF-32 with a byte order mark, or else in Latin-1.

    Raises:
        UsageError: the file does not exist, is a folder, a pipe or a device, cannot be read, is not text, or is larger
            than MAX_TEXT_BYTES.
    """
    data, num_bytes = read_file(path, MAX_TEXT_BYTES, "a text file")
    if len(data) > MAX_TEXT_BYTES:
        size, limit = format_bytes(num_bytes), format_bytes(MAX_TEXT_BYTES)
        raise UsageError(f"`{path}` has {size}, more than the limit of {limit}", hint="attach a part of it")
    try:
        return decode_text(data, str(path))
    except ValueError as error:
        raise _not_text(path, str(error)) from None


def decode_text(data: bytes, name: str) -> TextFile:
    """Return the contents of a file, or of piped input, as text.

    Raises:
        ValueError: it is not text; the message is the reason.
    """
    text, encoding = _decode(data)
    return TextFile(" ".join(CONTROL_CHARS.sub("?", name).split("\n")), text, len(data), encoding)


def as_message_part(file: TextFile) -> str:
    """Return a file as it stands in a message: its name, then its text in a code fence that no line of it closes."""
    longest = max((len(run) for run in _BACKTICKS.findall(file.text)), default=0)
    fence = "`" * max(3, longest + 1)
    end = "" if not file.text or file.text.endswith("\n") else "\n"
    return f"File: {file.name}\n{fence}\n{file.text}{end}{fence}"


def with_text_files(text: str, files: Iterable[TextFile]) -> str:
    """Return a message that consists of files, then a text."""
    parts = [*(as_message_part(file) for file in files), text]
    return "\n\n".join(part for part in parts if part)


def _decode(data: bytes) -> tuple[str, str]:
    """Return the text and the name of its encoding.

    Raises:
        ValueError: the data is not text.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            try:
                name = "utf-8-sig" if encoding == "UTF-8" else encoding.lower()
                return data.decode(name, "replace" if encoding == "UTF-8" else "strict"), encoding
            except UnicodeDecodeError:
                raise ValueError(f"it begins like {encoding} and is not") from None
    if (zero := data.find(0)) >= 0:
        raise ValueError(f"byte {zero} is zero")
    try:
        return data.decode("utf-8"), "UTF-8"
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    # a few broken bytes in UTF-8, as in a log that was cut, or text in another encoding
    num_broken = text.count("\ufffd")
    num_valid = sum(character > "\x7f" for character in text) - num_broken
    if num_valid > num_broken:
        return text, "UTF-8"
    if (control := _BINARY_CONTROL.search(text)) is not None:
        raise ValueError(f"it is not UTF-8 and has the control character {ascii(control.group())[1:-1]}")
    try:
        # what is called Latin-1 is Windows' superset of it, which has quotation marks for control characters
        return data.decode("cp1252"), "Latin-1"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "Latin-1"


def _not_text(path: Path, reason: str) -> UsageError:
    kind = media_kind(path)
    hint = "attach a text file" if kind is None else f"attach it with `/{kind}`, or with the option `--{kind}`"
    if path.suffix.lower() == ".pdf":
        hint = f"convert it first, for example with `pdftotext {path.name}`"
    return UsageError(f"`{path}` is not a text file: {reason}", hint=hint)
