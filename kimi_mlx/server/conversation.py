"""What every API's body becomes, and what every API's answer is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kimi_mlx.text.messages import Delta, Message, join

StopReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class GenerationParams:
    """How an answer is to be made, whatever it continues.

    Args:
        max_tokens: at most so many new tokens; None is the rest of the context.
        sampling: values of Sampling by name, for what differs from the checkpoint's recommendation.
        stop: texts that end the answer, and are no part of it.
        n: how many answers.
        top_logprobs: with each token its log probability, and so many of the likeliest; None: neither.
        logit_bias: added to the logits of some tokens, as pairs of an id and a number.
    """

    max_tokens: int | None = None
    sampling: Mapping[str, float | int | None] = field(default_factory=dict[str, "float | int | None"])
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ChatRequest(GenerationParams):
    """A conversation to be answered.

    Args:
        messages: the conversation; ids of tool calls may be foreign ones.
        tools: in OpenAI's shape, `{"type": "function", "function": {...}}`.
        tool_choice: `auto`, `none`, `required`, or `{"name": ...}` of the tool that must be called.
        parallel_tool_calls: whether one answer may call several tools.
        response_schema: JSON schema of the answer; True: any JSON object; None: any text.
        response_schema_name: where the request has it, for errors.
        thinking: whether the model reasons first; None leaves it to the template.
        template_kwargs: further variables of the chat template, such as `preserve_thinking`.
        partial: what the assistant has said already, to be gone on from; it is no part of the answer.
        call_id_prefix: of the ids of new calls where the conversation has none to go by; None: Kimi's own ids.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, str] = "auto"
    parallel_tool_calls: bool = True
    response_schema: Mapping[str, Any] | bool | None = None
    response_schema_name: str = "response_format"
    thinking: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    partial: str | None = None
    call_id_prefix: str | None = None


@dataclass(frozen=True)
class CompletionRequest(GenerationParams):
    """Plain text, or token ids, to be continued as it is."""

    prompt: str | tuple[int, ...] = ""


@dataclass(frozen=True)
class TokenLogprobs:
    """A token of the answer's text, and how likely it was.

    Args:
        token: its bytes, which need not be whole characters.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens and their logarithms, the likeliest first.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer, or of several together.

    Args:
        prompt_tokens: of the prompt; of several answers to one, it is counted with the first.
        completion_tokens: new ones, of which `reasoning` were thought.
        cached_tokens: of the prompt, those that were not computed anew.
        reasoning_tokens: see `completion`.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class KeepAlive:
    """Nothing to say for some seconds: a sign of life.

    Args:
        done: tokens of the prompt that are read, of `total`; 0 while the request waits for its turn.
        total: see `done`.
        reason: why it waits, if it is for a ring that is started again.
    """

    done: int = 0
    total: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class DeltaEvent:
    """What one or more tokens added to an answer.

    Args:
        index: of the answer, below `n`.
        delta: what was added.
        logprobs: of the tokens of its text, if they were asked for.
    """

    index: int
    delta: Delta
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class FinishEvent:
    """The end of one answer.

    Args:
        index: of the answer.
        reason: why it ended.
        stop_sequence: the text of `stop` that ended it.
        usage: its tokens.
    """

    index: int
    reason: StopReason
    stop_sequence: str | None
    usage: Usage


AnswerEvent = KeepAlive | DeltaEvent | FinishEvent
"""What answers come in; those of several answers come mixed, and each answer's last is its FinishEvent."""


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    delta: Delta
    logprobs: tuple[TokenLogprobs, ...]
    end: FinishEvent


def collect(items: Iterable[AnswerEvent]) -> list[Answer]:
    """Put pieces together; answers are in the order of their indices."""
    pieces: dict[int, list[DeltaEvent]] = defaultdict(list)
    ends: dict[int, FinishEvent] = {}
    for item in items:
        if isinstance(item, DeltaEvent):
            pieces[item.index].append(item)
        elif isinstance(item, FinishEvent):
            ends[item.index] = item
    return [
        Answer(
            join(piece.delta for piece in pieces[index]),
            tuple(token for piece in pieces[index] for token in piece.logprobs),
            ends[index],
        )
        for index in sorted(ends)
    ]


def total_usage(answers: Iterable[FinishEvent]) -> Usage:
    """Tokens of several answers."""
    ends = list(answers)
    return Usage(*(sum(getattr(end.usage, name) for end in ends) for name in Usage.__dataclass_fields__))
