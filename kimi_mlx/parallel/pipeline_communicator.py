"""The exchange of ranks that each have some of the layers: states go from rank to rank, and back to the first.

Rank 0 has the embedding and the head, so a token takes one message a rank, and no collective: what the leader says and
the tokens that it has drawn travel in front of the others' work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.parallel.communicator import HEADER_SIZE, RankCommunicator, StepHeader, digest, lost_error
from kimi_mlx.parallel.group import LinkedGroup

NUM_DIGITS = 4
"""Of a token, and of a digest, in base 256."""


class PipelineCommunicator(RankCommunicator):
    """For `pipeline`.

    Args:
        group: the ranks, in the order of their layers.
        hidden_size: of the states.
        dtype: of the states.
    """

    def __init__(self, group: LinkedGroup, hidden_size: int, dtype: mx.Dtype):
        super().__init__(group)
        self._links = group
        self.has_next_stage = group.rank < group.size - 1
        self._hidden_size, self._dtype = hidden_size, dtype
        self._fields = mx.zeros((0,), dtype)
        self._awaited: deque[tuple[int, mx.array]] = deque()
        self._returned: StepHeader | None = None

    def recv_from_previous_stage(self, tokens: mx.array) -> mx.array:
        """The states behind the layers of the rank before us."""
        self._next_header()
        states, self._header = self._recv_states(
            tokens.shape, HEADER_SIZE + NUM_DIGITS * self._num_tokens, self._number
        )
        self._fields = self._header.fields[0]
        return states

    def send_to_next_stage(self, hidden: mx.array, tokens: mx.array, num_logits: int) -> mx.array:
        """Send the states to the next rank; the last one sends those that are num_logits for back to rank 0.

        The message is on its way at once: what is built later comes after it.
        """
        kept = hidden[:, :num_logits]
        if self.is_leader:
            header = [_digits(tokens[:, : self._num_tokens])] if self._num_tokens else []
            self._fields = mx.concatenate([mx.array(self._next_header()), *header]).astype(self._dtype)
            self._header = StepHeader(self._fields[None], self._number, self._returned)
            self._returned = None
            if num_logits:
                self._awaited.append((self._number, kept))
        is_end = self.group.rank == self.group.size - 1
        if is_end and not num_logits:
            return kept
        states, word = (kept, self._fields[:HEADER_SIZE]) if is_end else (hidden, self._fields)
        parts = [states.reshape(-1), word]
        if self._is_checked(self._number):
            parts.append(_digits(digest(states)).astype(self._dtype))
        sent = self._send(mx.concatenate(parts))
        mx.async_eval(sent)
        return kept if self.is_leader else sent

    def recv_last_hidden(self, hidden: mx.array) -> mx.array:
        """The states behind the last layer, on rank 0; in the order of send_to_next_stage.

        They are num_logits for at once: what is built later comes after them, whoever needs it first.
        """
        number, handed = self._awaited.popleft()
        assert handed is hidden  # else a sequence would get what is another's
        states, self._header = self._recv_states(hidden.shape[:2], HEADER_SIZE, number)
        mx.async_eval(states, *self._header.arrays)
        self._returned = self._header
        return states

    def send_numbers(self, note: Sequence[int], size: int) -> None:
        """Send whole numbers ahead of the next step.

        Args:
            note: them.
            size: so many at most; all ranks name the same.
        """
        rest = [0] * (size - len(note))
        mx.async_eval(self._send(mx.array([self._number, len(note), *note, *rest], mx.int32)))

    def recv_numbers(self, size: int) -> list[int]:
        """Hear them from the rank before us, and tell the next.

        Raises:
            RingError: what came is data of another step.
        """
        note = self._recv(2 + size, mx.int32)
        if self.group.rank < self.group.size - 1:
            note = self._send(note)
        number, length, *numbers = cast(list[int], note.tolist())
        if number != self._number or not 0 <= length <= size:
            raise lost_error(self.group.rank)
        return numbers[:length]

    def _recv_states(self, shape: Sequence[int], header_size: int, number: int) -> tuple[mx.array, StepHeader]:
        """States from the rank before us, and what came with them."""
        B, L = shape
        size = B * L * self._hidden_size
        is_checked = self._is_checked(number)
        message = self._recv(size + header_size + NUM_DIGITS * is_checked, self._dtype)
        states, word, sent = mx.split(message, [size, size + header_size])
        states = states.reshape(B, L, self._hidden_size)
        digests = mx.stack([sent.astype(mx.float32), _digits(digest(states))]) if is_checked else None
        return states, StepHeader(word[None], number, digests=digests)

    def _send(self, x: mx.array) -> mx.array:
        """To the next rank, from the last one to the first."""
        return self._links.send(x, (self.group.rank + 1) % self.group.size)

    def _recv(self, size: int, dtype: mx.Dtype) -> mx.array:
        """So many values from the rank before us."""
        return self._links.recv(mx.zeros((size,), dtype), (self.group.rank - 1) % self.group.size)

    def _compare(self, digests: np.ndarray) -> None:
        """Compare the states that were sent with those that came.

        Raises:
            RingError: they differ.
        """
        if (digests[0] != digests[1]).any():
            before = (self.group.rank - 1) % self.group.size
            raise RingError(
                f"what rank {self.group.rank} received is not what rank {before} sent",
                hint="the link between them is not sound: `kimi-mlx doctor` with the same hosts tests it",
                rank=self.group.rank,
            )


def _digits(numbers: mx.array) -> mx.array:
    """Whole numbers in base 256, whose digits any float type holds exactly; float32."""
    flat = numbers.reshape(-1, 1).astype(mx.uint32)
    return ((flat >> mx.array([24, 16, 8, 0], mx.uint32)) & 255).reshape(-1).astype(mx.float32)
