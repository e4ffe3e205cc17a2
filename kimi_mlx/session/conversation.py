"""A conversation: messages, the answers to them, and a listener, such as a log."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from kimi_mlx.engine.events import Finished
from kimi_mlx.errors import UsageError
from kimi_mlx.session.chat_model import ChatEvent, ChatModel, ChatOptions
from kimi_mlx.text.messages import Content, Delta, Message, ToolCall


class ConversationListener(Protocol):
    """Receives each change of a conversation, so that all that was shown is stored.

    It is called in the thread of the answer, before the caller receives the same event. The system prompt, the model
    and the options are read from the conversation when they are needed.
    """

    def on_message(self, message: Message) -> None:
        """Handle a message that was appended: a user's, a tool's result, or an answer that has ended."""
        ...

    def on_delta(self, delta: Delta) -> None:
        """Handle new text of the answer in progress, which is not a message yet."""
        ...

    def on_finish(self, finished: Finished | None, message: Message | None) -> None:
        """Handle the end of an answer.

        Args:
            finished: reason and statistics; None if the answer failed, or its reader has stopped.
            message: message of the answer, for which on_message() was called; None if it had no content.
        """
        ...

    def on_remove(self, count: int) -> None:
        """Handle the removal of the last messages.

        Args:
            count: number of messages that were removed from the end.
        """
        ...

    def on_replace(self, index: int, message: Message) -> None:
        """Handle a change of a message.

        Args:
            index: index of the message, without the system prompt.
            message: message that is there now.
        """
        ...

    def on_reset(self) -> None:
        """Handle the end of the conversation: all its messages are dropped, and a new one begins."""
        ...


class Conversation:
    """A conversation with one model.

    Args:
        model: model that answers.
        options: options of the answers.
        system: system prompt, if there is one.
        messages: messages so far, without a system prompt.

    Attributes:
        listener: listener of the conversation; None for none.
    """

    def __init__(
        self,
        model: ChatModel,
        options: ChatOptions | None = None,
        system: str | None = None,
        messages: Sequence[Message] = (),
    ):
        self.model = model
        self.options = options or ChatOptions()
        self.system = system
        self.messages: list[Message] = list(messages)
        self.listener: ConversationListener | None = None

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
        for index, message in enumerate(self.messages):
            content = message.content
            if content and not isinstance(content, str) and any(other is part for other in content):
                kept = [other for other in content if other is not part]
                self.messages[index] = replace(message, content=kept)
                if self.listener is not None:
                    self.listener.on_replace(index, self.messages[index])

    def ask(self, content: Content) -> Generator[ChatEvent, None, None]:
        """Add a user message and stream the answer.

        If the answer fails or is cancelled before it has any content, the user message is removed again.

        Args:
            content: text, or parts in OpenAI's format: text, images and videos.

        Raises:
            KimiMlxError: the request is refused, or the model has failed.
        """
        self._append(Message("user", content))
        length = len(self.messages)
        try:
            yield from self.answer()
        finally:
            if len(self.messages) == length:
                self._remove_from(length - 1)

    def answer(self) -> Generator[ChatEvent, None, None]:
        """Stream the answer to the messages as they are, such as after the results of tools.

        When it ends, the answer is added to the conversation. If it fails or is cancelled, what it has of reasoning and
        text is added, without tool calls; an answer that was cancelled or has failed with neither is not.

        Raises:
            KimiMlxError: the request is refused, or the model has failed.
        """
        answer = Delta()
        finished: Finished | None = None
        try:
            for event in self.model.generate(self.prompt_messages(), self.options):
                if isinstance(event, Delta):
                    answer = answer + event
                    if self.listener is not None:
                        self.listener.on_delta(event)
                elif isinstance(event, Finished):
                    finished = event
                    self._finish(answer, finished)
                yield event
        finally:
            if finished is None:
                self._finish(answer, None)

    def retry(self) -> Generator[ChatEvent, None, None]:
        """Drop the last answer, with its tool calls and their results, and stream another one.

        If the new answer has no content because it fails or is cancelled, the dropped messages are restored.

        Raises:
            UsageError: there is no user message.
            KimiMlxError: the request is refused, or the model has failed.
        """
        last = self._last_user_index()
        if last < 0:
            raise UsageError("there is no message to answer again", hint="send one first")
        dropped = self._remove_from(last + 1)
        length = len(self.messages)
        try:
            yield from self.answer()
        finally:
            if len(self.messages) == length:
                for message in dropped:
                    self._append(message)

    def add_tool_result(self, call: ToolCall, content: Content) -> None:
        """Add the result of a call of the last answer.

        Args:
            call: call of the model; its id is that in the conversation.
            content: result, or the error.
        """
        self._append(Message("tool", content, tool_call_id=call.id))

    def undo(self) -> Content:
        """Remove the last user message and all after it; return its content, or None if there is none."""
        index = self._last_user_index()
        return self._remove_from(index)[0].content if index >= 0 else None

    def fork(self) -> Conversation:
        """Return an independent copy of the conversation, with the same model and without a listener."""
        return Conversation(self.model, self.options, self.system, self.messages)

    def count_tokens(self) -> int:
        """Return the number of tokens of the messages as a prompt."""
        return self.model.count_tokens(self.prompt_messages(), self.options)

    def prompt_messages(self) -> list[Message]:
        """Return all messages, with the system prompt."""
        return [*([Message("system", self.system)] if self.system else []), *self.messages]

    def reset(self) -> None:
        """Drop all messages and the KV cache; the system prompt stays."""
        self.messages = []
        self.model.reset()
        if self.listener is not None:
            self.listener.on_reset()

    def cancel(self) -> None:
        """Cancel the answer that is being streamed; the text so far stays in the conversation."""
        self.model.cancel()

    def _finish(self, answer: Delta, finished: Finished | None) -> None:
        """Append an answer that has ended."""
        is_complete = finished is not None and finished.reason != "cancelled"
        message = _assistant_message(answer, is_complete)
        if not is_complete and not (message.content or message.reasoning_content):
            message = None
        if message is not None:
            self._append(message)
        if self.listener is not None:
            self.listener.on_finish(finished, message)

    def _append(self, message: Message) -> None:
        self.messages.append(message)
        if self.listener is not None:
            self.listener.on_message(message)

    def _remove_from(self, index: int) -> list[Message]:
        """Remove and return the messages from an index on."""
        removed = self.messages[index:]
        del self.messages[index:]
        if removed and self.listener is not None:
            self.listener.on_remove(len(removed))
        return removed

    def _last_user_index(self) -> int:
        """Return the index of the last user message; -1 if there is none."""
        indices = [index for index, message in enumerate(self.messages) if message.role == "user"]
        return indices[-1] if indices else -1


def _assistant_message(answer: Delta, is_complete: bool) -> Message:
    """Return an answer as a message.

    Unparsed tool calls are left out, because a template cannot render them; so are all calls of an answer that is not
    complete, because they are not run.
    """
    calls = tuple(call for call in answer.tool_calls if isinstance(call, ToolCall)) if is_complete else ()
    return Message("assistant", answer.text, answer.reasoning or None, calls)
