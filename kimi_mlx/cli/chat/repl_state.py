"""What the commands of a conversation in the terminal share."""

from __future__ import annotations

from dataclasses import dataclass, field

from kimi_mlx.cli.chat.attachments import Attachment
from kimi_mlx.cli.chat.chat_status import ChatStatus
from kimi_mlx.engine.events import Statistics
from kimi_mlx.session.conversation import Conversation


@dataclass
class ReplState:
    """A conversation in the terminal, with what belongs to it.

    Attributes:
        conversation: the conversation; a command may put another one here.
        status: status line.
        attached: files for the next message.
        sent: files of the messages of the conversation, for their names.
        answers: statistics of the answers of the conversation.
        draft: text that the next input line begins with.
        is_over: True to exit.
    """

    conversation: Conversation
    status: ChatStatus = field(init=False)
    attached: list[Attachment] = field(default_factory=list[Attachment])
    sent: list[Attachment] = field(default_factory=list[Attachment])
    answers: list[Statistics] = field(default_factory=list[Statistics])
    draft: str = ""
    is_over: bool = False

    def __post_init__(self) -> None:
        """Begin a status line with the name of the model."""
        self.status = ChatStatus(self.conversation.model.name)

    def clear(self) -> None:
        """Begin a new conversation with the same model, system prompt and settings."""
        self.conversation.reset()
        self._forget()

    def continue_with(self, conversation: Conversation) -> None:
        """Go on with another conversation, such as one from a file."""
        self.conversation = conversation
        self._forget()

    def _forget(self) -> None:
        self.attached, self.sent, self.answers = [], [], []
