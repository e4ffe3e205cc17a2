"""Communicator of ranks that each have some of the layers: hidden states go from rank to rank and back to rank 0.

Rank 0 has the embedding and the head, so a token takes one message per rank and no collective. The leader's header and
its sampled tokens are sent with the hidden states.
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
"""Number of base-256 digits of a token or a digest."""


class PipelineCommunicator(RankCommunicator):
    """Communicator for `pipeline`.

    Args:
        group: the ranks, in the order of their layers.
        hidden_size: size of a hidden state.
        dtype: dtype of the hidden states.
    """

    def __init__(self, group: LinkedGroup, hidden_size: int, dtype: mx.Dtype):
        super().__init__(group)
        self._links = group
        self.has_next_stage = group.rank < group.size - 1
        self._hidden_size, self._dtype = hidden_size, dtype
        self._fields = mx.zeros((0,), dtype)
        self._awaited: deque[tuple[int, mx.array]] = deque()
        self._returned: StepHeader | None = None
        self._num_long_steps = 0

    def set_header(self, num_commands: int, num_tokens: int) -> None:
        """Set the contents of the next step's header."""
        super().set_header(num_commands, num_tokens)
        self._num_long_steps = max(self._num_long_steps - 1, 0)

    def expect_long_steps(self) -> None:
        """Wait on the CPU for what is received in the next step, and in those that may be in flight with it.

        The sender is late by the time of a chunk of a prompt; a GPU operation must not wait for it.
        """
        self._num_long_steps = self.group.size + 1

    def recv_from_previous_stage(self, tokens: mx.array) -> mx.array:
        """Receive the hidden states from the previous rank."""
        self._next_header()
        states, self._header = self._recv_states(
            tokens.shape, HEADER_SIZE + NUM_DIGITS * self._num_tokens, self._number
        )
        self._fields = self._header.fields[0]
        return states

    def send_to_next_stage(self, hidden: mx.array, tokens: mx.array, num_logits: int) -> mx.array:
        """Send hidden states to the next rank; the last rank sends those that need logits to rank 0.

        The message is sent immediately, so that it precedes everything that is built later.
        """
        logit_states = hidden[:, :num_logits]
        if self.is_leader:
            header = [_digits(tokens[:, : self._num_tokens])] if self._num_tokens else []
            self._fields = mx.concatenate([mx.array(self._next_header()), *header]).astype(self._dtype)
            self._header = StepHeader(self._fields[None], self._number, self._returned)
            self._returned = None
            if num_logits:
                self._awaited.append((self._number, logit_states))
        is_end = self.group.rank == self.group.size - 1
        if is_end and not num_logits:
            return logit_states
        states, fields = (logit_states, self._fields[:HEADER_SIZE]) if is_end else (hidden, self._fields)
        parts = [states.reshape(-1), fields]
        if self._is_checked(self._number):
            parts.append(_digits(digest(states)).astype(self._dtype))
        sent = self._send(mx.concatenate(parts))
        mx.async_eval(sent)
        return logit_states if self.is_leader else sent

    def recv_last_hidden(self, hidden: mx.array) -> mx.array:
        """Receive the output of the last layer on rank 0, in the order of the calls of send_to_next_stage.

        Receiving starts immediately, so that it precedes everything that is built later.
        """
        number, sent = self._awaited.popleft()
        assert sent is hidden  # otherwise a sequence would get the states of another
        states, self._header = self._recv_states(hidden.shape[:2], HEADER_SIZE, number)
        mx.async_eval(states, *self._header.arrays)
        self._returned = self._header
        return states

    def broadcast(self, numbers: Sequence[int]) -> list[int]:
        """Return the leader's numbers on every rank. They go from rank to rank; the leader does not wait."""
        if not self.is_leader:
            return self.recv_numbers(len(numbers))
        self.send_numbers(numbers, len(numbers))
        return list(numbers)

    def send_numbers(self, numbers: Sequence[int], max_size: int) -> None:
        """Send integers before the next step.

        Args:
            numbers: the integers.
            max_size: maximum number of integers, the same on all ranks.
        """
        padding = [0] * (max_size - len(numbers))
        mx.async_eval(self._send(mx.array([self._number, len(numbers), *numbers, *padding], mx.int32)))

    def recv_numbers(self, max_size: int) -> list[int]:
        """Receive integers from the previous rank and forward them to the next.

        Raises:
            RingError: the data belongs to another step.
        """
        message = self._recv(2 + max_size, mx.int32)
        if self.group.rank < self.group.size - 1:
            message = self._send(message)
        number, length, *numbers = cast(list[int], message.tolist())
        if number != self._number or not 0 <= length <= max_size:
            raise lost_error(self.group.rank)
        return numbers[:length]

    def _recv_states(self, shape: Sequence[int], header_size: int, number: int) -> tuple[mx.array, StepHeader]:
        """Receive hidden states and their header from the previous rank."""
        B, L = shape
        size = B * L * self._hidden_size
        is_checked = self._is_checked(number)
        message = self._recv(size + header_size + NUM_DIGITS * is_checked, self._dtype)
        if self._num_long_steps:
            mx.eval(message)
        states, fields, sent = mx.split(message, [size, size + header_size])
        states = states.reshape(B, L, self._hidden_size)
        digests = mx.stack([sent.astype(mx.float32), _digits(digest(states))]) if is_checked else None
        return states, StepHeader(fields[None], number, digests=digests)

    def _send(self, x: mx.array) -> mx.array:
        """Send to the next rank; the last rank sends to the first."""
        return self._links.send(x, (self.group.rank + 1) % self.group.size)

    def _recv(self, size: int, dtype: mx.Dtype) -> mx.array:
        """Receive `size` values from the previous rank."""
        return self._links.recv(mx.zeros((size,), dtype), (self.group.rank - 1) % self.group.size)

    def _compare(self, digests: np.ndarray, names: Sequence[str]) -> None:
        """Compare the sent hidden states with the received ones.

        Raises:
            RingError: they differ.
        """
        if (digests[0] != digests[1]).any():
            previous = (self.group.rank - 1) % self.group.size
            raise RingError(
                f"rank {self.group.rank} received other data than rank {previous} sent",
                hint="the link between them is faulty: test it with `kimi-mlx doctor` on the same hosts",
                rank=self.group.rank,
            )


def _digits(numbers: mx.array) -> mx.array:
    """Return the base-256 digits of integers as float32; every float type represents them exactly."""
    flat = numbers.reshape(-1, 1).astype(mx.uint32)
    return ((flat >> mx.array([24, 16, 8, 0], mx.uint32)) & 255).reshape(-1).astype(mx.float32)
