"""Format and parse bytes, counts, times and rates. GB is 10**9 bytes, GiB is 1024**3."""

from __future__ import annotations

import re

MB = 10**6
GB = 10**9
GIB = 1024**3


def format_bytes(count: float) -> str:
    """Format bytes in the largest decimal unit that gives at least 1, such as `577.6 GB`."""
    for unit, size in (("TB", 10**12), ("GB", GB), ("MB", MB), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def is_short_number(text: str) -> bool:
    """Return whether a text is a whole number of 1 to 9 digits: Python refuses to convert thousands of them."""
    return len(text) < 10 and text.isascii() and text.isdigit()


def parse_bytes(text: str) -> int:
    """Parse `20GB`, `1.5 TB`, `512MiB`, or a plain number of bytes.

    Raises:
        ValueError: the text is none of these.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?(?:([kMGT]?)(i?)B?)", text.strip().replace("K", "k"))
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"`{text}` is not a size in bytes")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


def format_gib(count: float) -> str:
    """Format memory in GiB, such as `958.5 GiB`, or below 1 GiB in the largest unit that gives at least 1."""
    for unit, size in (("GiB", GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B" if count else "0.0 GiB"


def format_context(tokens: int) -> str:
    """Format a context length in units of 1024 tokens, as in model names: `8k`, `256k`, `1M`."""
    return f"{tokens // 1024**2}M" if tokens >= 1024**2 else f"{tokens // 1024}k"


def format_seconds(seconds: float) -> str:
    """Format a duration, such as `85 ms`, `2.41 s` or `3 min 5 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def format_duration(seconds: float) -> str:
    """Format a duration roughly, such as `8 s`, `2 min`, `3.5 h` or `4 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def format_rate(per_second: float) -> str:
    """Format a rate, such as `20.1 tok/s`."""
    return f"{per_second:.1f} tok/s"


def format_count(count: int, noun: str) -> str:
    """Format a number with its noun, such as `1 token` or `2 tokens`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
