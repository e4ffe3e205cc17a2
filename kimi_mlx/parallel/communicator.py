"""Communication between ranks.

Each step carries a small header from rank 0: the step number, the command count, and whether rank 0 wants to decide on
drafts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.model.decoder import CapturedStates, Communicator
from kimi_mlx.parallel.group import Group

SEQUENCE_MODULUS = 251
"""Step numbers and command counts are sent modulo this: bfloat16 is exact for integers up to 256."""

HEADER_SIZE = 3
"""Number of values in a header: step number, command count, and whether the leader wants to decide on drafts."""


@dataclass(frozen=True)
class StepHeader:
    """Header of a step, not evaluated.

    Args:
        fields: (rows, HEADER_SIZE or more), one row for each sending rank, the leader's first; tokens may follow.
        number: expected step number.
        previous: header of an earlier step that is checked together with this one.
        digests: (rows, ...) digests of data that must be the same in all rows, if this step is checked.
        names: names of the digests of a row, for error messages.
    """

    fields: mx.array
    number: int
    previous: StepHeader | None = None
    digests: mx.array | None = None
    names: tuple[str, ...] = ()

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays to evaluate with the step."""
        own = [self.fields] if self.digests is None else [self.fields, self.digests]
        return own if self.previous is None else own + self.previous.arrays


@dataclass(frozen=True)
class LeaderState:
    """State of the leader, decoded from a header.

    Args:
        num_commands: number of commands that the leader had received, modulo SEQUENCE_MODULUS.
        tokens: leading input tokens of the step, on ranks that do not know them otherwise.
        wants_decision: whether the leader wants to decide on drafts before the next step is launched.
    """

    num_commands: int
    tokens: tuple[int, ...] = ()
    wants_decision: bool = False


class RankCommunicator(Communicator, ABC):
    """A communicator over a group of several ranks, whose leader is rank 0.

    When MLX's ring loses a peer (seen in 0.32), a collective may return uninitialized memory before all later ones
    hang. Therefore each step carries its number.
    """

    check_every = 0
    """Compare checksums between ranks in every step whose number is a multiple of this (0: off)."""

    def __init__(self, group: Group):
        self.group = group
        self._number = 0
        self._num_commands = self._num_tokens = 0
        self._wants_decision = False
        self._header: StepHeader | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this rank is rank 0, whose headers the others follow."""
        return self.group.rank == 0

    def set_header(self, num_commands: int, num_tokens: int, wants_decision: bool = False) -> None:
        """Set the contents of the next step's header.

        Args:
            num_commands: number of commands that the leader has received.
            num_tokens: number of leading tokens that ranks without the head do not know yet.
            wants_decision: whether the leader wants to decide on drafts; see kimi_mlx.engine.batch.
        """
        self._num_commands, self._num_tokens = num_commands % SEQUENCE_MODULUS, num_tokens
        self._wants_decision = wants_decision

    def capture(self, states: Sequence[mx.array]) -> CapturedStates | None:
        """Return the captured states on the leader: with parts of all layers, every rank has the same."""
        return CapturedStates(states) if self.is_leader else None

    def expect_long_steps(self) -> None:
        """Announce that the next step contains a chunk of a prompt: ranks may wait long for each other."""

    def synchronize(self) -> None:
        """Wait on the CPU until all ranks have admitted a request. In a pipeline ranks do not wait for each other."""

    @abstractmethod
    def broadcast(self, numbers: Sequence[int]) -> list[int]:
        """Return the leader's numbers on every rank; wait for them on the CPU, because the leader may be late.

        Call it between two steps.

        Args:
            numbers: integers; on other ranks than the leader only their count matters.

        Raises:
            RingError: the data belongs to another step.
        """

    def finish_step(self, hidden: mx.array) -> None:
        """Finish a step without logits.

        Args:
            hidden: output of the step.
        """

    @property
    def header(self) -> StepHeader:
        """Header of the step that was just built."""
        assert self._header is not None
        return self._header

    def decode_header(self, header: StepHeader) -> LeaderState:
        """Return the leader's state from a header: the same on all ranks.

        Raises:
            RingError: the header belongs to another step.
        """
        if header.previous is not None:
            self.decode_header(header.previous)
        if header.digests is not None:
            self._compare(np.array(header.digests), header.names)
        rows = np.array(header.fields.astype(mx.float32))
        if not (rows[:, 0] == header.number).all():
            raise lost_error(self.group.rank)
        digits = rows[0, HEADER_SIZE:].astype(np.int64).reshape(-1, 4)
        tokens = tuple((digits @ (1 << 24, 1 << 16, 1 << 8, 1)).tolist())
        return LeaderState(int(rows[0, 1]), tokens, bool(rows[0, 2]))

    def _is_checked(self, number: int) -> bool:
        """Return whether data is compared in a step: the same on all ranks."""
        return self.check_every > 0 and number % self.check_every == 0

    @abstractmethod
    def _compare(self, digests: np.ndarray, names: Sequence[str]) -> None:
        """Raise RingError if the digests of the ranks differ."""

    def _next_header(self) -> list[float]:
        self._number = (self._number + 1) % SEQUENCE_MODULUS
        return [float(self._number), float(self._num_commands), float(self._wants_decision)]


def digest(x: mx.array) -> mx.array:
    """Return a checksum, (1,) uint32, that changes with any bit of x and with the order of its elements."""
    flat = x.reshape(-1)
    bits = flat.view(mx.uint32 if flat.itemsize == 4 else mx.uint16).astype(mx.uint32)
    return (bits * _odd_numbers(bits.size)).sum(keepdims=True)


@lru_cache(maxsize=8)
def _odd_numbers(count: int) -> mx.array:
    """Return 1, 3, 5, ... as uint32; cached, so that each check of a decode step does not compute them again."""
    numbers = 2 * mx.arange(count, dtype=mx.uint32) + 1
    mx.eval(numbers)
    return numbers


def lost_error(rank: int) -> RingError:
    """Return the error of a rank that received data of another step."""
    return RingError("lost a rank: received data of another step", rank=rank)
