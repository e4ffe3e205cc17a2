"""Texts and options that `kimi-mlx compare` and `kimi-mlx importance` share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kimi_mlx.cli.options import DtypeOption
from kimi_mlx.errors import UsageError
from kimi_mlx.units import format_bytes

DEFAULT_WINDOW, DEFAULT_TOKENS = 2048, 32768

TextArguments = Annotated[
    list[str],
    typer.Argument(
        metavar="TEXT...",
        help="Files, literal texts, or `-` for standard input. A word without spaces that looks like a path must be a "
        "file.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class TextOptions:
    """Options of a command that runs texts through models."""

    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Send each text through the model's chat template, as a user message. A text with one JSON object "
            '`{"messages": [...]}` per line has conversations instead. Default: the raw text, without special tokens.',
        ),
    ] = False
    window: Annotated[
        int,
        typer.Option("--window", min=2, metavar="N", help="Tokens of a sequence; longer texts are divided."),
    ] = DEFAULT_WINDOW
    tokens: Annotated[
        int,
        typer.Option("--tokens", min=2, metavar="N", help="Use at most N tokens of all texts together."),
    ] = DEFAULT_TOKENS
    dtype: DtypeOption = None

    @property
    def prompt(self) -> str:
        """Form of the texts: `chat` or `raw`."""
        return "chat" if self.chat else "raw"

    @property
    def description(self) -> str:
        """Form of the texts, for the user."""
        return "in the chat template" if self.chat else "raw, without the chat template"


def read_texts(words: Sequence[str]) -> list[str]:
    """Return the texts of a command line.

    Raises:
        UsageError: a text is empty, too long, not text, or a file that does not exist.
    """
    if list(words).count("-") > 1:
        raise UsageError("`-` is given twice; standard input can be read once", hint="give it once")
    return [_read_text(word) for word in words]


def _read_text(word: str) -> str:
    from kimi_mlx.cli.chat.files.text_files import read_text_file  # heavy: not for `--help` or a usage error

    if word == "-":
        text, name = _read_standard_input(), "standard input"
    elif _is_path(word):
        text, name = read_text_file(Path(word).expanduser()).text, f"`{word}`"
    else:
        text, name = word, "a text"
    if not text.strip():
        raise UsageError(f"{name} is empty", hint="give a file with text, a literal text, or `-` for standard input")
    return text


def _is_path(word: str) -> bool:
    """Return whether a word is a path: it exists, or looks like one."""
    if not word or (any(map(str.isspace, word)) and not _exists(word)):
        return False
    return _exists(word) or "/" in word or bool(Path(word).suffix)


def _exists(word: str) -> bool:
    try:
        return Path(word).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a name, a null character, an unknown user
        return False


def _read_standard_input() -> str:
    from kimi_mlx.cli.chat.files.text_files import MAX_TEXT_BYTES, decode_text

    data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(
            f"standard input has more than the limit of {format_bytes(MAX_TEXT_BYTES)}", hint="give a part of it"
        )
    try:
        return decode_text(data, "standard input").text
    except ValueError as error:
        raise UsageError(f"standard input is not text: {error}", hint="give text") from None
