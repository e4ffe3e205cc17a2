"""Events that the engine returns for a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from kimi_mlx.model.expert_stats import ExpertStats

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Statistics:
    """Statistics of one answer; times in seconds, memory in bytes.

    Time starts when the engine admits the request. Prefill ends, and decode starts, when the first new token is known
    (ttft_s). That token counts as part of prefill, so decode_tok_per_s covers the others. encode_s is the part of
    ttft_s in which the vision tower encoded images of the request. Of the draft tokens that the model verified, some
    were accepted; drafts_off is the reason why nothing was drafted at the end, if drafts were enabled.

    If experts are read from the disk, prompt_read_bytes counts what was read until the first new token, and experts has
    the counters of the steps after it; steps of a batch count for each of its answers. Otherwise experts is None.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    ttft_s: float
    decode_s: float
    peak_memory_bytes: int
    decode_steps: int = 0
    encode_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    drafts_off: str | None = None
    prompt_read_bytes: int = 0
    experts: ExpertStats | None = None

    @property
    def read_bytes_per_token(self) -> float:
        """Bytes of experts read per token after the first; 0 if there are none."""
        num_tokens = self.generated_tokens - 1
        return self.experts.bytes_read / num_tokens if self.experts is not None and num_tokens > 0 else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens per decode step, without the first token: above 1 if drafts were accepted; 0 without steps."""
        return (self.generated_tokens - 1) / self.decode_steps if self.decode_steps else 0.0

    @property
    def prefill_tok_per_s(self) -> float:
        """Prompt tokens computed (not taken from the cache) per second to the first token, without encoding images."""
        prefill_s = self.ttft_s - self.encode_s
        return (self.prompt_tokens - self.cached_tokens) / prefill_s if prefill_s > 0 else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens per second after the first token; 0 if there are none."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 and self.generated_tokens > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return fields and rates as JSON."""
        return {
            **asdict(self),
            "prefill_tok_per_s": self.prefill_tok_per_s,
            "decode_tok_per_s": self.decode_tok_per_s,
            "tokens_per_step": self.tokens_per_step,
            "read_bytes_per_token": self.read_bytes_per_token,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Statistics:
        """Read the output of to_dict; the rates are recomputed."""
        known = {item.name: value[item.name] for item in fields(cls)}
        experts = known.pop("experts")
        return cls(**known, experts=None if experts is None else ExpertStats(**experts))


@dataclass(frozen=True)
class Prefilled:
    """Progress of prefill: `done` of `total` prompt tokens are in the cache."""

    done: int
    total: int


@dataclass(frozen=True)
class Encoded:
    """Progress of the vision tower: `done` of `total` parts of an image's encoding are computed.

    Args:
        image: number of the image in the prompt, from 1.
        num_images: number of images in the prompt.
        done: number of parts that are computed.
        total: number of parts of this image.
    """

    image: int
    num_images: int
    done: int
    total: int


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities (natural) under the model's distribution, before temperature, bias, penalties and grammar.

    Args:
        token: log probability of the token itself.
        top: pairs of an id and its log probability, most likely first.
    """

    token: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Token:
    """A new token.

    Args:
        id: token id.
        logprobs: log probabilities, if the request has top_logprobs.
    """

    id: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class PromptLogprobs:
    """Log probabilities of tokens of the prompt, given all tokens before them.

    Args:
        start: position in the prompt of the first of these tokens; events are in order, without gaps.
        tokens: log probabilities of each token.
    """

    start: int
    tokens: tuple[Logprobs, ...]


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    reason: FinishReason
    statistics: Statistics


@dataclass(frozen=True)
class Interrupted:
    """The ring was lost and restarts; the answer continues afterwards.

    Args:
        reason: reason of the loss, as text.
        attempt: 1-based number of this restart.
        attempts: maximum number of restarts.
        wait_s: time until the restart.
    """

    reason: str
    attempt: int
    attempts: int
    wait_s: float = 0.0


@dataclass(frozen=True)
class Resumed:
    """The ring is up again, `seconds` after the loss was noticed."""

    seconds: float


Event = Encoded | Prefilled | PromptLogprobs | Token | Finished | Interrupted | Resumed
