"""The exchange of ranks that each have some of the layers: states go from rank to rank, and back to the first.

Rank 0 has the embedding and the head, so a token takes one message a rank, and no collective: what the leader says and
the tokens that it has drawn travel in front of the others' work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from kimi_mlx.parallel.exchange import WORD_SIZE, RankExchange, Told, lost
from kimi_mlx.parallel.group import LinkedGroup

NOTE_SIZE = 40
"""Step number, tokens of the next step, how many are kept and which."""

MAX_TOLD_TOKENS = 32
"""Up to this many tokens a message says which they are; longer ones are parts of prompts, which all ranks know."""


class PipelineExchange(RankExchange):
    """For `pipeline`.

    Args:
        group: the ranks, in the order of their layers.
        hidden_size: of the states.
        dtype: of the states.
    """

    is_pipeline = True

    def __init__(self, group: LinkedGroup, hidden_size: int, dtype: mx.Dtype):
        super().__init__(group)
        self._links = group
        self._hidden_size, self._dtype = hidden_size, dtype
        self._word = mx.zeros((0,), dtype)
        self._awaited: deque[int] = deque()
        self._returned: Told | None = None

    def receive(self, tokens: mx.array) -> mx.array:
        """The states behind the layers of the rank before us."""
        self._next_word()
        states, self._word = self._receive(tokens.shape, WORD_SIZE + _num_digits(tokens))
        self._told = Told(self._word[None], self._number)
        return states

    def hand_on(self, hidden: mx.array, tokens: mx.array, last: int) -> mx.array:
        """Send the states to the next rank; the last one sends those of the last positions back to rank 0.

        The message is on its way at once: what is built later comes after it.
        """
        kept = hidden[:, hidden.shape[1] - last :]
        if self.is_leader:
            self._word = mx.concatenate([mx.array(self._next_word()), _digits(tokens)]).astype(self._dtype)
            self._told = Told(self._word[None], self._number, self._returned)
            self._returned = None
            if last:
                self._awaited.append(self._number)
        is_end = self.group.rank == self.group.size - 1
        if is_end and not last:
            return kept
        states, word = (kept, self._word[:WORD_SIZE]) if is_end else (hidden, self._word)
        sent = self._links.send(mx.concatenate([states.reshape(-1), word]))
        mx.async_eval(sent)
        return kept if self.is_leader else sent

    def take_back(self, hidden: mx.array) -> mx.array:
        """The states behind the last layer, on rank 0; in the order of hand_on.

        They are asked for at once: what is built later comes after them, whoever needs it first.
        """
        states, word = self._receive(hidden.shape[:2], WORD_SIZE)
        mx.async_eval(states, word)
        self._returned = self._told = Told(word[None], self._awaited.popleft())
        return states

    def lead(self, length: int, kept: Sequence[int]) -> None:
        """Send ahead how many tokens the next step has, and which of the step before are kept."""
        note = [self._number, length, len(kept), *kept]
        mx.async_eval(self._links.send(mx.array(note + [0] * (NOTE_SIZE - len(note)), mx.int32)))

    def follow(self) -> tuple[int, tuple[int, ...]]:
        """Hear it from the rank before us, and tell the next.

        Raises:
            RingError: what came is not of this step.
        """
        note = self._links.receive(NOTE_SIZE, mx.int32)
        if self.group.rank < self.group.size - 1:
            note = self._links.send(note)
        number, length, count, *kept = cast(list[int], note.tolist())
        if number != self._number or not 0 <= length <= MAX_TOLD_TOKENS or not 0 <= count <= MAX_TOLD_TOKENS:
            raise lost(self.group.rank)
        return length, tuple(kept[:count])

    def _receive(self, shape: Sequence[int], word_size: int) -> tuple[mx.array, mx.array]:
        """States and word from the rank before us."""
        B, L = shape
        size = B * L * self._hidden_size
        message = self._links.receive(size + word_size, self._dtype)
        return message[:size].reshape(B, L, self._hidden_size), message[size:]


def _num_digits(tokens: mx.array) -> int:
    return 3 * tokens.size if tokens.size <= MAX_TOLD_TOKENS else 0


def _digits(tokens: mx.array) -> mx.array:
    """Tokens in base 256, which any float type holds exactly."""
    if not _num_digits(tokens):
        return mx.zeros((0,))
    flat = tokens.reshape(-1, 1).astype(mx.uint32)
    return ((flat >> mx.array([16, 8, 0], mx.uint32)) & 255).reshape(-1).astype(mx.float32)
