"""Run the steps of the model on this rank: launch, sample, read the tokens and the leader's state.

All ranks run the same steps. A single rank, or a rank with a part of every layer, samples every token itself. In a
pipeline only the leader samples. It receives the hidden states of a step when the step's batch is due again, so that
the steps of several batches are in flight at the same time; the other ranks learn a token from the step after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.batch_entry import BatchEntry
from kimi_mlx.engine.sample import SampledTokens, logprobs_of, sample_tokens
from kimi_mlx.model.decoder import CapturedStates, Model, SequenceSlice
from kimi_mlx.model.image_rows import ImageRows
from kimi_mlx.parallel.communicator import SEQUENCE_MODULUS, LeaderState, RankCommunicator, StepHeader
from kimi_mlx.parallel.pipeline_communicator import PipelineCommunicator

PROMPT_ROWS = 64
"""Number of positions of prompts whose logits are computed at a time: K2's take 0.6 MB each in float32."""


@dataclass
class InFlightStep:
    """A step that was launched and not read yet.

    Args:
        entries: tokens of each sequence.
        hidden: output of the model, not evaluated.
        num_commands: number of commands that the leader had when the step began; meaningless on other ranks.
        wants_decision: whether the leader wanted to decide on drafts; meaningless on other ranks.
        header: header that came with the step; None on a single rank.
        captured: captured states for a draft model, on the leader; None without one.
        sampled: tokens sampled from the step; None before sampling, and on ranks that do not sample.
    """

    entries: list[BatchEntry]
    hidden: mx.array
    num_commands: int
    wants_decision: bool = False
    header: StepHeader | None = None
    captured: CapturedStates | None = None
    sampled: SampledTokens | None = None
    num_logits: int = field(init=False)
    """Number of tokens that are sampled from the step."""
    num_rows: int = field(init=False)
    """Number of hidden states in the output of the model: those of sampled tokens, and of prompts with logprobs."""

    def __post_init__(self) -> None:
        """Count the logits and the hidden states."""
        self.num_logits = sum(entry.num_logits for entry in self.entries)
        self.num_rows = sum(entry.num_rows for entry in self.entries)

    @property
    def length(self) -> int:
        """Number of input tokens."""
        return sum(entry.length for entry in self.entries)


