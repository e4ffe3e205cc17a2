"""Memory of a host: what the system needs, what a model may use, and what a model of unknown dimensions needs."""

from __future__ import annotations

from kimi_mlx.units import GIB

OVERHEAD = 0.1
"""Memory of a model of unknown dimensions on top of its weights, as a fraction of them: prefill, and weights that every
rank holds."""

CONTEXT_TOKENS = 8192
"""Tokens of context that the memory of a model has room for, unless the user names another number."""

SYSTEM_BYTES = 8 * GIB
"""Memory for macOS and other programs, on every host."""

MAX_HOSTS = 8
"""Largest number of hosts that a plan may have, and that is suggested for a model."""


def with_overhead(weights_bytes: int) -> int:
    """Return the memory of a model of unknown dimensions, without its cache."""
    return round(weights_bytes * (1 + OVERHEAD))


def usable_bytes(memory_bytes: int) -> int:
    """Return the memory that a model may use on a host: all but the system's."""
    return max(memory_bytes - SYSTEM_BYTES, 0)
