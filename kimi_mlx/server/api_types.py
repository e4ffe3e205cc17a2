"""Types of requests and answers that all APIs share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kimi_mlx.engine.events import Encoded, Interrupted, Prefilled, Resumed, Statistics
from kimi_mlx.runtime.answer_grammar import AnswerFormat
from kimi_mlx.text.messages import Delta, Message, join

StopReason = Literal["stop", "length", "tool_calls"]

NOTES_FIELD = "kimi_mlx_notes"
"""Field of responses with the notes on a request; it is our own."""


@dataclass(frozen=True)
class GenerationParams:
    """Parameters of generation that every kind of request has.

    Args:
        max_tokens: limit on new tokens; None allows the rest of the context, 0 only computes the prompt.
        sampling: fields of Sampling by name, where they differ from the checkpoint's recommendation.
        stop: texts that end the answer and are not part of it.
        stop_token_ids: tokens that end the answer and are not part of it, besides those of the checkpoint.
        n: number of answers.
        top_logprobs: number of most likely tokens to report with each token; 0 reports only the token's own log
            probability, None reports neither.
        logit_bias: pairs of a token id and a number to add to its logit.
        min_tokens: number of tokens of the answer before a stop token or a stop text may end it.
        return_progress: whether the events of the answer include ProgressEvents.
        notes: sentences about parts of the body that have no effect; the response has them as NOTES_FIELD.
    """

    max_tokens: int | None = None
    sampling: Mapping[str, float | int | None] = field(default_factory=dict[str, "float | int | None"])
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    return_progress: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatRequest(GenerationParams, AnswerFormat):
    """A conversation to answer.

    Args:
        messages: conversation; tool call ids may have any format.
        messages_name: name of the body's field with the messages, for error messages.
        places: locations of the messages in the body, for error messages; empty if they are `messages[0]` and so on.
        part_places: locations of the parts of a message with images, by the index of the message.
        thinking: whether the model reasons first; None leaves it to the template.
        effort: amount of thinking, for templates that read it: `none`, `minimal`, `low`, `medium`, `high`, `xhigh` or
            `max`.
        keeps_reasoning: whether the prompt keeps the reasoning of all earlier answers, where the template can do so.
        template_kwargs: other variables of the chat template, such as `preserve_thinking`.
        partial: beginning of the assistant's message, which the answer continues without repeating it.
        partial_reasoning: reasoning before that beginning.
        partial_name: name of the assistant in that message, which the model sees.
        call_id_prefix: prefix of the ids of new tool calls if the conversation has no calls yet; None uses Kimi's ids.
    """

    messages: tuple[Message, ...] = ()
    messages_name: str = "messages"
    places: tuple[str, ...] = field(default=(), compare=False)
    part_places: Mapping[int, Sequence[str]] = field(default_factory=dict[int, "Sequence[str]"], compare=False)
    thinking: bool | None = None
    effort: str | None = None
    keeps_reasoning: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    partial: str | None = None
    partial_reasoning: str = ""
    partial_name: str | None = None
    call_id_prefix: str | None = None


@dataclass(frozen=True)
class CompletionRequest(GenerationParams):
    """A prompt of plain text or token ids to continue, without a chat template.

    Args:
        prompt: text or token ids.
        place: location of the prompt in the body, for error messages.
        answer_format: what the answer must match; None for any text.
        prompt_logprobs: number of most likely tokens to report with each token of the prompt; None reports no log
            probabilities of the prompt.
    """

    prompt: str | tuple[int, ...] = ""
    place: str = field(default="prompt", compare=False)
    answer_format: AnswerFormat | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """A token of the answer or of the prompt with its log probability.

    Args:
        token: bytes of the token, which may end inside a character.
        logprob: natural logarithm of its probability.
        top: most likely tokens with their log probabilities, most likely first.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer, or the sum over several.

    Args:
        prompt_tokens: tokens of the prompt; with several answers to one prompt, only the first answer counts them.
        completion_tokens: new tokens, including the reasoning.
        cached_tokens: prompt tokens that came from the prompt cache.
        reasoning_tokens: new tokens of the reasoning.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class KeepAlive:
    """Sent when there has been nothing else to send for some seconds.

    Args:
        prefilled_tokens: prompt tokens processed so far; 0 while the request is queued.
        prompt_tokens: tokens of the prompt; 0 while the request is queued.
        reason: error of the ring that is being restarted, if the request waits for that.
    """

    prefilled_tokens: int = 0
    prompt_tokens: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class ProgressEvent:
    """Progress of a prompt, or an interruption by the loss of the ring; only for requests with `return_progress`.

    Args:
        progress: event of the engine.
        cached_tokens: number of prompt tokens that were taken from the cache.
        time_s: seconds since the engine started with the prompt.
    """

    progress: Encoded | Prefilled | Interrupted | Resumed
    cached_tokens: int = 0
    time_s: float = 0.0


@dataclass(frozen=True)
class PromptEvent:
    """The tokens of the prompt of one answer, if their log probabilities are requested; before its first DeltaEvent.

    Args:
        index: index of the answer.
        first: bytes of the first token, which has no log probability.
        logprobs: the other tokens with their log probabilities.
    """

    index: int
    first: bytes
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class DeltaEvent:
    """An addition to one answer, from one or more tokens.

    Args:
        index: index of the answer, below `n`.
        delta: added reasoning, text and tool calls.
        logprobs: log probabilities of the tokens of its text, if requested.
    """

    index: int
    delta: Delta
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class FinishEvent:
    """The end of one answer.

    Args:
        index: index of the answer.
        reason: reason for the end.
        stop_sequence: text of `stop` that ended the answer, if one did.
        usage: token counts.
        statistics: times and memory, as the engine measured them.
    """

    index: int
    reason: StopReason
    stop_sequence: str | None
    usage: Usage
    statistics: Statistics | None = None


AnswerEvent = KeepAlive | ProgressEvent | PromptEvent | DeltaEvent | FinishEvent
"""Events of several answers are interleaved; the last event of each answer is its FinishEvent."""


@dataclass(frozen=True)
class CompleteAnswer:
    """One complete answer."""

    delta: Delta
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishEvent
    prompt: PromptEvent | None = None


def collect(events: Iterable[AnswerEvent]) -> list[CompleteAnswer]:
    """Assemble complete answers from their events, in the order of their indices."""
    deltas: dict[int, list[DeltaEvent]] = defaultdict(list)
    finishes: dict[int, FinishEvent] = {}
    prompts: dict[int, PromptEvent] = {}
    for event in events:
        if isinstance(event, DeltaEvent):
            deltas[event.index].append(event)
        elif isinstance(event, FinishEvent):
            finishes[event.index] = event
        elif isinstance(event, PromptEvent):
            prompts[event.index] = event
    return [
        CompleteAnswer(
            join(event.delta for event in deltas[index]),
            tuple(token for event in deltas[index] for token in event.logprobs),
            finishes[index],
            prompts.get(index),
        )
        for index in sorted(finishes)
    ]


def total_usage(finishes: Iterable[FinishEvent]) -> Usage:
    """Add up the token counts of several answers."""
    usages = [finish.usage for finish in finishes]
    return Usage(*(sum(getattr(usage, name) for usage in usages) for name in Usage.__dataclass_fields__))
