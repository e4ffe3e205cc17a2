"""Requests to the engine, and the events that it returns."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from kimi_mlx.errors import UsageError

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Args:
        temperature: temperature; from 0, which takes the most likely token, to 2.
        top_p: total probability of the most likely tokens to keep; 1 keeps all.
        top_k: number of most likely tokens to keep; 0 keeps all.
        min_p: minimum probability, as a fraction of that of the most likely token.
        seed: seed of the random numbers; None for a random one.

    Raises:
        UsageError: a number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        ranges = {
            "temperature": (0, 2),
            "top_p": (0, 1),
            "top_k": (0, 2**31),
            "min_p": (0, 1),
            "seed": (0, 2**63),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            kind = int if name in ("top_k", "seed") else (int, float)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not (is_number and low <= value <= high) and (name, value) != ("seed", None):
                raise UsageError(
                    f"{name} is {value!r}, but must be {'a whole number ' * (kind is int)}between {low} and {high}"
                )
        if self.top_p == 0:
            raise UsageError("top_p is 0, which leaves no token", hint="for greedy decoding use --temperature 0")


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        prompt: token ids, at least one.
        max_tokens: maximum number of new tokens; None for the rest of the context.
        sampling: sampling parameters.
        stop_ids: tokens that end the answer; they are returned, too.
        logit_bias: pairs of a token id and a number that is added to its logit.
        top_logprobs: number of most likely tokens to return, with log probabilities, for each token; None returns no
            log probabilities at all.
        grammar: grammar of the answer, as written by kimi_mlx.text.grammar; None for no constraint.
        answered: number of tokens at the end of the prompt that already belong to the answer.

    Raises:
        UsageError: token ids or max_tokens are not integers.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None
    grammar: str | None = None
    answered: int = 0

    def __post_init__(self) -> None:
        """Check the types; convert other integers (numpy's) to int."""
        try:
            object.__setattr__(self, "prompt", tuple(map(operator.index, self.prompt)))
            if self.max_tokens is not None:
                object.__setattr__(self, "max_tokens", operator.index(self.max_tokens))
        except TypeError as error:
            raise UsageError(f"token ids and max_tokens must be whole numbers: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the request as JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # asdict would copy every id
        return {**values, "sampling": asdict(self.sampling), "stop_ids": sorted(self.stop_ids)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Request:
        """Read the output of to_dict."""
        return cls(
            tuple(value["prompt"]),
            value["max_tokens"],
            Sampling(**value["sampling"]),
            frozenset(value["stop_ids"]),
            tuple((id, bias) for id, bias in value["logit_bias"]),
            value["top_logprobs"],
            value["grammar"],
            value["answered"],
        )


@dataclass(frozen=True)
class Statistics:
    """Statistics of one answer; times in seconds, memory in bytes.

    Time starts when the engine admits the request. Prefill ends, and decode starts, when the first new token is known
    (ttft_s). That token counts as part of prefill, so decode_tok_per_s covers the others.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    ttft_s: float
    decode_s: float
    peak_memory_bytes: int
    decode_steps: int = 0

    @property
    def tokens_per_step(self) -> float:
        """New tokens per decode step, without the first token: above 1 if drafts were accepted; 0 without steps."""
        return (self.generated_tokens - 1) / self.decode_steps if self.decode_steps else 0.0

    @property
    def prefill_tok_per_s(self) -> float:
        """Prompt tokens computed (not taken from the cache) per second to the first token."""
        return (self.prompt_tokens - self.cached_tokens) / self.ttft_s if self.ttft_s > 0 else 0.0

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
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Statistics:
        """Read the output of to_dict; the rates are recomputed."""
        return cls(**{item.name: value[item.name] for item in fields(cls)})


@dataclass(frozen=True)
class Prefilled:
    """Progress of prefill: `done` of `total` prompt tokens are in the cache."""

    done: int
    total: int


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities (natural) under the model's distribution, before temperature, bias and grammar.

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


Event = Prefilled | Token | Finished | Interrupted | Resumed
