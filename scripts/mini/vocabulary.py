"""Learn kimi-mini's byte-pair vocabulary and write it in the format of Kimi's own files."""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers

from kimi_mlx.text.tool_declarations import to_typescript
from kimi_mlx.text.vocabulary import PATTERN
from scripts.mini.dialogues import Dialogue

RANKS = 1536  # with the 256 special ids a multiple of 32
SPECIAL_IDS = 256
# Offsets from the first special id, as in Kimi's own vocabulary.
SPECIAL_TOKENS: dict[int, str] = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
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
NOT_SPECIAL = (
    11,
    12,
    13,
    14,
    15,
    22,
    23,
)  # markers of tool calls and thinking: added, but not "special"


def learn_ranks(texts: Iterable[str], ranks: int = RANKS) -> list[bytes]:
    """Return the 256 bytes and the most useful merges. Numbers stay single digits: sums can be learned."""
    pattern = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in pattern.pre_tokenize_str(text))
    words = [[bytes([byte]) for byte in word.encode()] for word in counts if not word.isdigit()]
    weights = [count for word, count in counts.items() if not word.isdigit()]
    tokens = [bytes([byte]) for byte in range(256)]
    pairs, where = _count_pairs(words, weights)
    while len(tokens) < ranks:
        pair = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[pair] <= 1:
            raise ValueError(f"the text is too small for {ranks} ranks: it gives {len(tokens)}")
        tokens.append(pair[0] + pair[1])
        for index in list(where[pair]):
            _merge_word(words, index, weights[index], pair, pairs, where)
    return tokens


Pair = tuple[bytes, bytes]


def _count_pairs(words: list[list[bytes]], weights: list[int]) -> tuple[Counter[Pair], defaultdict[Pair, set[int]]]:
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, (word, weight) in enumerate(zip(words, weights, strict=True)):
        for pair in pairwise(word):
            pairs[pair] += weight
            where[pair].add(index)
    return pairs, where


def _merge_word(
    words: list[list[bytes]],
    index: int,
    weight: int,
    pair: Pair,
    pairs: Counter[Pair],
    where: defaultdict[Pair, set[int]],
) -> None:
    word = words[index]
    for old in pairwise(word):
        pairs[old] -= weight
        where[old].discard(index)
    merged: list[bytes] = []
    for part in word:
        # Greedy from the left, as BPE applies one merge.
        if merged and (merged[-1], part) == pair:
            merged[-1] = merged[-1] + part
        else:
            merged.append(part)
    words[index] = merged
    for new in pairwise(merged):
        pairs[new] += weight
        where[new].add(index)


def tokenizer_config(ranks: int) -> dict[str, Any]:
    """Return `tokenizer_config.json`, in the format of Kimi's own."""
    decoder: dict[str, dict[str, Any]] = {}
    for offset in range(SPECIAL_IDS):
        content = SPECIAL_TOKENS.get(offset)
        if content is None:
            continue
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        decoder[str(ranks + offset)] = {"content": content, **flags, "special": offset not in NOT_SPECIAL}
    return {
        "added_tokens_decoder": decoder,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 65536,
        "tokenizer_class": "TikTokenTokenizer",
    }


def write_vocabulary(tokens: list[bytes], folder: Path) -> None:
    """Write `tiktoken.model` (one line per rank: base64, rank) and `tokenizer_config.json`."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(len(tokens)), indent=1) + "\n")


def sample_texts(dialogues: Iterable[Dialogue]) -> Iterable[str]:
    """Yield every text in these dialogues that is encoded as one segment, or nearly so."""
    for dialogue in dialogues:
        if dialogue.tools:
            yield to_typescript(dialogue.tools)
        for message in dialogue.messages:
            yield message["role"]
            yield message["content"]
            yield message.get("reasoning_content", "")
            if message["role"] == "tool":
                yield f"## Return of {message['tool_call_id']}\n"
            for call in message.get("tool_calls", []):
                yield call["id"]
                yield call["function"]["arguments"]
