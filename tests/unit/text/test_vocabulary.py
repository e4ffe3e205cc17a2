"""Reading `tiktoken.model`, and the canonical pair of each token."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import TextError
from kimi_mlx.text.vocabulary import build, find_splits, read_ranks
from kimi_mlx.text.vocabulary_cache import FORMAT, cached_splits
from tests.examples import examples
from tests.unit.text.vocabularies import reference, small_ranks, tiktoken_lines

BYTES = [bytes([b]) for b in range(256)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "has no tokens"),
        (lambda lines: [*lines[:9], b"!!!! 9", *lines[10:]], "line 10: `!!!! 9` is not `BASE64 RANK`"),
        (lambda lines: [*lines[:9], b"CQ 9", *lines[10:]], "line 10"),
        (lambda lines: [*lines[:9], b"CQ== nine", *lines[10:]], "line 10"),
        (lambda lines: [*lines[:9], b"CQ==", *lines[10:]], "line 10"),
        (lambda lines: [*lines[:9], b"CQ== 9 9", *lines[10:]], "line 10"),
        (lambda lines: [*lines[:9], b"CQ== -9", *lines[10:]], "line 10"),
        (lambda lines: [*lines, lines[-1]], "rank 261 appears twice"),
        (lambda lines: [*lines, b"CQ== 262"], "line 263: same token as rank 9"),
        (lambda lines: [*lines, b"CQkJ 300"], "263 tokens but none of rank 262"),
        (lambda lines: [*lines[:9], b"CQkJ 9", *lines[10:]], "no token for the single byte 0x09"),
        (lambda lines: [b"version https://git-lfs.github.com/spec/v1"], "Git LFS pointer"),
    ],
)
def test_broken_files_are_text_errors_with_a_hint(tmp_path: Path, change, message: str):
    path = tmp_path / "tiktoken.model"
    lines = tiktoken_lines(small_ranks()[:262]).splitlines()
    path.write_bytes(b"\n".join(change(lines)) + b"\n")
    with pytest.raises(TextError, match=message) as caught:
        read_ranks(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_missing_file_is_a_text_error(tmp_path: Path):
    with pytest.raises(TextError, match="cannot read"):
        read_ranks(tmp_path / "tiktoken.model")


def test_order_blank_lines_and_line_ends_do_not_matter(tmp_path: Path):
    path = tmp_path / "tiktoken.model"
    lines = tiktoken_lines(small_ranks()).splitlines()
    path.write_bytes(b"\n\r\n".join(reversed(lines)))
    assert read_ranks(path) == list(small_ranks())


@pytest.mark.slow
@given(data=st.data())
@examples(50)
def test_any_ranks_give_the_ids_of_tiktoken(data: st.DataObject):
    """Also vocabularies with tokens that no merge makes, that overlap, or that are in any order."""
    words = st.text("ab \n汉", min_size=2, max_size=6).map(str.encode)
    extra = data.draw(st.lists(words, unique=True, max_size=30), label="tokens")
    text = data.draw(st.text("aab \n汉", max_size=60), label="text")
    tokens = [*BYTES, *extra]
    ids = build(tokens, find_splits(tokens)).encode(text).ids
    assert ids == reference(tokens).encode(text)


def test_canonical_pair_is_the_last_join():
    tokens = [*BYTES, b"bc", b"ab", b"abc", b"abcd", b"zz"]
    splits = dict(zip(tokens, find_splits(tokens), strict=True))
    assert splits[b"bc"] == splits[b"ab"] == 1
    assert splits[b"abc"] == 1  # a + bc, since bc has the lower rank
    assert splits[b"abcd"] == 3
    assert splits[b"a"] == 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("kimi_mlx.text.vocabulary_cache.CACHE_FROM_TOKENS", 1)
    return tmp_path / "kimi-mlx" / "tokenizers"


def test_pairs_are_read_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch):
    tokens = small_ranks()
    expected = find_splits(tokens)
    assert cached_splits(tokens, "d") == expected
    assert [path.name for path in cache.iterdir()] == ["d.pairs"]
    monkeypatch.setattr("kimi_mlx.text.vocabulary_cache.find_splits", lambda tokens: pytest.fail("not cached"))
    assert cached_splits(tokens, "d") == expected


@pytest.mark.parametrize("damage", [b"", b"x", FORMAT, FORMAT + bytes(32) + bytes(2), None])
def test_broken_cache_is_rebuilt(cache: Path, damage: bytes | None):
    tokens = small_ranks()
    expected = cached_splits(tokens, "d")
    path = cache / "d.pairs"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\xff" if damage is None else damage)
    assert cached_splits(tokens, "d") == expected
    assert path.read_bytes() == whole


def test_cache_of_another_vocabulary_is_not_used(cache: Path):
    cached_splits(small_ranks(), "d")
    assert cached_splits(BYTES, "d") == [0] * 256


def test_an_unusable_cache_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("kimi_mlx.text.vocabulary_cache.CACHE_FROM_TOKENS", 1)
    assert cached_splits(small_ranks(), "d") == find_splits(small_ranks())


def test_base64_of_the_test_vocabulary_is_the_published_form():
    assert tiktoken_lines([b"!"]) == base64.b64encode(b"!") + b" 0\n"
