"""Bit masks of allowed tokens.

A mask has a bit for each token, 32 per word, lowest bit first: (ceil(vocab_size / 32),) uint32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kimi_mlx.model.device import compile_on_gpu

Mask: TypeAlias = npt.NDArray[np.uint32]

WORD_BITS = 32
"""Number of tokens per word of a mask."""

EVERYTHING = 0xFFFFFFFF
"""Word of a mask that allows all its tokens."""


def has_token(mask: Mask, token: int | None) -> bool:
    """Return whether a mask allows a token."""
    return token is not None and bool((int(mask[token // WORD_BITS]) >> token % WORD_BITS) & 1)


def first_token(mask: Mask) -> int | None:
    """Return the smallest id that a mask allows."""
    words = np.flatnonzero(mask)
    if not words.size:
        return None
    word = int(mask[words[0]])
    return int(words[0]) * WORD_BITS + (word & -word).bit_length() - 1


def set_tokens(mask: Mask, tokens: Iterable[int], is_allowed: bool = True) -> None:
    """Allow or forbid some tokens."""
    for token in tokens:
        bit = np.uint32(1 << token % WORD_BITS)
        if is_allowed:
            mask[token // WORD_BITS] |= bit
        else:
            mask[token // WORD_BITS] &= ~bit


@compile_on_gpu
def masked(logits: mx.array, masks: mx.array) -> mx.array:
    """Return logits with -inf for the tokens that a mask forbids.

    Args:
        logits: (B, vocab_size).
        masks: (B, words) uint32.
    """
    bits = (masks[..., None] >> mx.arange(WORD_BITS, dtype=mx.uint32)) & mx.array(1, mx.uint32)
    is_allowed = bits.flatten(-2)[..., : logits.shape[-1]].astype(mx.bool_)
    return mx.where(is_allowed, logits, mx.array(-mx.inf, logits.dtype))