class StepRunner:
    """Runs steps on this rank.

    Args:
        model: the model, or this rank's share of it.
        count_commands: on the leader, returns the number of commands so far, which the header of each step carries.
    """

    def __init__(self, model: Model, count_commands: Callable[[], int]):
        self._model = model
        self._communicator = model.communicator if isinstance(model.communicator, RankCommunicator) else None
        self._count_commands = count_commands
        self._pipeline = model.communicator if isinstance(model.communicator, PipelineCommunicator) else None

    @property
    def communicator(self) -> RankCommunicator | None:
        """Communicator to the other ranks; None on a single rank."""
        return self._communicator

    @property
    def pipeline(self) -> PipelineCommunicator | None:
        """Communicator of a pipeline; None with any other strategy."""
        return self._pipeline

    @property
    def has_head(self) -> bool:
        """Whether this rank samples tokens."""
        return self._model.has_head

    @property
    def is_leader(self) -> bool:
        """Whether this rank decides on drafts: a single rank, or rank 0."""
        return self._communicator is None or self._communicator.is_leader

    def broadcast(self, number: int) -> tuple[int, LeaderState]:
        """Return the leader's number and its state on every rank; wait for them on the CPU.

        Raises:
            RingError: a rank is lost.
        """
        num_commands = self._count_commands() % SEQUENCE_MODULUS
        if self._communicator is not None:
            number, num_commands = self._communicator.broadcast([number, num_commands])
        return number, LeaderState(num_commands)

    def start(
        self, entries: list[BatchEntry], previous: InFlightStep | None, wants_decision: bool = False
    ) -> InFlightStep:
        """Launch a step; it is computed while the next ones are built.

        Args:
            entries: tokens of each sequence; entries that continue a token of the previous step come first.
            previous: the previous step, if an entry continues one of its tokens.
            wants_decision: on the leader, whether it wants to decide on drafts.
        """
        num_commands = self._count_commands()
        if self._communicator is not None:
            num_tokens = sum(entry.previous_entry is not None for entry in entries)
            self._communicator.set_header(num_commands, num_tokens, wants_decision)
            if any(entry.is_prefill for entry in entries):
                self._communicator.expect_long_steps()
        slices = [SequenceSlice(entry.sequence.layers, entry.length, entry.num_rows) for entry in entries]
        hidden = self._model.hidden(self._tokens(entries, previous), slices, _features(entries))
        step = InFlightStep(entries, hidden, num_commands, wants_decision, captured=self._model.captured)
        if self._communicator is not None:
            if not step.num_rows:
                self._communicator.finish_step(step.hidden)
            if not step.num_rows or self._pipeline is not None:
                step.header = self._communicator.header
        mx.async_eval(self._arrays(step))
        return step

    def wait(self, step: InFlightStep) -> None:
        """Wait until this rank has computed its part of a step."""
        mx.eval(self._arrays(step))

    def sample(self, step: InFlightStep, wants_decision: bool = False) -> None:
        """Sample the tokens of a step and compute log probabilities if this rank has the head. Does not wait for them.

        Args:
            step: the step.
            wants_decision: on the leader, whether it wants to decide on drafts; ranks that sum send it here.
        """
        if step.sampled is not None or not step.num_rows or not self._model.has_head:
            return
        if self._communicator is not None and self._pipeline is None:
            self._communicator.set_header(step.num_commands, 0, wants_decision)
        states = self._model.last_states(step.hidden)
        if step.num_rows == step.num_logits:
            step.sampled = sample_tokens(self._logits(step, states), step.entries)
        else:
            step.sampled = self._sample_with_prompts(step, states)
        mx.async_eval(step.sampled.arrays, [] if step.header is None else step.header.arrays)

    def _sample_with_prompts(self, step: InFlightStep, states: mx.array) -> SampledTokens:
        """Sample the tokens of a step, and compute log probabilities of its prompts, PROMPT_ROWS positions at a time.

        Args:
            step: the step.
            states: (1, num_rows, D), last hidden states.
        """
        sampled_rows, prompt_rows, targets = _divide_rows(step.entries)
        sampled = SampledTokens(mx.zeros((0,), mx.uint32))
        if sampled_rows:
            sampled = sample_tokens(self._logits(step, states[:, mx.array(sampled_rows)]), step.entries)
        prompts = [entry.sequence.request.prompt_logprobs or 0 for entry in step.entries if entry.num_prompt_logits]
        for start in range(0, len(prompt_rows), PROMPT_ROWS):
            part = states[:, mx.array(prompt_rows[start : start + PROMPT_ROWS])]
            if sampled.prompt_logprobs:  # so that the logits of one part are freed before the next one
                part = mx.depends(part, sampled.prompt_logprobs[-1].arrays)
            tokens = mx.array(targets[start : start + PROMPT_ROWS])
            sampled.prompt_logprobs.append(logprobs_of(self._logits(step, part), tokens, max(prompts)))
        return sampled

    def _logits(self, step: InFlightStep, states: mx.array) -> mx.array:
        """Return the logits of some of the last states of a step, (1, M, D) -> (M, vocab_size), and keep the header."""
        logits = self._model.head(states)[0]
        if self._communicator is not None:
            header = self._communicator.header
            has_earlier = self._pipeline is None and step.header is not None  # ranks that sum send one with each gather
            step.header = replace(header, previous=step.header) if has_earlier else header
        return logits

    def read(
        self, step: InFlightStep, following: InFlightStep | None = None
    ) -> tuple[dict[int, list[int]], LeaderState]:
        """Wait for the tokens of a step and the state of the leader.

        Args:
            step: step whose tokens were sampled.
            following: step that was launched on these tokens.

        Returns:
            The tokens by index of their entry, except those that this rank neither knows nor needs; and the state.
        """
        # Ranks that sum send the header after the work of a step, so the header of `step` is the one that is ready.
        is_ahead = self._communicator is None or self._pipeline is not None
        state = self._leader_state(following if is_ahead and following is not None else step)
        if step.sampled is not None:
            return step.sampled.read(step.entries), state
        if not step.num_logits:
            self.wait(step)
        following_entries = [] if following is None else following.entries
        indices = [entry.previous_entry for entry in following_entries if entry.previous_entry is not None]
        return {index: [token] for index, token in zip(indices, state.tokens, strict=False)}, state

    def _tokens(self, entries: list[BatchEntry], previous: InFlightStep | None) -> mx.array:
        """Return the input tokens of a step, (1, L), with 0 for tokens that this rank does not know."""
        rows = [
            cast(InFlightStep, previous).entries[entry.previous_entry].logits_start
            for entry in entries
            if entry.previous_entry is not None
        ]
        known_tokens = [token for entry in entries if entry.previous_entry is None for token in entry.tokens]
        if not rows:
            return mx.array([known_tokens])
        if previous is None or previous.sampled is None:
            return mx.array([[0] * len(rows) + known_tokens])
        sampled = previous.sampled.tokens
        if rows != list(range(sampled.size)):
            sampled = sampled[mx.array(rows)]
        return (mx.concatenate([sampled, mx.array(known_tokens, sampled.dtype)]) if known_tokens else sampled)[None]

    def _leader_state(self, step: InFlightStep) -> LeaderState:
        if self._communicator is None or step.header is None:
            return LeaderState(step.num_commands, wants_decision=step.wants_decision)
        return self._communicator.decode_header(step.header)

    def _arrays(self, step: InFlightStep) -> list[mx.array]:
        """Return the arrays to evaluate.

        Hidden states with logits depend on the caches of all layers. Without logits the last layer's cache must be
        evaluated too.
        """
        header = [] if step.header is None else step.header.arrays
        caches = [
            cache for entry in step.entries if not entry.num_rows and entry.is_alive for cache in entry.sequence.layers
        ]
        return [step.hidden, *header, *(array for cache in caches for array in cache.state)]


def _divide_rows(entries: list[BatchEntry]) -> tuple[list[int], list[int], list[int]]:
    """Return the rows of a step for sampling, those for log probabilities of prompts, and the tokens of the latter."""
    sampled_rows: list[int] = []
    prompt_rows: list[int] = []
    targets: list[int] = []
    row = 0
    for entry in entries:
        first = entry.stop - entry.num_rows + 1
        targets += entry.sequence.request.prompt[first : first + entry.num_prompt_logits]
        prompt_rows += range(row, row + entry.num_prompt_logits)
        sampled_rows += range(row + entry.num_prompt_logits, row + entry.num_rows)
        row += entry.num_rows
    return sampled_rows, prompt_rows, targets


def _features(entries: list[BatchEntry]) -> list[ImageRows]:
    """Return the features of all entries, with positions in the tokens of the step."""
    features: list[ImageRows] = []
    start = 0
    for entry in entries:
        features += [ImageRows(start + image.start, image.rows) for image in entry.features]
        start += entry.length
    return features
