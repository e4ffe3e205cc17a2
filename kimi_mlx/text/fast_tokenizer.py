"""Read a Hugging Face `tokenizer.json`, without the parts that could turn plain text into control tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from kimi_mlx.errors import TextError
from kimi_mlx.files import read_regular_file
from kimi_mlx.text.vocabulary import CHAR_TO_BYTE

HINT = "only byte-level BPE tokenizers are supported"


def read_fast_tokenizer(path: Path, added: Mapping[int, str]) -> tuple[Tokenizer, dict[int, bytes], dict[str, int]]:
    """Return the BPE without added tokens, the bytes of its tokens by id, and the added tokens by text.

    Args:
        path: path of `tokenizer.json`.
        added: further added tokens by id, from `tokenizer_config.json`.

    Raises:
        TextError: the file is broken or not a byte-level BPE.
    """
    try:
        spec = json.loads(read_regular_file(path))
        model: dict[str, Any] = spec["model"]
        vocab = {str(text): int(i) for text, i in model["vocab"].items()}
        merges: list[Any] = model["merges"]
        listed: list[Any] = spec.get("added_tokens") or []
        special = {str(token["content"]): int(token["id"]) for token in listed}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TextError(f"cannot read `{path}` as a BPE tokenizer: {error!r}", hint=HINT) from error
    special |= {text: i for i, text in added.items()}
    # Merges could produce an added token that is also in the model's vocabulary, so remove it there.
    vocab = {text: i for text, i in vocab.items() if i not in special.values() and text not in special}
    spec["added_tokens"] = []
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    model["vocab"] = vocab
    model["merges"] = [pair for pair in map(_pair, merges) if pair[0] + pair[1] in vocab]
    model["unk_token"] = None
    tokens = {i: _bytes_of(text, path) for text, i in vocab.items()}
    try:
        bpe = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TextError(f"cannot build the tokenizer of `{path}`: {error}", hint=HINT) from error
    return bpe, tokens, special


def _pair(merge: Any) -> tuple[str, str]:
    """Return the two parts of a merge, written `"a b"` or `["a", "b"]`."""
    parts = merge.split(" ") if isinstance(merge, str) else list(cast("list[str]", merge))
    return (parts[0], parts[1]) if len(parts) == 2 else ("", "")


def _bytes_of(text: str, path: Path) -> bytes:
    try:
        return bytes(CHAR_TO_BYTE[char] for char in text)
    except KeyError:
        raise TextError(f"`{path}` has the token `{text}`, which is not byte-level", hint=HINT) from None
