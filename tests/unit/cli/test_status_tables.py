"""The ranks of a status on terminals of several widths."""

from __future__ import annotations

import pytest
from rich.console import Console

from kimi_mlx.cli.server_status import describe_drafts
from kimi_mlx.cli.status_tables import describe_ranks
from kimi_mlx.session.model_status import RankStatus

RANKS = [
    RankStatus(
        rank=rank,
        host="mac-studio.local",
        share="layers 0-30 of 61",
        weights_bytes=300_000_000_000,
        cache_bytes=2_000_000_000,
        free_bytes=90_000_000_000,
        peak_memory_bytes=310_000_000_000,
        work="decode",
        step=1_234_567,
        last_message_s=0.3,
    )
    for rank in range(2)
]


@pytest.mark.parametrize("width", [30, 60, 80, 90, 100, 120])
def test_no_word_is_broken(width: int) -> None:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(describe_ranks(RANKS, width, shows_activity=True))
    text = capture.get()
    assert all(len(line) <= width for line in text.splitlines())
    for word in ("mac-studio.local", "0-30", "279.4", "decode", "0.3", "ago"):
        assert word in text, word
    is_table = "rank  host" in text
    assert is_table == (width >= 90)


@pytest.mark.parametrize(
    ("drafted", "reason", "expected"),
    [
        (0, None, "on"),
        (20, None, "on; 75% of 20 draft tokens accepted"),
        (20, "a step takes long", "off: a step takes long; 75% of 20 draft tokens accepted"),
    ],
)
def test_drafts_are_on_or_off(drafted: int, reason: str | None, expected: str) -> None:
    assert describe_drafts({"drafted_tokens": drafted, "accepted_tokens": 15, "off_reason": reason}) == expected
