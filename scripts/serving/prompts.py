"""What clients say to a server: random words, the same ones for the same numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from kimi_mlx.errors import UsageError
from kimi_mlx.text.vocabulary import read_ranks
from scripts.serving.files import MINI

WORD = re.compile(rb" [a-z]{2,}")


@dataclass(frozen=True)
class TokenRange:
    """A number of tokens between two, both included, each as likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> TokenRange:
        """`64`, or `16-112`.

        Raises:
            UsageError: it is neither.
        """
        low, _, high = text.partition("-")
        try:
            return cls(int(low), int(high or low))
        except ValueError:
            raise UsageError(f"`{text}` is no number of tokens", hint="for example 64, or 16-112") from None

    def __str__(self) -> str:
        """As it is parsed."""
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Workload:
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
    prompt_tokens: TokenRange = TokenRange(64, 64)
    later_tokens: TokenRange | None = None
    answer_tokens: TokenRange = TokenRange(64, 64)
    shared_tokens: int = 0
    stream: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        spans = [self.prompt_tokens, self.later_tokens or self.prompt_tokens, self.answer_tokens]
        if (
            min(self.clients, self.conversations, self.turns, *(span.low for span in spans)) < 1
            or any(span.high < span.low for span in spans)
            or min(self.shared_tokens, self.seed) < 0
        ):
            raise UsageError(
                "clients, conversations, turns and tokens start at 1, shared tokens and the seed at 0",
                hint="a range goes upwards, as in 16-112",
            )

    def user_message(self, repetition: int, number: int, turn: int) -> tuple[str, int]:
        """What a client says in a turn, and how many tokens it asks for."""
        key = (self.seed, repetition + 1, number, turn)
        span = self.prompt_tokens if turn == 0 or self.later_tokens is None else self.later_tokens
        lengths = np.random.default_rng((*key, 0)).integers(
            (span.low, self.answer_tokens.low), (span.high + 1, self.answer_tokens.high + 1)
        )
        return random_text(int(lengths[0]), *key), int(lengths[1])

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
