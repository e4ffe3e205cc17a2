"""Communicator of ranks that each have some of the layers: hidden states go from rank to rank and back to rank 0.

Rank 0 has the embedding and the head, so a token takes one message per rank and no collective. The leader's header and
its sampled tokens are sent with the hidden states.

With a draft model the captured states travel with the hidden states. Each rank adds those of its own layers, and the
last one returns them to rank 0, also those of steps without logits, which need no answer otherwise. Such answers may be
larger than the buffers of a link: then the last rank sends until rank 0 receives, and no other rank can send to it. So
before rank 0 sends a step, it starts to receive the oldest answers until one rank of the circle has none to send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.model.decoder import CapturedStates
from kimi_mlx.parallel.communicator import HEADER_SIZE, RankCommunicator, StepHeader, digest, lost_error
from kimi_mlx.parallel.group import LinkedGroup
from kimi_mlx.parallel.placement import Range

NUM_DIGITS = 4
"""Number of base-256 digits of a token or a digest."""


@dataclass
class _Answer:
    """The last rank's answer to a step, as rank 0 expects it: hidden states that need logits, and captured states.

    Args:
        number: number of the step.
        hidden: output of rank 0's layers, (B, M, D); the hidden states in the answer have its shape.
        captured_shape: shape of the captured states in the answer, (layers, B, L, D).
    """

    number: int
    hidden: mx.array
    captured_shape: tuple[int, ...]
    message: mx.array | None = None
    """Received message; None before receiving starts."""

    @property
    def has_logits(self) -> bool:
        """Whether the step has logits."""
        return self.hidden.shape[1] > 0

    @property
    def num_captured(self) -> int:
        """Number of captured states per token in the answer."""
        return self.captured_shape[0]

    @property
    def size(self) -> int:
        """Number of values of states."""
        return self.hidden.size + prod(self.captured_shape)


class _PipelineStates(CapturedStates):
    """Captured states of a step on rank 0: its own, and those of the other ranks in the answer.

    Args:
        communicator: rank 0's communicator.
        parts: (B, L, D) of each captured layer of rank 0.
    """

    def __init__(self, communicator: PipelineCommunicator, parts: Sequence[mx.array]):
        super().__init__(parts)
        self._communicator = communicator
        self.answer: _Answer | None = None

    def receive(self) -> None:
        """Start to receive the answers up to that of this step. Does not wait for them."""
        if self.answer is not None:
            self._communicator.receive(self.answer)

    def array(self) -> mx.array:
        """Return the states of all ranks side by side. Waits on the CPU for an answer without logits."""
        if self.answer is not None:
            self._parts = [*self._parts, *self._communicator.captured_states(self.answer)]
            self.answer = None
        return super().array()


class PipelineCommunicator(RankCommunicator):
    """Communicator for `pipeline`.

    Args:
        group: the ranks, in the order of their layers.
        hidden_size: size of a hidden state.
        dtype: dtype of the hidden states.
        layers: layers of each rank.
    """

    def __init__(self, group: LinkedGroup, hidden_size: int, dtype: mx.Dtype, layers: Sequence[Range]):
        super().__init__(group)
        self._links = group
        self.has_next_stage = group.rank < group.size - 1
        self._hidden_size, self._dtype = hidden_size, dtype
        self._fields = mx.zeros((0,), dtype)
        self._layers = layers
        self._num_received = self._num_answered = 0  # captured states per token in what this rank receives, and rank 0
        self._captured: list[mx.array] = []  # of the step: received ones, then those of this rank's layers
        self._states: _PipelineStates | None = None
        self._awaited: deque[_Answer] = deque()  # with logits, in the order of recv_last_hidden
        self._unreceived: deque[_Answer] = deque()
        self._returned: StepHeader | None = None
        self._num_long_steps = 0

    def set_header(self, num_commands: int, num_tokens: int, wants_decision: bool = False) -> None:
        """Set the contents of the next step's header."""
        super().set_header(num_commands, num_tokens, wants_decision)
        self._num_long_steps = max(self._num_long_steps - 1, 0)

    def expect_long_steps(self) -> None:
        """Wait on the CPU for what is received in the next step, and in those that may be in flight with it.

        The sender is late by the time of a chunk of a prompt; a GPU operation must not wait for it.
        """
        self._num_long_steps = self.group.size + 1

    def set_captured_layers(self, layers: Collection[int]) -> None:
        """Set the layers whose inputs are captured."""
        count = [sum(span.start <= layer < span.stop for layer in layers) for span in self._layers]
        self._num_received, self._num_answered = sum(count[1 : self.group.rank]), sum(count[1:])

    def capture(self, states: Sequence[mx.array]) -> CapturedStates | None:
        """Send captured states with the next message; on the leader, return them with those in the answer."""
        if not self.is_leader:
            self._captured += states
            return None
        self._states = _PipelineStates(self, states)
        return self._states

    def recv_from_previous_stage(self, tokens: mx.array) -> mx.array:
        """Receive the hidden states, and captured states if there are any, from the previous rank."""
        self._next_header()
        shape = (1 + self._num_received, *tokens.shape, self._hidden_size)
        header_size = HEADER_SIZE + NUM_DIGITS * self._num_tokens
        message = self._recv(self._message_size(prod(shape), header_size, self._number), self._dtype)
        if self._num_long_steps:
            mx.eval(message)
        received, self._header = self._split(message, prod(shape), self._number)
        self._fields = self._header.fields[0]
        if not self._num_received:
            return received.reshape(shape[1:])
        states, *self._captured = received.reshape(shape)
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
            self._make_way()
            self._expect_answer(logit_states, tokens)
        is_end = self.group.rank == self.group.size - 1
        captured, self._captured = self._captured, []
        if is_end and not num_logits and not captured:
            return logit_states
        states, fields = (logit_states, self._fields[:HEADER_SIZE]) if is_end else (hidden, self._fields)
        parts = [each.reshape(-1) for each in (states, *captured)]
        checksum: list[mx.array] = []
        if self._is_checked(self._number):
            payload = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            checksum = [_digits(digest(payload)).astype(self._dtype)]
        sent = self._send(mx.concatenate([*parts, fields, *checksum]))
        mx.async_eval(sent)
        return logit_states if self.is_leader else sent

    def recv_last_hidden(self, hidden: mx.array) -> mx.array:
        """Receive the output of the last layer on rank 0, in the order of the calls of send_to_next_stage.

        Receiving starts immediately, so that it precedes everything that is built later.
        """
        answer = self._awaited.popleft()
        assert answer.hidden is hidden  # otherwise a sequence would get the states of another
        states, _, self._header = self._take(answer)
        mx.async_eval(states, *self._header.arrays)
        self._returned = self._header
        return states

    def receive(self, answer: _Answer) -> None:
        """Start to receive an answer, and those before it. Does not wait for them."""
        while answer.message is None:
            first = self._unreceived.popleft()
            first.message = self._recv(self._message_size(first.size, HEADER_SIZE, first.number), self._dtype)
            mx.async_eval(first.message)

    def captured_states(self, answer: _Answer) -> list[mx.array]:
        """Return the captured states in an answer, (B, L, D) of each layer.

        Raises:
            RingError: the data belongs to another step.
        """
        _, captured, header = self._take(answer)
        if not answer.has_logits:  # otherwise the header is read with the logits
            self.decode_header(header)
        return list(captured)

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
        self._make_way()
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

    def _expect_answer(self, logit_states: mx.array, tokens: mx.array) -> None:
        """Prepare rank 0 for the answer to the step that it sends now, if there will be one."""
        shape = (self._num_answered, *tokens.shape, self._hidden_size)
        answer = _Answer(self._number, logit_states, shape)
        if answer.has_logits:
            self._awaited.append(answer)
        if answer.size:
            self._unreceived.append(answer)
        if self._states is not None and self._num_answered:
            self._states.answer = answer
        self._states = None

    def _make_way(self) -> None:
        """Start to receive answers before another message is sent: see the top of this module."""
        while self._num_answered and len(self._unreceived) > self.group.size - 2:
            self.receive(self._unreceived[0])

    def _take(self, answer: _Answer) -> tuple[mx.array, mx.array, StepHeader]:
        """Return hidden states, captured states and header of an answer."""
        self.receive(answer)
        assert answer.message is not None
        if self._num_long_steps or not answer.has_logits:
            mx.eval(answer.message)
        payload, header = self._split(answer.message, answer.size, answer.number)
        if not answer.num_captured:
            return payload.reshape(answer.hidden.shape), payload[:0], header
        states, captured = mx.split(payload, [answer.hidden.size])
        return states.reshape(answer.hidden.shape), captured.reshape(answer.captured_shape), header

    def _message_size(self, size: int, header_size: int, number: int) -> int:
        """Return the number of values in a message with `size` values of states."""
        return size + header_size + NUM_DIGITS * self._is_checked(number)

    def _split(self, message: mx.array, size: int, number: int) -> tuple[mx.array, StepHeader]:
        """Split a message into its states, flat, and its header."""
        is_checked = self._is_checked(number)
        states, fields, sent = mx.split(message, [size, message.size - NUM_DIGITS * is_checked])
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
