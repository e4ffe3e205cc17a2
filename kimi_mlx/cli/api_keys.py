"""API keys of `kimi-mlx serve`, from options, the environment and a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kimi_mlx.errors import UsageError
from kimi_mlx.settings import Settings

COMMENT = re.compile(r"(^|\s)#.*")
"""A comment in a file of keys; a key may contain a `#`."""

FILE_HINT = "write one key per line: `openssl rand -hex 24 > FILE` creates one"
KEY_HINT = "set one: `export KIMI_MLX_API_KEY=$(openssl rand -hex 24)`; clients send it as their API key"


def read_keys(options: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Return all API keys: of the options, the environment and a file.

    Raises:
        UsageError: the file has no keys, or a key cannot be sent in a header.
    """
    own = Settings.from_environment().api_key
    keys = [("--api-key", key) for key in options] + ([("$KIMI_MLX_API_KEY", own)] if own else [])
    if file is not None:
        keys += _keys_in(file)
    for source, key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            message = f"{source}: an API key consists of printable ASCII characters without spaces"
            raise UsageError(message, hint=KEY_HINT)
    return tuple(dict.fromkeys(key for _, key in keys))


def read_client_key(file: Path | None) -> str | None:
    """Return the API key for requests to a server: the first of a file, else that of the environment.

    Raises:
        UsageError: the file has no key, or the key cannot be sent in a header.
    """
    if file is None:
        return next(iter(read_keys((), None)), None)
    first = _keys_in(file)[0][1]
    return read_keys((first,), None)[0]


def _keys_in(file: Path) -> list[tuple[str, str]]:
    """Return the keys in a file, each with its position."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"cannot read `{file}`: there is no such file", hint=FILE_HINT) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read `{file}`: it is not UTF-8 text", hint=FILE_HINT) from error
    except OSError as error:
        raise UsageError(f"cannot read `{file}`: {error.strerror}", hint=FILE_HINT) from error
    lines = [COMMENT.sub("", line).strip() for line in text.splitlines()]
    keys = [(f"`{file}`, line {number}", line) for number, line in enumerate(lines, 1) if line]
    if not keys:
        raise UsageError(f"`{file}` has no key", hint=FILE_HINT)
    return keys
