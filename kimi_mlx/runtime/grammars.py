"""The grammar compiler of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.engine.grammar_compiler import GrammarCompiler, TokenVocabulary
from kimi_mlx.errors import TextError
from kimi_mlx.text.tokenizer import Tokenizer


def open_grammar_compiler(folder: Path, vocab_size: int) -> GrammarCompiler:
    """Return a compiler, and begin to read the vocabulary in the background.

    Args:
        folder: folder of the checkpoint, or a store; both have the tokenizer's files.
        vocab_size: number of logits.
    """
    compiler = GrammarCompiler(lambda: load_token_vocabulary(folder, vocab_size))
    compiler.start()
    return compiler


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
