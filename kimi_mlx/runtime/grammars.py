"""The grammars of one model on this rank: its vocabulary is read when the first one is asked for."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.engine.constraint import Constraint, Vocabulary
from kimi_mlx.runtime.vocabulary import load_token_vocabulary


class GrammarCompiler:
    """Makes constraints.

    Args:
        folder: of the checkpoint, or of the rank's store: it has the tokenizer.
        vocab_size: of the logits.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self._folder, self._vocab_size = folder, vocab_size
        self._vocabulary: Vocabulary | None = None

    def constrain(self, grammar: str) -> Constraint:
        """The constraint of a grammar.

        Raises:
            EngineError: it cannot be compiled.
            TextError: the tokenizer cannot be read.
        """
        if self._vocabulary is None:
            self._vocabulary = load_token_vocabulary(self._folder, self._vocab_size)
        return Constraint(self._vocabulary, grammar)
