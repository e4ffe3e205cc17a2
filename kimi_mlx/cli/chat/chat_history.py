"""The history of a chat: the conversation that `--continue` resumes, and the log of the new messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kimi_mlx.cli.chat.model_choice import resolve_chat_model
from kimi_mlx.cli.output import print_note
from kimi_mlx.errors import HistoryError, UsageError
from kimi_mlx.history.find import find_conversation
from kimi_mlx.history.log import ConversationLog
from kimi_mlx.history.plain_text import title_of
from kimi_mlx.history.records import ConversationRecord, MessageRecord
from kimi_mlx.history.store import HistoryStore, open_history
from kimi_mlx.store.model_ref import resolve_model_name

if TYPE_CHECKING:
    from kimi_mlx.cli.chat.options import HistoryOptions
    from kimi_mlx.history.openai_format import LoadedConversation
    from kimi_mlx.session.conversation import Conversation
    from kimi_mlx.store.model_ref import ModelRef
    from kimi_mlx.text.messages import Message, ToolCall

NO_RESULT = "There is no result: the chat ended before the tool did."
"""Result of a tool call of a chat that was killed, for the model."""


class ChatHistory:
    """The history as one chat uses it.

    Args:
        store: history; None if it is not open.
        resumed: conversation that the chat continues; None for a new one.
        is_logged: whether the chat is stored.

    Attributes:
        log: log of the chat; None if it is not stored, or not attached yet.
        resumed: conversation that the chat continues; None for a new one.
    """

    def __init__(
        self, store: HistoryStore | None = None, resumed: ConversationRecord | None = None, is_logged: bool = False
    ):
        self._store = store
        self._is_logged = is_logged
        self._show_note: Callable[[str], None] = print_note
        self.log: ConversationLog | None = None
        self.resumed = resumed

    @classmethod
    def open(cls, options: HistoryOptions) -> ChatHistory:
        """Open the history, and find the conversation to continue.

        If the file cannot be used, a new chat is not stored; that is reported.

        Args:
            options: options of the user.

        Raises:
            HistoryError: there is no such conversation, or the history cannot be used.
        """
        is_logged, name = not options.no_log, options.continue_
        if name is None and not is_logged:
            return cls()
        try:
            store = open_history()
        except HistoryError as error:
            if name is not None:
                raise
            print_note(f"this chat is not stored: {error.message}; {error.hint}")
            return cls()
        try:
            return cls(store, None if name is None else find_conversation(store, name), is_logged)
        except HistoryError as error:
            hint = f"{error.hint}; a model comes before --continue" if name else error.hint
            raise HistoryError(error.message, hint=hint) from None

    def resolve_model(self, name: str | None, prompt: str | None) -> ModelRef:
        """Return the model: the one with a name, else that of the conversation to continue, else the default.

        Args:
            name: name that the user gave; None for none.
            prompt: prompt of the user.

        Raises:
            UsageError: unknown name, or an unsupported model.
        """
        if name is not None or self.resumed is None:
            return resolve_chat_model(name, prompt)
        try:
            return resolve_model_name(self.resumed.model)
        except UsageError as error:
            hint = (
                f"choose another one: `kimi-mlx chat MODEL --continue {self.resumed.id}`, or name its server with --url"
            )
            raise UsageError(f"the model of the conversation cannot be used: {error.message}", hint=hint) from None

    def attach(self, conversation: Conversation, target: ModelRef | None, weak: Collection[str] = ()) -> None:
        """Fill a conversation with the messages to continue, and log what happens in it from now on.

        What the user has set stays; the other settings become those of the conversation that is continued.

        Args:
            conversation: empty conversation with the loaded model.
            target: the model; None for that of a server.
            weak: names of options whose values give way to the settings of the conversation that is continued.

        Raises:
            HistoryError: the conversation to continue cannot be read.
        """
        if self._store is not None and self._is_logged:
            model = conversation.model.name if target is None else stored_name(target)
            self.log = ConversationLog(
                self._store, model, lambda: settings_of(conversation), lambda text: self._show_note(text)
            )
        if self.resumed is None:
            conversation.listener = self.log
            return
        options, system = conversation.options, conversation.system
        self.resume(conversation, self.resumed)
        stored = conversation.options
        is_system_weak = not {"system", "system_file"}.isdisjoint(weak)
        conversation.system = conversation.system if is_system_weak else system or conversation.system
        limits = (stored.max_tokens, options.max_tokens)
        conversation.options = replace(
            options,
            max_tokens=next(filter(None, limits if "max_tokens" in weak else reversed(limits)), None),
            sampling=_merge(options.sampling, stored.sampling, weak),
            template_kwargs=_merge(options.template_kwargs, stored.template_kwargs, weak),
        )

    def resume(self, conversation: Conversation, record: ConversationRecord) -> None:
        """Replace messages and settings of a conversation by those of one in the history, and log what follows.

        Args:
            conversation: conversation of this chat.
            record: conversation in the history.

        Raises:
            HistoryError: the history cannot be used.
        """
        if self.log is not None:
            messages, is_copy = self.log.resume(record.number)
            if is_copy and (copy := self.log.conversation) is not None:
                print_note(f"`{record.id}` is open in another chat; this one continues a copy, `{copy.id}`")
        else:
            messages = self.store.messages(record.number)
        conversation.messages = [item.message for item in messages]
        if messages:
            _apply_settings(conversation, messages[-1].settings)
        if self.log is not None and record.model != self.log.model:
            print_note(f"so far this conversation was with {record.model}; now it is with {self.log.model}")
        conversation.listener = self.log
        for call in _calls_without_result(conversation.messages):
            conversation.add_tool_result(call, NO_RESULT)

    def replace_messages(self, conversation: Conversation, loaded: LoadedConversation) -> None:
        """Replace the messages of a conversation by those of a file, and log it as a new conversation.

        Args:
            conversation: conversation of this chat.
            loaded: content of the file.
        """
        conversation.messages, conversation.system = list(loaded.messages), loaded.system
        if self.log is not None:
            self.log.start()
            self.log.add_messages(loaded.messages)
            if loaded.title:
                self.log.rename(loaded.title)

    @property
    def store(self) -> HistoryStore:
        """The history, also for a chat that is not stored.

        Raises:
            HistoryError: it cannot be used.
        """
        if self._store is None:
            self._store = open_history()
        return self._store

    def describe(self, conversation: Conversation) -> tuple[ConversationRecord, list[MessageRecord]]:
        """Return a conversation of this chat and its messages, as they are in the history or as they would be.

        Args:
            conversation: conversation of this chat.

        Raises:
            HistoryError: the history cannot be read.
        """
        if (record := self.record) is not None:
            return record, self.store.messages(record.number)
        model, settings, now = conversation.model.name, settings_of(conversation), time.time()
        messages = [
            MessageRecord(message, model, settings, None, None, now, now, None) for message in conversation.messages
        ]
        contents = [message.content for message in conversation.messages if message.role == "user"]
        title = title_of(contents[0]) if contents else ""
        return ConversationRecord(0, "not stored", title, model, None, now, now, len(contents)), messages

    @contextmanager
    def notes_in(self, show: Callable[[str], None]) -> Generator[None]:
        """Show errors of the log in another way within a block, such as above an answer that is being drawn.

        Args:
            show: function that shows a text to the user.
        """
        self._show_note = show
        try:
            yield
        finally:
            self._show_note = print_note

    @property
    def record(self) -> ConversationRecord | None:
        """This chat in the history; None if it is not stored, or has no messages yet."""
        return None if self.log is None or self.log.has_failed else self.log.conversation

    def note_id(self) -> None:
        """Tell the user how to continue this chat, if it has messages."""
        if self.record is not None:
            print_note(f"`kimi-mlx chat --continue {self.record.id}` continues this conversation")

    def require_log(self) -> ConversationLog:
        """Return the log.

        Raises:
            UsageError: the chat is not stored.
        """
        if self.log is None:
            raise UsageError("this chat is not stored in the history", hint="/save FILE stores it in a file")
        return self.log

    def close(self) -> None:
        """Close the history."""
        if self._store is not None:
            self._store.close()


def stored_model(name: str) -> str:
    """Return the model of a conversation of the history.

    Args:
        name: id, beginning of an id, or title; empty for the latest conversation.

    Raises:
        HistoryError: there is no such conversation, or the history cannot be used.
    """
    with closing(open_history()) as store:
        return find_conversation(store, name).model


def settings_of(conversation: Conversation) -> dict[str, Any]:
    """Return the settings of a conversation that the history stores; of the options, those that the user has set."""
    options = conversation.options
    settings = {
        "system": conversation.system,
        "max_tokens": options.max_tokens,
        "sampling": dict(options.sampling),
        "template": dict(options.template_kwargs),
        "tools": list(options.tools),
    }
    return {name: value for name, value in settings.items() if value}


def stored_name(target: ModelRef) -> str:
    """Return the name under which a model is found again from any folder."""
    return str(target.folder.resolve()) if target.folder is not None and target.entry is None else target.name


def _merge(options: Mapping[str, Any], stored: Mapping[str, Any], weak: Collection[str]) -> dict[str, Any]:
    """Return options, and stored settings where there is no option or only a weak one."""
    return {**options, **stored, **{name: value for name, value in options.items() if name not in weak}}


def _apply_settings(conversation: Conversation, settings: Mapping[str, Any]) -> None:
    conversation.system = settings.get("system")
    conversation.options = replace(
        conversation.options,
        max_tokens=settings.get("max_tokens"),
        sampling=settings.get("sampling", {}),
        template_kwargs=settings.get("template", {}),
    )


def _calls_without_result(messages: Sequence[Message]) -> list[ToolCall]:
    """Return the tool calls at the end of a conversation without a result."""
    answered: set[str | None] = set()
    for message in reversed(messages):
        if message.role != "tool":
            return [call for call in message.tool_calls if call.id not in answered]
        answered.add(message.tool_call_id)
    return []
