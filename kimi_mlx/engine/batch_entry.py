"""The tokens of one sequence in one step."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.model.image_rows import ImageRows


@dataclass(frozen=True)
class BatchEntry:
    """The tokens of one sequence in one step.

    Args:
        sequence: sequence that the tokens belong to.
        epoch: epoch of the sequence when the step was built; the entry is stale once the sequence has another one.
        length: number of input tokens.
        num_logits: number of final input tokens after which a token is sampled.
        position: position in the sequence of the first sampled token.
        logits_start: index of the entry's first row in the logits of the step.
        tokens: input tokens; empty if the input is the token that `previous_entry` samples.
        previous_entry: index of the entry of the previous step whose token is the input.
        draft: draft tokens, the last ones of `tokens`.
        is_prefill: whether the tokens are a chunk of a prompt.
        features: features of images among the tokens; their positions count from the first token of the entry.
        num_prompt_logits: number of input tokens, just before those of `num_logits`, whose logits are needed for log
            probabilities of the prompt.
    """

    sequence: Sequence
    epoch: int
    length: int
    num_logits: int
    position: int
    logits_start: int
    tokens: tuple[int, ...] = ()
    previous_entry: int | None = None
    draft: tuple[int, ...] = ()
    is_prefill: bool = False
    features: tuple[ImageRows, ...] = ()
    num_prompt_logits: int = 0

    @property
    def start(self) -> int:
        """Position in the sequence of the first input token."""
        return self.position + self.num_logits - 1 - self.length

    @property
    def stop(self) -> int:
        """Position in the sequence after the last input token."""
        return self.start + self.length

    @property
    def num_rows(self) -> int:
        """Number of final input tokens whose hidden states are needed."""
        return self.num_prompt_logits + self.num_logits

    @property
    def is_alive(self) -> bool:
        """Whether the sequence still needs the result of the step."""
        return self.sequence.epoch == self.epoch

    @property
    def logits_rows(self) -> slice:
        """Rows of the entry in the logits of the step."""
        return slice(self.logits_start, self.logits_start + self.num_logits)
