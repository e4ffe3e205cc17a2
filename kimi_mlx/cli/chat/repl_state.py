"""State of a conversation in the terminal, which its commands share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import InitVar, dataclass, field

from kimi_mlx.cli.chat.answer_settings import AnswerSettings
from kimi_mlx.cli.chat.chat_history import ChatHistory
from kimi_mlx.cli.chat.files.attachments import Attachment
from kimi_mlx.cli.chat.files.text_attachments import TextAttachment
from kimi_mlx.cli.chat.output.answer_view import ReasoningMode
from kimi_mlx.cli.chat.output.chat_status import ChatStatus, status_of
from kimi_mlx.cli.chat.tools.tool_loop import ToolLoop
from kimi_mlx.engine.events import Statistics
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.planner.choice import Choice
from kimi_mlx.session.conversation import Conversation


@dataclass
class ReplState:
    """A conversation in the terminal, with what belongs to it.

    Args:
        sources: where the settings that the conversation begins with come from, by name.

    Attributes:
        conversation: the conversation.
        settings: settings of the answers, and where they come from.
        status: status line.
        placement: the planner's choice; None, or without a strategy, for a model behind a server.
        reasoning: what is shown of the reasoning.
        is_plain: whether to show plain text.
        attached: files for the next message.
        sent: files of the messages of the conversation, for their names.
        answers: statistics of the answers of the conversation.
        history: log of the conversation, and the conversations before it.
        draft: text that the next input line begins with.
        is_over: True to exit.
        tools: runs the calls of the model.
    """

    conversation: Conversation
    sources: InitVar[Mapping[str, str] | None] = None
    placement: Choice | None = None
    reasoning: ReasoningMode = "fold"
    is_plain: bool = False
    attached: list[Attachment | TextAttachment] = field(default_factory=list["Attachment | TextAttachment"])
    sent: list[Attachment | TextAttachment] = field(default_factory=list["Attachment | TextAttachment"])
    answers: list[Statistics] = field(default_factory=list[Statistics])
    history: ChatHistory = field(default_factory=ChatHistory)
    draft: str = ""
    is_over: bool = False
    tools: ToolLoop = field(default_factory=ToolLoop)
    settings: AnswerSettings = field(init=False)
    status: ChatStatus = field(init=False)

    def __post_init__(self, sources: Mapping[str, str] | None) -> None:
        """Begin with the settings and the model of the conversation."""
        model = self.conversation.model
        self.settings = AnswerSettings(self.conversation.options, sources)
        self.status = status_of(model)
        self.count_used()

    def clear(self) -> None:
        """Begin a new conversation with the same model, system prompt and settings."""
        self.conversation.reset()
        self._forget()

    def restart(self) -> None:
        """Begin again after messages and options were replaced by those of another conversation."""
        self.settings.restart(self.conversation.options)
        self._forget()

    def count_used(self) -> None:
        """Set the number of tokens of the context in use, after messages were removed or replaced."""
        self.status.used = 0
        if self.conversation.messages:
            with suppress(KimiMlxError):  # a server that does not answer now; the next answer reports it
                self.status.used = self.conversation.count_tokens()

    def _forget(self) -> None:
        self.attached, self.sent, self.answers = [], [], []
        self.count_used()
