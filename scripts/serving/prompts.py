"""Random messages of clients, which depend only on seed, repetition, conversation and turn."""

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
    """A range of token counts, both ends included, with equal probability."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> TokenRange:
        """Parse `64` or `16-112`.

        Raises:
            UsageError: the text is neither.
        """
        low, _, high = text.partition("-")
        try:
            return cls(int(low), int(high or low))
        except ValueError:
            raise UsageError(f"`{text}` is not a number of tokens", hint="for example 64, or 16-112") from None

    def __str__(self) -> str:
        """Return the text that `parse` accepts."""
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Workload:
    """The requests of all clients.

    Args:
        clients: number of concurrent clients; each sends its next request when it has its answer.
        conversations: number of conversations of all clients.
        turns: number of requests per conversation; each repeats the conversation so far.
        prompt_tokens: length of the first message, by kimi-mini's tokenizer.
        later_tokens: length of later messages; None for the same.
        answer_tokens: length of each answer.
        shared_tokens: length of a system prompt, the same for all.
        has_new_prefix: whether each repetition has a system prompt of its own, so that no server has it in its cache.
        stream: whether answers are streamed.
        seed: random seed of the messages.
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
    has_new_prefix: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        spans = [self.prompt_tokens, self.later_tokens or self.prompt_tokens, self.answer_tokens]
        if (
            min(self.clients, self.conversations, self.turns, *(span.low for span in spans)) < 1
            or any(span.high < span.low for span in spans)
            or min(self.shared_tokens, self.seed) < 0
        ):
            raise UsageError(
                "clients, conversations, turns and tokens must be at least 1, shared tokens and the seed at least 0",
                hint="write ranges from low to high, for example 16-112",
            )

    def user_message(self, repetition: int, number: int, turn: int) -> tuple[str, int]:
        """Return the user message of a turn, and the requested number of tokens."""
        key = (self.seed, repetition + 1, number, turn)
        span = self.prompt_tokens if turn == 0 or self.later_tokens is None else self.later_tokens
        lengths = np.random.default_rng((*key, 0)).integers(
            (span.low, self.answer_tokens.low), (span.high + 1, self.answer_tokens.high + 1)
        )
        return random_text(int(lengths[0]), *key), int(lengths[1])

    def system_prompt(self, repetition: int) -> str:
        """Return the system prompt of all conversations of a repetition."""
        numbers = (self.seed, repetition + 1) if self.has_new_prefix else (self.seed,)
        return random_text(self.shared_tokens, *numbers)

    @property
    def requests(self) -> int:
        """Number of requests."""
        return self.conversations * self.turns


WORKLOADS = {
    "agents": Workload(
        clients=100,
        conversations=100,
        prompt_tokens=TokenRange(16, 64),
        answer_tokens=TokenRange(32, 64),
        shared_tokens=1169,
        has_new_prefix=True,
    )
}
"""Named workloads. `agents`: a hundred agents with the same instructions and tools start at the same time."""


@cache
def words() -> tuple[str, ...]:
    """Return all words that are one token of kimi-mini's after a space."""
    return tuple(token.decode() for token in read_ranks(MINI / "tiktoken.model") if WORD.fullmatch(token))


def random_text(tokens: int, *numbers: int) -> str:
    """Return `tokens` random words, which depend only on the numbers."""
    chosen = np.random.default_rng(numbers).integers(0, len(words()), tokens)
    return "".join(words()[i] for i in chosen)
