"""What clients say to a server: random words, the same ones for the same numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from kimi_mlx.bench.serving_files import MINI
from kimi_mlx.errors import UsageError
from kimi_mlx.text.vocabulary import read_ranks

WORD = re.compile(rb" [a-z]{2,}")


@dataclass(frozen=True)
class Load:
    """What is asked of a server, and by how many.

    Args:
        clients: at once; each asks again as soon as it has its answer.
        conversations: in all.
        turns: of each conversation; a turn is a request that repeats the conversation so far.
        prompt_tokens: of what a client says in the first turn, by kimi-mini's tokenizer.
        later_tokens: of what it says in later turns; None: as many.
        answer_tokens: of each answer.
        shared_tokens: of a system prompt, the same for all.
        stream: whether answers are streams.
        seed: of the words.
    """

    clients: int = 8
    conversations: int = 32
    turns: int = 1
    prompt_tokens: int = 64
    later_tokens: int | None = None
    answer_tokens: int = 64
    shared_tokens: int = 0
    stream: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        least = min(self.clients, self.conversations, self.turns, *map(self.said_tokens, (0, 1)))
        if least < 1 or self.answer_tokens < 2 or min(self.shared_tokens, self.seed) < 0:
            raise UsageError(
                "clients, conversations, turns and prompt tokens start at 1, answers at 2 tokens, the rest at 0"
            )

    def said_tokens(self, turn: int) -> int:
        """Of what a client says in a turn, from 0."""
        return self.prompt_tokens if turn == 0 or self.later_tokens is None else self.later_tokens

    @property
    def requests(self) -> int:
        """In all."""
        return self.conversations * self.turns


@cache
def words() -> tuple[str, ...]:
    """Words that are one token of kimi-mini's wherever they stand behind a blank."""
    return tuple(token.decode() for token in read_ranks(MINI / "tiktoken.model") if WORD.fullmatch(token))


def random_text(tokens: int, *numbers: int) -> str:
    """So many words; the same ones for the same numbers."""
    chosen = np.random.default_rng(numbers).integers(0, len(words()), tokens)
    return "".join(words()[i] for i in chosen)
