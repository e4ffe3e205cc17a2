"""The message with the leader's decision, which all ranks receive before a step.

In a pipeline it also has the accepted tokens of the previous step, because the other ranks do not sample.
Format: integers. First is_drafting, then two lists, the accepted tokens and the drafts. A list is its number of items,
then for each item its number of tokens and its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kimi_mlx.engine.drafts.drafter import Draft


@dataclass(frozen=True)
class Decision:
    """The leader's decision before a step.

    Args:
        drafts: draft of each sequence whose last token is known.
        is_drafting: whether the mode with drafts continues, so that the next step has a decision, too; otherwise steps
            are launched ahead.
    """

    drafts: tuple[Draft, ...]
    is_drafting: bool


def encode(accepted: Sequence[Sequence[int]], decision: Decision) -> list[int]:
    """Encode a message.

    Args:
        accepted: accepted tokens of each entry of the previous step; empty if all ranks know them.
        decision: the decision.
    """
    numbers = [int(decision.is_drafting)]
    for lists in (accepted, decision.drafts):
        numbers.append(len(lists))
        for tokens in lists:
            numbers += [len(tokens), *tokens]
    return numbers


def decode(message: Sequence[int]) -> tuple[list[list[int]], Decision]:
    """Decode a message into the accepted tokens and the decision."""
    numbers = iter(message)
    is_drafting = bool(next(numbers))
    accepted = list(_read_lists(numbers))
    return accepted, Decision(tuple(map(tuple, _read_lists(numbers))), is_drafting)


def max_size(num_accepted: int, num_drafts: int, max_tokens: int) -> int:
    """Return the maximum number of integers of a message.

    Args:
        num_accepted: number of entries whose accepted tokens are sent.
        num_drafts: maximum number of sequences.
        max_tokens: maximum number of draft tokens per sequence.
    """
    return 3 + num_accepted * (2 + max_tokens) + num_drafts * (1 + max_tokens)


def _read_lists(numbers: Iterator[int]) -> Iterator[list[int]]:
    for _ in range(next(numbers)):
        yield [next(numbers) for _ in range(next(numbers))]
