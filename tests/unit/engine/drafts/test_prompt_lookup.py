"""Prompt lookup: the drafts are those of a plain search, and are found quickly in long prompts."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.engine.drafts.prompt_lookup import MAX_NGRAM, MIN_NGRAM, find_draft, find_earlier_ngram
from kimi_mlx.engine.request import FIRST_IMAGE_KEY
from kimi_mlx.engine.token_array import COMPARISON_TOKENS, TokenArray

TOKENS = st.lists(st.integers(0, 3), max_size=40)


def search(tokens: list[int]) -> int | None:
    """Return the end of the latest earlier occurrence of the longest n-gram, by trying all positions."""
    for length in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                return end
    return None


@given(tokens=TOKENS)
def test_the_longest_and_latest_ngram_is_found(tokens: list[int]) -> None:
    end, length = find_earlier_ngram(np.array(tokens, np.int64))
    assert end == search(tokens)
    if end is not None:
        assert tokens[end - length : end] == tokens[-length:]


@given(parts=st.lists(TOKENS, min_size=1, max_size=4), limit=st.integers(1, 9))
def test_drafts_follow_tokens_that_are_appended(parts: list[list[int]], limit: int) -> None:
    tokens, array = [token for part in parts for token in part], TokenArray(parts[0])
    for part in parts[1:]:
        array.extend(part)
    assert array.ids.tolist() == tokens
    end = search(tokens)
    assert find_draft(array.ids, limit)[0] == (() if end is None else tuple((tokens[end:] * limit)[:limit]))


def test_a_draft_ends_before_an_image() -> None:
    ids = TokenArray([1, 2, 3, *[FIRST_IMAGE_KEY + 5] * 4, 4, 1, 2]).ids
    assert find_draft(ids, 8) == ((3,), 2)
    assert find_draft(TokenArray([1, 2, FIRST_IMAGE_KEY, 1, 2]).ids, 8)[0] == ()


def test_a_long_prompt_needs_no_index() -> None:
    ids = TokenArray(range(128_000)).ids
    begin = time.process_time()
    assert find_draft(ids, 8) == ((), 0)
    assert time.process_time() - begin < 0.25  # an index of all n-grams took 0.4 s


@given(common=st.sampled_from([0, 1, COMPARISON_TOKENS - 1, COMPARISON_TOKENS, 9000]), rest=st.integers(0, 2))
def test_common_prefix(common: int, rest: int) -> None:
    a, b = TokenArray([7] * common + [1] * rest), TokenArray([7] * common + [2] * 3)
    assert a.common_prefix(b) == b.common_prefix(a) == common
    assert a.common_prefix(b, start=common // 2) == common
    assert a.common_prefix(b, limit=common // 2) == common // 2
