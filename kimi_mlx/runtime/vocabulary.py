"""The tokens of a checkpoint, as its ranks need them to hold answers to grammars."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.engine.constraint import Vocabulary
from kimi_mlx.errors import TextError
from kimi_mlx.text.tokenizer import Tokenizer


def load_token_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the vocabulary: about a second for Kimi's 163,840 tokens, so not before a grammar asks for it.

    Args:
        folder: of the checkpoint, or of a store: both have the tokenizer's files.
        vocab_size: of the logits.

    Raises:
        TextError: a file is missing or broken, or no token ends an answer.
    """
    tokenizer = Tokenizer.load_decoder(folder)
    if not tokenizer.eos_token_ids:
        raise TextError(f"`{folder}` names no token that ends an answer", hint="set `eos_token_id` in `config.json`")
    return Vocabulary(tokenizer.tokens(), tokenizer.special_tokens.values(), tokenizer.eos_token_ids, vocab_size)
