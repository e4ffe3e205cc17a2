"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from kimi_mlx.errors import UsageError

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token; at most 2 is sensible.
        top_p: keep the likeliest tokens that make up this probability; 1 keeps all.
        top_k: keep this many; 0 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest.
        seed: of the random numbers; None draws one.

    Raises:
        UsageError: a number out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        ranges = {
            "temperature": (0, 100),
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
                    f"{name} is {value!r}, not {'a whole number ' * (kind is int)}between {low} and {high}"
                )
        if self.top_p == 0:
            raise UsageError("top_p is 0, which would leave no token", hint="use --temperature 0 for greedy text")


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        prompt: token ids, at least one.
        max_tokens: at most this many new tokens; None is what is left of the context.
        sampling: how to choose them.
        stop_ids: tokens that end the answer (they are reported too).
        logit_bias: added to the logits of some tokens, as pairs of an id and a number.
        top_logprobs: with each token its log probability, and so many of the likeliest tokens; None: neither.
        grammar: what the answer must keep to, as kimi_mlx.text.grammar writes it; None: anything.
        answered: so many tokens at the end of the prompt are the beginning of the answer already.

    Raises:
        UsageError: something else than whole numbers.
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
        """Check the types; whole numbers of other kinds (numpy's) become ints."""
        try:
            object.__setattr__(self, "prompt", tuple(map(operator.index, self.prompt)))
            if self.max_tokens is not None:
                object.__setattr__(self, "max_tokens", operator.index(self.max_tokens))
        except TypeError as error:
            raise UsageError(f"token ids and max_tokens are whole numbers: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # asdict would copy each id
        return {**values, "sampling": asdict(self.sampling), "stop_ids": sorted(self.stop_ids)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Request:
        """From to_dict."""
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
    """Figures of one answer; times in seconds, memory in bytes.

    The clock starts when the engine takes the request. Prefill ends, and decode starts, when the first new token
    is known (ttft_s); that token counts as decoded by prefill, so decode_tok_per_s is over the others.
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
        """New tokens after the first a step of decode: above 1 where drafts were right; 0 if there were no steps."""
        return (self.generated_tokens - 1) / self.decode_steps if self.decode_steps else 0.0

    @property
    def prefill_tok_per_s(self) -> float:
        """Prompt tokens computed (not taken from the cache) per second to the first token."""
        return (self.prompt_tokens - self.cached_tokens) / self.ttft_s if self.ttft_s > 0 else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens after the first per second; 0 if there are none."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 and self.generated_tokens > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Fields and rates, for JSON."""
        return {
            **asdict(self),
            "prefill_tok_per_s": self.prefill_tok_per_s,
            "decode_tok_per_s": self.decode_tok_per_s,
            "tokens_per_step": self.tokens_per_step,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Statistics:
        """From to_dict; the rates are computed anew."""
        return cls(**{item.name: value[item.name] for item in fields(cls)})


@dataclass(frozen=True)
class Prefilled:
    """Progress: so many of the prompt's tokens are in the cache."""

    done: int
    total: int


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities, of the model's own distribution: before temperature, bias and grammar.

    Args:
        token: of the token itself.
        top: the likeliest tokens, as pairs of an id and its logarithm, the likeliest first.
    """

    token: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Token:
    """A new token.

    Args:
        id: of the token.
        logprobs: if they were asked for.
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
    """The ring was lost, and is started again; the answer goes on then.

    Args:
        reason: why, in words.
        attempt: the how manieth start, from 1.
        attempts: after how many it is given up.
        wait_s: how long until then.
    """

    reason: str
    attempt: int
    attempts: int
    wait_s: float = 0.0


@dataclass(frozen=True)
class Resumed:
    """The ring stands again, so many seconds after its loss was noticed."""

    seconds: float


Event = Prefilled | Token | Finished | Interrupted | Resumed
