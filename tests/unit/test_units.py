"""Formatting and parsing of bytes, counts, times, rates and context lengths."""

from __future__ import annotations

import pytest

from kimi_mlx.units import (
    GB,
    GIB,
    format_bytes,
    format_context,
    format_count,
    format_gib,
    format_rate,
    format_seconds,
    parse_bytes,
)


def test_format_bytes_seconds_and_rates() -> None:
    assert [format_bytes(n) for n in (999, 1000, 577_600_000_000, 1.2e12)] == ["999 B", "1.0 kB", "577.6 GB", "1.2 TB"]
    assert [format_seconds(s) for s in (0.085, 2.409, 185)] == ["85 ms", "2.41 s", "3 min 5 s"]
    assert format_rate(20.06) == "20.1 tok/s"


def test_format_gib_and_context() -> None:
    assert format_gib(1_029_200_000_000) == "958.5 GiB"
    assert [format_gib(n) for n in (34 * 1024**2, 192 * 1024, 10, 0)] == ["34.0 MiB", "192.0 KiB", "10 B", "0.0 GiB"]
    assert [format_context(tokens) for tokens in (8192, 131_072, 262_144, 1_048_576)] == ["8k", "128k", "256k", "1M"]
    assert [format_count(count, "token") for count in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * GB), ("1.5 TB", 1500 * GB), ("2GiB", 2 * GIB), ("512mb", None), ("7", 7), ("10K", 10_000)],
)
def test_parse_bytes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="not a size"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "5 i", "5 apples", "5iB", "5" * 400 + "GB"])
def test_parse_bytes_refuses_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)
