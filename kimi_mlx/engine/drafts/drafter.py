"""The interface of drafters, which propose drafts."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kimi_mlx.engine.sequence import Sequence
    from kimi_mlx.engine.step_runner import InFlightStep

Draft = tuple[int, ...]
"""Token ids that may follow the known tokens of a sequence."""


@dataclass(frozen=True)
class Offer:
    """A draft that a drafter can propose for a sequence now.

    Args:
        source: origin of the draft; drafts from one source have similar acceptance.
        length: maximum number of draft tokens, at least 1.
        tokens: the draft, if it is known already; then it costs nothing.
    """

    source: str
    length: int
    tokens: Draft = ()


class Drafter(Protocol):
    """Proposes drafts. Only the leader has drafters.

    A draft never changes the text: the model verifies it. Only draft tokens that equal the tokens sampled with the same
    random numbers are accepted.
    """

    def offer(self, sequence: Sequence, limit: int) -> Offer | None:
        """Offer a draft after the known tokens of a sequence; return None if there is nothing to propose.

        Args:
            sequence: the sequence.
            limit: maximum number of draft tokens, at least 1.
        """
        ...

    def draft(self, requests: ListOf[tuple[Sequence, Offer, int]]) -> list[Draft]:
        """Return a draft for each sequence. A grammar may make it shorter.

        Args:
            requests: a sequence, its offer, and the number of draft tokens, at least 1.
        """
        ...

    def observe(self, step: InFlightStep) -> None:
        """Keep data of a step for later drafts. Called after its tokens are read and appended."""
        ...


def accepted_length(draft: Draft, sampled: ListOf[int]) -> int:
    """Return the number of leading draft tokens that equal the sampled tokens."""
    pairs = zip(draft, sampled, strict=False)
    return next((at for at, (guess, token) in enumerate(pairs) if guess != token), min(len(draft), len(sampled)))
