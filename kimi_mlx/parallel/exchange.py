"""What every rank's exchange does: beside the model's data, a few words of the leader travel with each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.model.decoder import Exchange
from kimi_mlx.parallel.group import Group

STAMPS = 251
"""Numbers of steps and commands go around here: whole numbers up to 256 are exact in bfloat16."""

WORD_SIZE = 2
"""Step number, commands."""


@dataclass(frozen=True)
class Told:
    """What came with a step, to be evaluated with it.

    Args:
        words: (rows, WORD_SIZE or more) of the ranks that spoke, the leader's first; tokens may follow.
        number: of the step that they must be of.
        earlier: the same of a step before, which is checked with this one.
        digests: (rows, ...) of the same data as several ranks have it, if it is compared in this step.
    """

    words: mx.array
    number: int
    earlier: Told | None = None
    digests: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """To be evaluated with the step."""
        return [self.words] if self.digests is None else [self.words, self.digests]


@dataclass(frozen=True)
class Said:
    """What the leader said.

    Args:
        commands: how many commands the leader had in all when it said so, going around at STAMPS.
        tokens: those of the step that were told, where a rank does not know them otherwise.
    """

    commands: int
    tokens: tuple[int, ...] = ()


class RankExchange(Exchange, ABC):
    """An exchange over a group of several ranks, whose leader is rank 0.

    When MLX's ring loses a peer (seen in 0.32), one collective may return what happens to be in memory before all
    later ones hang. So each step carries its number.
    """

    check_every = 0
    """Compare what ranks have in every step whose number this divides; 0 never compares."""

    def __init__(self, group: Group):
        self.group = group
        self._number = 0
        self._commands = self._num_told = 0
        self._told: Told | None = None

    @property
    def is_leader(self) -> bool:
        """Whether what this rank says counts."""
        return self.group.rank == 0

    def say(self, commands: int, num_told: int) -> None:
        """What goes with the next step.

        Args:
            commands: see Said.
            num_told: so many of its tokens, the first ones, may be unknown to ranks that do not draw.
        """
        self._commands, self._num_told = commands % STAMPS, num_told

    def close(self, hidden: mx.array) -> None:
        """End a step without logits.

        Args:
            hidden: what the step has computed.
        """

    @property
    def told(self) -> Told:
        """What came with the step that was just built."""
        assert self._told is not None
        return self._told

    def read(self, told: Told) -> Said:
        """What the leader said in a step: the same on all ranks.

        Raises:
            RingError: what came is not of this step.
        """
        if told.earlier is not None:
            self.read(told.earlier)
        if told.digests is not None:
            self._compare(np.array(told.digests))
        rows = np.array(told.words.astype(mx.float32))
        if not (rows[:, 0] == told.number).all():
            raise lost(self.group.rank)
        digits = rows[0, WORD_SIZE:].astype(np.int64).reshape(-1, 4)
        tokens = tuple((digits @ (1 << 24, 1 << 16, 1 << 8, 1)).tolist())
        return Said(int(rows[0, 1]), tokens)

    def _is_checked(self, number: int) -> bool:
        """Whether a step is one of those in which data is compared: the same on all ranks."""
        return self.check_every > 0 and number % self.check_every == 0

    @abstractmethod
    def _compare(self, digests: np.ndarray) -> None:
        """Raise RingError if the ranks' digests differ."""

    def _next_word(self) -> list[float]:
        self._number = (self._number + 1) % STAMPS
        return [float(self._number), float(self._commands)]


def digest(x: mx.array) -> mx.array:
    """A number (1,) uint32 that changes with any bit of x, and with the order of its elements."""
    flat = x.reshape(-1)
    bits = flat.view(mx.uint32 if flat.itemsize == 4 else mx.uint16).astype(mx.uint32)
    return (bits * (2 * mx.arange(bits.size, dtype=mx.uint32) + 1)).sum(keepdims=True)


def lost(rank: int) -> RingError:
    """The error of a rank to which something else came than must."""
    return RingError("a rank is lost: what came over the ring is not of this step", rank=rank)
