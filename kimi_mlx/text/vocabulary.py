"""Read a `tiktoken.model` file, and derive the merges that give the same ids in `tokenizers`.

The file has one line per token, `BASE64 RANK`, and no merges: tiktoken joins the two neighbours that make the token of
lowest rank. `tokenizers` needs merges, and one per token is enough. In a longer text, the bytes of a token are joined
in the same order as on their own until the token is complete, because no join crosses its edges before. So a token can
only be made by the last join of BPE over its own bytes: its canonical pair.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from kimi_mlx.errors import TextError
from kimi_mlx.files import read_regular_file

# Kimi's published pattern; the engines of `tokenizers` and tiktoken agree on it, code point by code point.
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NEVER = 1 << 60
HINT = "delete the file and download the checkpoint again"


def _byte_alphabet() -> list[str]:
    """Return the printable character that represents each byte in byte-level vocabularies."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet: list[str] = []
    for byte in range(256):
        rest = sum(other not in printable for other in range(byte))
        alphabet.append(chr(byte if byte in printable else 0x100 + rest))
    return alphabet


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def read_ranks(path: Path) -> list[bytes]:
    """Return the tokens of a tiktoken file in the order of their ranks.

    Raises:
        TextError: the file is missing or broken; the message names the line.
    """
    data = _read(path)
    by_rank: dict[int, bytes] = {}
    rank_of_token: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        token, rank = _parse_line(line, path, number)
        if rank in by_rank:
            raise TextError(f"`{path}` line {number}: rank {rank} appears twice", hint=HINT)
        if token in rank_of_token:
            raise TextError(f"`{path}` line {number}: same token as rank {rank_of_token[token]}", hint=HINT)
        by_rank[rank] = token
        rank_of_token[token] = rank
    if not by_rank:
        raise TextError(f"`{path}` has no tokens", hint=HINT)
    gap = next((rank for rank in range(len(by_rank)) if rank not in by_rank), None)
    if gap is not None:
        raise TextError(f"`{path}` has {len(by_rank)} tokens but none of rank {gap}", hint=HINT)
    missing = next((byte for byte in range(256) if bytes([byte]) not in rank_of_token), None)
    if missing is not None:
        raise TextError(f"`{path}` has no token for the single byte 0x{missing:02x}", hint=HINT)
    return [by_rank[rank] for rank in range(len(by_rank))]


def _read(path: Path) -> bytes:
    try:
        data = read_regular_file(path)
    except OSError as error:
        raise TextError(f"cannot read `{path}`: {error.strerror}", hint=HINT) from error
    if data.startswith(b"version https://git-lfs"):
        raise TextError(f"`{path}` is a Git LFS pointer, not the vocabulary", hint="fetch it with `git lfs pull`")
    return data


def _parse_line(line: bytes, path: Path, number: int) -> tuple[bytes, int]:
    try:
        coded, rank = line.split()
        token = binascii.a2b_base64(coded)
        # `a2b_base64` skips invalid characters, so check that encoding gives the same text.
        if not token or binascii.b2a_base64(token, newline=False) != coded:
            raise ValueError
        if not rank.isdigit():
            raise ValueError
        return token, int(rank)
    except ValueError as error:  # binascii.Error is one
        shown = line[:40].decode("utf-8", "replace")
        raise TextError(f"`{path}` line {number}: `{shown}` is not `BASE64 RANK`", hint=HINT) from error


def find_splits(tokens: Sequence[bytes]) -> list[int]:
    """Return the number of bytes in the first part of each token's canonical pair; 0 if no merge makes the token."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    splits: list[int] = []
    for token in tokens:
        possible = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        # If there is only one way to split the token, BPE can only make it from that pair.
        splits.append(possible[0] if len(possible) == 1 else _last_merge(token, ranks) if possible else 0)
    return splits


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> int:
    """Join the bytes of `token` as tiktoken does until two parts are left; return the length of the first, or 0."""
    starts = list(range(len(token) + 1))
    joins = [ranks.get(token[i : i + 2], NEVER) for i in range(len(token) - 1)]
    while len(joins) > 1:
        lowest = min(joins)
        if lowest == NEVER:
            return 0
        at = joins.index(lowest)
        del starts[at + 1], joins[at]
        if at:
            joins[at - 1] = ranks.get(token[starts[at - 1] : starts[at + 1]], NEVER)
        if at < len(joins):
            joins[at] = ranks.get(token[starts[at] : starts[at + 2]], NEVER)
    return starts[1]


def build(tokens: Sequence[bytes], splits: Sequence[int]) -> Tokenizer:
    """Return the byte-level BPE of these tokens, with Kimi's pattern and no added tokens.

    Raises:
        ValueError: a split does not cut its token into two others.
    """
    table = dict(enumerate(BYTE_TO_CHAR))
    words = [token.decode("latin-1").translate(table) for token in tokens]
    vocabulary = {word: rank for rank, word in enumerate(words)}
    merges: list[tuple[str, str]] = []
    for word, split in zip(words, splits, strict=True):
        if split:
            pair = word[:split], word[split:]
            if pair[0] not in vocabulary or pair[1] not in vocabulary:
                raise ValueError(f"split {split} of a token of {len(word)} bytes")
            merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split_words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_words, to_bytes])
    return tokenizer
