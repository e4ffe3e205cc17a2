"""Conversations: messages in, deltas out. This module connects the tokenizer with a session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Encoded, Event, Finished, Interrupted, Prefilled, Resumed, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.model.decoder import Model
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer, MessageLike
from kimi_mlx.runtime.prompt import Prompt
from kimi_mlx.session.session import Session
from kimi_mlx.text.messages import Content, Delta, Message, ToolCall
from kimi_mlx.text.output import OutputParser

ChatEvent = Delta | Encoded | Prefilled | Finished | Interrupted | Resumed
"""Event of an answer: new text, or progress."""


@dataclass(frozen=True)
class ChatOptions:
    """Options of the answers in a conversation.

    Args:
        max_tokens: maximum number of new tokens per answer; None is the checkpoint's default, usually the rest of the
            context.
        sampling: how tokens are sampled; None is the checkpoint's recommendation.
        tools: OpenAI-style tools that the model may call.
        template_kwargs: variables of the chat template, such as `thinking`.
    """

    max_tokens: int | None = None
    sampling: Sampling | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None


class Conversation:
    """A conversation with one model. The KV cache is kept between turns, so only new tokens are computed.

    Args:
        session: loaded model.
        tokenizer: text side of the model.
        options: options of the answers.
        system: system prompt, if there is one.
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

    @property
    def image_error(self) -> KimiMlxError | None:
        """Error of messages with images if the model does not see images; None if it does."""
        return self._session.image_error

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Text side of the model, which also decodes images."""
        return self._tokenizer

    @property
    def media_parts(self) -> list[Mapping[str, Any]]:
        """Images and videos of all messages, in order, as parts of messages in OpenAI's format."""
        contents = [message.content for message in self.messages]
        parts = [part for content in contents if content and not isinstance(content, str) for part in content]
        return [part for part in parts if part.get("type") != "text"]

    def remove_part(self, part: Mapping[str, Any]) -> None:
        """Remove an image or a video from its message.

        Args:
            part: one of `media_parts`; equal ones stay.
        """
        for number, message in enumerate(self.messages):
            content = message.content
            if content and not isinstance(content, str) and any(other is part for other in content):
                kept = [other for other in content if other is not part]
                self.messages[number] = replace(message, content=kept)

    def ask(self, content: Content) -> Iterator[ChatEvent]:
        """Add a user message and stream the answer, which is added to the conversation when it ends.

        If the answer fails, or is cancelled before its first token, the user message is removed again.

        Args:
            content: text, or parts in OpenAI's format: text, images and videos.

        Raises:
            KimiMlxError: the request is refused, or the session has failed.
        """
        self.messages.append(Message("user", content))
        system = [Message("system", self.system)] if self.system else []
        answer = Delta()
        is_answered = False
        try:
            prompt = self._prompt([*system, *self.messages])
            request = make_request(self._tokenizer, prompt, self.options)
            parser = self._tokenizer.output_parser(prompt.ids, self.options.tools)
            for event in parse_events(self._session.generate(request), parser):
                if isinstance(event, Delta):
                    answer = answer + event
                elif isinstance(event, Finished) and (answer or event.reason != "cancelled"):
                    is_answered = True
                    self.messages.append(_assistant_message(answer))
                yield event
        finally:
            if not is_answered:
                del self.messages[-1]

    def reset(self) -> None:
        """Drop all messages and the KV cache; the system prompt stays."""
        self.messages = []
        self._session.reset()

    def cancel(self) -> None:
        """Cancel the answer that is being streamed; the text so far stays in the conversation."""
        self._session.cancel_all()

    def _prompt(self, messages: Sequence[Message]) -> Prompt:
        template_kwargs = dict(self.options.template_kwargs or {})
        return self._tokenizer.prompt(messages, self.options.tools, **template_kwargs)


def stream(
    model: Model,
    tokenizer: ChatTokenizer,
    messages: Sequence[MessageLike],
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **template_kwargs: Any,
) -> Iterator[Delta]:
    """Answer messages with a model from kimi_mlx.load, in this process and without a session.

    Args:
        model: model from `load`.
        tokenizer: tokenizer from `load`.
        messages: messages in OpenAI's format: `{"role": ..., "content": ...}`, with images as data URLs or bytes.
        max_tokens: maximum number of new tokens; None is the checkpoint's default, usually the rest of the context.
        sampling: how tokens are sampled; None is the checkpoint's recommendation.
        tools: OpenAI-style tools that the model may call.
        template_kwargs: variables of the chat template, such as `thinking=False`.

    Yields:
        Delta: new text, reasoning or tool calls.
    """
    prompt = tokenizer.prompt(messages, tools, **template_kwargs)
    request = make_request(tokenizer, prompt, ChatOptions(max_tokens, sampling))
    for event in parse_events(Engine(model).generate(request), tokenizer.output_parser(prompt.ids, tools)):
        if isinstance(event, Delta):
            yield event


def make_request(tokenizer: ChatTokenizer, prompt: Prompt, options: ChatOptions) -> Request:
    """Return the engine's request for a prompt."""
    return Request(
        prompt=tuple(prompt.ids),
        max_tokens=tokenizer.max_tokens if options.max_tokens is None else options.max_tokens,
        sampling=options.sampling or tokenizer.sampling,
        stop_ids=tokenizer.stop_ids,
        images=prompt.images,
    )


def parse_events(events: Iterator[Event], parser: OutputParser) -> Iterator[ChatEvent]:
    """Convert tokens to deltas; all other events pass through."""
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


def _assistant_message(answer: Delta) -> Message:
    """Return an answer as a message. Unparsed tool calls are left out: a template cannot render them."""
    calls = tuple(call for call in answer.tool_calls if isinstance(call, ToolCall))
    return Message("assistant", answer.text, answer.reasoning or None, calls)
