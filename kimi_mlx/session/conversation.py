"""Conversations: messages in, deltas out. The one place where text and engine meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.request import Event, Finished, Interrupted, Prefilled, Request, Resumed, Sampling, Token
from kimi_mlx.model.decoder import Model
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer, MessageLike
from kimi_mlx.session.session import Session
from kimi_mlx.text.messages import Delta, Message, ToolCall
from kimi_mlx.text.output import OutputParser

ChatEvent = Delta | Prefilled | Finished | Interrupted | Resumed
"""What an answer comes in: its pieces, and how it is getting on."""


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation is to be answered.

    Args:
        max_tokens: at most so many new tokens an answer; None is the rest of the context.
        sampling: None is what the checkpoint recommends.
        tools: OpenAI-style tools that the model may call.
        template_kwargs: variables of the chat template, such as `thinking`.
    """

    max_tokens: int | None = None
    sampling: Sampling | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None


class Conversation:
    """A conversation with one model; only what is new in it is computed.

    Args:
        session: the loaded model.
        tokenizer: its text side.
        options: how to answer.
        system: the system prompt, none if None.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: ChatTokenizer,
        options: ChatOptions | None = None,
        system: str | None = None,
    ):
        self._session = session
        self._tokenizer = tokenizer
        self.options = options or ChatOptions()
        self.system = system
        self.messages: list[Message] = []

    def ask(self, text: str) -> Iterator[ChatEvent]:
        """Add a user's message and stream the answer, which joins the conversation when it ends.

        If it is stopped before its first word, the question is taken back.

        Raises:
            KimiMlxError: the question is taken back then, too.
        """
        self.messages.append(Message("user", text))
        system = [Message("system", self.system)] if self.system else []
        answer = Delta()
        is_answered = False
        try:
            prompt = self._prompt([*system, *self.messages])
            request = make_request(self._tokenizer, prompt, self.options)
            for item in read(self._session.generate(request), self._tokenizer.output_parser(prompt)):
                if isinstance(item, Delta):
                    answer = answer + item
                elif isinstance(item, Finished) and (answer or item.reason != "cancelled"):
                    is_answered = True
                    self.messages.append(_assistant(answer))
                yield item
        finally:
            if not is_answered:
                del self.messages[-1]

    def reset(self) -> None:
        """Forget all messages and the cache; the system prompt stays."""
        self.messages = []
        self._session.reset()

    def cancel(self) -> None:
        """End the answer that is being streamed; what has come so far stays in the conversation."""
        self._session.cancel_all()

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.apply_chat_template(
            messages, self.options.tools, **dict(self.options.template_kwargs or {})
        )


def stream(
    model: Model,
    tokenizer: ChatTokenizer,
    messages: Sequence[MessageLike],
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **template_kwargs: Any,
) -> Iterator[Delta]:
    """Answer messages with a model from kimi_mlx.load.

    Args:
        model: the model.
        tokenizer: what load returned with it.
        messages: in OpenAI's shape: `{"role": ..., "content": ...}`.
        max_tokens: at most so many new tokens; None is the rest of the context.
        sampling: None is what the checkpoint recommends.
        tools: OpenAI-style tools that the model may call.
        template_kwargs: variables of the chat template, such as `thinking=False`.

    Yields:
        Delta, with new text, reasoning or tool calls.
    """
    prompt = tokenizer.apply_chat_template(messages, tools, **template_kwargs)
    request = make_request(tokenizer, prompt, ChatOptions(max_tokens, sampling))
    for item in read(Engine(model).generate(request), tokenizer.output_parser(prompt)):
        if isinstance(item, Delta):
            yield item


def make_request(tokenizer: ChatTokenizer, prompt: Sequence[int], options: ChatOptions) -> Request:
    """The engine's request for a prompt."""
    return Request(
        prompt=tuple(prompt),
        max_tokens=tokenizer.max_tokens if options.max_tokens is None else options.max_tokens,
        sampling=options.sampling or tokenizer.sampling,
        stop_ids=tokenizer.stop_ids,
    )


def read(events: Iterator[Event], parser: OutputParser) -> Iterator[ChatEvent]:
    """Turn tokens into deltas; progress and the end pass through."""
    for event in events:
        if isinstance(event, Token):
            delta = parser.add(event.id)
        elif isinstance(event, Finished):
            delta = parser.finish()
        else:
            delta = Delta()
        if delta:
            yield delta
        if not isinstance(event, Token):
            yield event


def _assistant(answer: Delta) -> Message:
    """The answer as a message; what was no proper tool call cannot be said again, and is left out."""
    calls = tuple(call for call in answer.tool_calls if isinstance(call, ToolCall))
    return Message("assistant", answer.text, answer.reasoning or None, calls)
