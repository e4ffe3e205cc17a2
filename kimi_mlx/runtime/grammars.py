"""Compile grammars for one model on this rank. The vocabulary is read when the first grammar needs it."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.engine.constraint import Constraint, TokenVocabulary
from kimi_mlx.errors import TextError
from kimi_mlx.text.tokenizer import Tokenizer


class GrammarCompiler:
    """Compiles grammars to constraints.

    Args:
        folder: folder of the checkpoint, or store of the rank; both have the tokenizer.
        vocab_size: number of logits.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self._folder, self._vocab_size = folder, vocab_size
        self._vocabulary: TokenVocabulary | None = None

    def compile(self, grammar: str) -> Constraint:
        """Return the constraint of a grammar.

        Raises:
            EngineError: the grammar cannot be compiled.
            TextError: the tokenizer cannot be read.
        """
        if self._vocabulary is None:
            self._vocabulary = load_token_vocabulary(self._folder, self._vocab_size)
        return Constraint(self._vocabulary, grammar)


def load_token_vocabulary(folder: Path, vocab_size: int) -> TokenVocabulary:
    """Read the tokens of a checkpoint. This takes about a second for Kimi's 163,840 tokens.

    Args:
        folder: folder of the checkpoint, or a store; both have the tokenizer's files.
        vocab_size: number of logits.

    Raises:
        TextError: a file is missing or broken, or no token ends an answer.
    """
    tokenizer = Tokenizer.load_decoder(folder)
    if not tokenizer.eos_token_ids:
        raise TextError(f"`{folder}` names no token that ends an answer", hint="set `eos_token_id` in `config.json`")
    return TokenVocabulary(tokenizer.tokens(), tokenizer.special_tokens.values(), tokenizer.eos_token_ids, vocab_size)
