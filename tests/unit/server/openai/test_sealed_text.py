"""Sealed texts, which a client keeps for the server."""

from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.server.openai.sealed_text import MAX_TEXT_BYTES, PREFIX, seal, unseal


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_sealed_text_is_read_back(text: str) -> None:
    assert unseal(seal(text)) == text


@given(st.text())
def test_other_texts_are_not_read(text: str) -> None:
    assert unseal(text) is None
    assert unseal(PREFIX + text) is None


def test_damaged_and_huge_texts_are_not_read() -> None:
    sealed = seal("some thoughts")
    for at in range(len(PREFIX), len(sealed)):
        other = "A" if sealed[at] != "A" else "B"
        assert unseal(sealed[:at] + other + sealed[at + 1 :]) in (None, "some thoughts")
        assert unseal(sealed[:at]) is None
    data = bytes(MAX_TEXT_BYTES + 1)
    bomb = base64.urlsafe_b64encode(zlib.crc32(data).to_bytes(4, "big") + zlib.compress(data)).decode()
    assert unseal(PREFIX + bomb) is None


def test_halves_of_surrogate_pairs_are_replaced() -> None:
    assert unseal(seal("a\ud800")) == "a?"


@pytest.mark.parametrize("text", ["", PREFIX])
def test_empty_texts_are_not_read(text: str) -> None:
    assert unseal(text) is None
