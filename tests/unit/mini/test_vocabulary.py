"""The byte-pair vocabulary, in Kimi's file formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini.vocabulary import SPECIAL_TOKENS, learn_ranks, write_vocabulary

TEXTS = ["the cat and the hat", "the bat, the rat: 1234 and 1234", "你好 你好", "{\n  city: string\n}"] * 3


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_vocabulary(learn_ranks(TEXTS, ranks=280), tmp_path)
    return Tokenizer.load(tmp_path)


def test_frequent_words_become_tokens(tokenizer: Tokenizer):
    assert len(tokenizer.encode("the")) == 1
    assert len(tokenizer.encode(" the")) == 1


def test_numbers_stay_single_digits(tokenizer: Tokenizer):
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1234")] == ["1", "2", "3", "4"]


def test_any_text_round_trips(tokenizer: Tokenizer):
    text = "Zürich 🚲 你好\n\tx = 12.5"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_keep_their_distances(tokenizer: Tokenizer):
    expected = {content: 280 + offset for offset, content in SPECIAL_TOKENS.items()}
    assert expected.items() <= tokenizer.special_tokens.items()
    assert tokenizer.vocab_size == 280 + 256


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="too small"):
        learn_ranks(["ab"], ranks=300)
