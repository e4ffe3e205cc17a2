"""The prompt of a single answer: the option `--prompt`, piped input, or both."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_mlx.cli.chat.media_files import media_kind
from kimi_mlx.errors import UsageError

if TYPE_CHECKING:
    from kimi_mlx.store.model_ref import ModelRef

NO_PROMPT = "no prompt given and no terminal to ask on"

NUM_BYTES_CHECKED = 65536
"""Number of bytes of piped input in which a zero byte means that it is not text."""


def resolve_chat_model(name: str, prompt: str | None) -> ModelRef:
    """Resolve the name of the model; without a prompt, an unknown name may be meant as one.

    Raises:
        UsageError: unknown name, or an unsupported model.
    """
    from kimi_mlx.store.model_ref import resolve_model_name, similar_aliases

    try:
        return resolve_model_name(name)
    except UsageError as error:
        if (kind := media_kind(Path(name))) is not None:
            hint = f"write `--{kind}` before each file: `--{kind} {shlex.quote(name)}`"
            raise UsageError(
                f"`{name}` is no model, but the name of {'an image' if kind == 'image' else 'a video'}", hint=hint
            ) from None
        if prompt is not None or "/" in name or similar_aliases(name):
            raise
        hint = f"to send it as a prompt, type `kimi-mlx chat -p {shlex.quote(name)}`; {error.hint}"
        raise UsageError(error.message, hint=hint) from None


def require_prompt(prompt: str | None) -> None:
    """Check that there is a prompt, a pipe or a terminal, without reading from it.

    Raises:
        UsageError: there is none.
    """
    if prompt is None and not _is_piped() and not _is_terminal():
        raise UsageError(NO_PROMPT, hint='add a prompt: `-p "Hello"`')


def read_prompt(prompt: str | None, is_json: bool) -> str | None:
    """Return the prompt from --prompt, a pipe, or both; None for a conversation."""
    if prompt == "-":
        prompt = _read_pipe()
        if prompt is None:
            raise UsageError("`-p -` reads piped input, but nothing is piped", hint='use `kimi-mlx chat -p "Hello"`')
    elif (piped := _read_pipe()) and piped.strip():
        prompt = piped if prompt is None else f"{prompt}\n\n{piped}"
    elif piped is not None and prompt is None:
        prompt = piped
    if prompt is None:
        if not _is_terminal():
            raise UsageError(NO_PROMPT, hint='use `kimi-mlx chat -p "Hello"`')
        if is_json:
            raise UsageError("--json needs a prompt", hint='use `kimi-mlx chat --json -p "Hello"`')
        return None
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint='use `kimi-mlx chat -p "Hello"`, or no -p for a conversation')
    return prompt


def _read_pipe() -> str | None:
    """Return piped or redirected standard input; None if there is neither.

    Raises:
        UsageError: it is not text.
    """
    if not _is_piped():
        return None
    data = sys.stdin.buffer.read()
    if b"\0" in data[:NUM_BYTES_CHECKED]:
        raise UsageError("the piped input is not text", hint="give an image by name: `--image FILE`")
    return data.decode("utf-8", errors="replace")


def _is_piped() -> bool:
    """Return whether standard input is a pipe or a file."""
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        return False
    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()  # pyright: ignore[reportUnnecessaryComparison]
