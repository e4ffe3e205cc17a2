"""Divide tokens of texts into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_mlx.errors import UsageError

MIN_WINDOW = 2
"""Minimum number of tokens of a window: one, and the next token."""


@dataclass(frozen=True)
class TokenWindows:
    """Windows of texts.

    Args:
        windows: token ids of each window.
        num_tokens: number of tokens in the windows.
        num_left_out: number of tokens beyond the limit.
    """

    windows: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_left_out: int


def divide(texts: Sequence[Sequence[int]], window: int, limit: int, max_context: int) -> TokenWindows:
    """Divide texts into windows; a window never spans two texts. Windows of a single token are left out.

    Args:
        texts: token ids of each text.
        window: number of tokens of a window.
        limit: maximum number of tokens of all windows.
        max_context: largest context of the model.

    Raises:
        UsageError: a window is longer than the context, or there are too few tokens.
    """
    if window > max_context:
        raise UsageError(
            f"a window of {window:,} tokens is longer than the model's context of {max_context:,}",
            hint=f"use `--window {max_context}` or less",
        )
    parts = [tuple(text[start : start + window]) for text in texts for start in range(0, len(text), window)]
    windows: list[tuple[int, ...]] = []
    total = sum(map(len, parts))
    remaining = limit
    for part in parts:
        kept = part[:remaining]
        if len(kept) >= MIN_WINDOW:
            windows.append(kept)
            remaining -= len(kept)
    if not windows:
        raise UsageError(
            f"the texts have {total} tokens; at least {MIN_WINDOW} in one of them are needed", hint="give longer texts"
        )
    used = sum(map(len, windows))
    return TokenWindows(tuple(windows), used, total - used if remaining < MIN_WINDOW else 0)
