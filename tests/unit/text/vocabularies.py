"""Small vocabularies for the tests of this folder: tiktoken ranks trained on a few paragraphs."""

# ruff: noqa: RUF001  (these characters are under test)
from __future__ import annotations

import base64
import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
import tiktoken

from kimi_mlx.text.tokenizer import NUM_RESERVED_SPECIAL_TOKENS
from kimi_mlx.text.vocabulary import PATTERN

# Ids of Kimi's control tokens, counted from the first of the 256 special ids.
SPECIAL = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}
CORPUS = """
The quick brown fox doesn't jump; THE lazy dogs we've seen. I'll say it's HTTPServer's XMLParser,
they're ΑΒΓ αβγ.
def encode(self, text: str) -> list[int]:
    for piece in pieces(text):        # 1234567 tokens
        ids.extend(self.bpe[piece])   \t\treturn {"a": [1, 2, 3], "b": null}
你好，世界！今天的天气很好，我们去公园吧。東京 한국어 日本語のテキスト。 1２３４五
<|tool_calls_section_begin|><|im_end|><think>thinking</think> 👍🏽👩\u200d👩\u200d👧
naïve café Ça e\u0301e\u0301 हिन्दी ภาษาไทย
          \n\n\n    \r\n\t\u3000\u3000\u00a0\u2028 ------======******////// <<<<>>>>
"""


def train_ranks(corpus: str, num_merges: int) -> list[bytes]:
    """Return the 256 bytes and `num_merges` tokens, trained on the corpus."""
    sequences = [[bytes([b]) for b in word.encode()] for word in regex.findall("(?V1)" + PATTERN, corpus)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 256 + num_merges:
        pairs = Counter(pair for sequence in sequences for pair in pairwise(sequence))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        tokens.append(left + right)
        sequences = [_join(sequence, left, right) for sequence in sequences]
    return tokens


def _join(sequence: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    joined: list[bytes] = []
    for part in sequence:
        if joined and joined[-1] == left and part == right:
            joined[-1] = left + right
        else:
            joined.append(part)
    return joined


@functools.cache
def small_ranks() -> tuple[bytes, ...]:
    """Return the ranks that most tests use."""
    return tuple(train_ranks(CORPUS, 300))


def tiktoken_lines(tokens: Iterable[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def write_tokenizer(folder: Path, tokens: Iterable[bytes] | None = None, **config: Any) -> Path:
    """Write `tiktoken.model` and `tokenizer_config.json` in Kimi's form; return the folder."""
    tokens = list(small_ranks() if tokens is None else tokens)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiktoken.model").write_bytes(tiktoken_lines(tokens))
    added = {str(len(tokens) + i): {"content": text, "special": True} for i, text in SPECIAL.items()}
    written = json.dumps({"added_tokens_decoder": added, **config})
    (folder / "tokenizer_config.json").write_text(written, encoding="utf-8")
    return folder


def reference(tokens: Iterable[bytes]) -> tiktoken.Encoding:
    """Return the `tiktoken` encoding of the same ranks, with the control tokens."""
    ranks: Mapping[bytes, int] = {token: rank for rank, token in enumerate(tokens)}
    special = {
        SPECIAL.get(i, f"<|reserved_token_{len(ranks) + i}|>"): len(ranks) + i
        for i in range(NUM_RESERVED_SPECIAL_TOKENS)
    }
    return tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens=special)
