"""The conversation in the terminal: messages, streamed answers, and commands that begin with a slash."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType

from kimi_mlx.cli.chat.answer_view import AnswerView
from kimi_mlx.cli.chat.attachments import Attachment
from kimi_mlx.cli.chat.chat_status import ChatStatus
from kimi_mlx.cli.chat.commands import FILE_COMMANDS, Command, find_command, help_table
from kimi_mlx.cli.chat.input_line import InputLine, open_input_line
from kimi_mlx.cli.chat.media import ReplMedia
from kimi_mlx.cli.chat.statistics_text import conversation_line, statistics_line
from kimi_mlx.cli.output import print_error, print_note, stderr
from kimi_mlx.engine.events import Encoded, Finished, FinishReason, Prefilled, Statistics
from kimi_mlx.errors import ImageError, KimiMlxError, RingError, UsageError
from kimi_mlx.folders import state_folder
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.text.messages import Content

REMARKS: dict[FinishReason, str] = {
    "cancelled": "stopped",
    "length": "stopped at the token limit",
}


class Repl:
    """A conversation with its commands.

    Args:
        conversation: conversation with the model.
        model_name: name in the greeting.
        attached: images and videos for the first message.
    """

    def __init__(self, conversation: Conversation, model_name: str, attached: Sequence[Attachment] = ()):
        self._conversation = conversation
        self._model_name = model_name
        self._status = ChatStatus(model_name)
        self._media = ReplMedia(conversation, attached)
        self._answers: list[Statistics] = []
        self._is_over = False
        commands = [
            Command("/help", "", "list commands and keys", self._help),
            Command("/reset", "", "clear the conversation; keep the system prompt", self._reset),
            Command("/system", "[TEXT|-]", "show the system prompt, set it to TEXT, or remove it", self._system),
            Command(
                "/image", "FILE ...", "attach images to the next message", partial(self._media.attach, kind="image")
            ),
            Command(
                "/video", "FILE ...", "attach videos to the next message", partial(self._media.attach, kind="video")
            ),
            Command("/images", "[drop N|drop all]", "list images and videos, or drop some", self._media.list),
            Command("/stats", "", "statistics of the last answer and of the conversation", self._stats),
            Command("/quit", "", "exit", self._quit),
            Command("/exit", "", "exit, like /quit", self._quit),
        ]
        self.commands = {command.name: command for command in commands}

    def run(self, line: InputLine) -> None:
        """Read and answer messages until the user exits.

        Raises:
            RingError: the connection between the hosts was lost.
            KeyboardInterrupt: Ctrl-C was pressed twice during one answer.
        """
        print_note(f"{self._model_name} · /help lists commands and keys, Ctrl-D exits\n")
        self._media.show_attached()
        was_interrupted, draft = False, ""
        while not self._is_over:
            try:
                message = line.read(draft)
            except KeyboardInterrupt:
                if was_interrupted:
                    return
                was_interrupted = True
                print_note("Press Ctrl-C again to exit")
            except EOFError:
                return
            else:
                was_interrupted = False
                draft = "" if self.handle(message) else message.strip("\n")

    def handle(self, message: str) -> bool:
        """Run a command or answer a message; do nothing if it is empty.

        Returns:
            False if the message could not be sent or run as it was typed.
        """
        typed = message.strip()
        is_accepted = True
        try:
            if typed.startswith("//"):
                self._send(typed[1:])
            elif self._is_command(typed):
                self._command(typed)
            elif typed:
                self._send(self._media.read_message(message.strip("\n")))
        except RingError:
            raise
        except KimiMlxError as error:
            print_error(error)
            is_accepted = not isinstance(error, UsageError | ImageError)
        if typed and not self._is_over:
            stderr.print()
        return is_accepted

    def _is_command(self, typed: str) -> bool:
        """Return whether a message is a command, and not the path of a dropped file."""
        if not typed.startswith("/"):
            return False
        return typed.split(maxsplit=1)[0] in self.commands or not self._media.finds_files(typed)

    def _send(self, content: Content) -> None:
        """Answer a message with the files that are attached to it; they stay attached if it is not answered."""
        if content is None:
            return
        is_answered = False
        try:
            is_answered = self._answer(self._media.add_attached(content))
        finally:
            self._media.finish_message(is_answered)

    def _answer(self, content: Content) -> bool:
        """Show the answer to a message; return whether it is part of the conversation."""
        length = len(self._conversation.messages)
        with (
            AnswerView(self._status) as view,
            _ctrl_c_stops(self._conversation) as is_stopped,
        ):
            stderr.print()
            for item in self._conversation.ask(content):
                if isinstance(item, Prefilled | Encoded) and is_stopped():
                    self._conversation.cancel()  # again: it may not have begun at the first call
                view.show(item)
                if isinstance(item, Finished):
                    view.finish()
                    self._answers.append(item.statistics)
                    if remark := REMARKS.get(item.reason, "" if view.has_shown else "no answer"):
                        print_note(f"[{remark}]")
        return len(self._conversation.messages) > length

    def _command(self, typed: str) -> None:
        name, *rest = typed.split(maxsplit=1)
        if name not in self.commands:
            self._media.refuse_other_file(typed)
        find_command(self.commands, name).run("".join(rest))

    def _help(self, argument: str) -> None:
        stderr.print(help_table(self.commands.values()), soft_wrap=False)

    def _reset(self, argument: str) -> None:
        self._clear()
        print_note("conversation cleared")

    def _system(self, argument: str) -> None:
        if not argument:
            print_note(self._conversation.system or "there is no system prompt")
            return
        self._conversation.system = None if argument == "-" else argument
        self._clear()
        change = "set" if self._conversation.system else "removed"
        print_note(f"system prompt {change}; conversation cleared")

    def _stats(self, argument: str) -> None:
        if not self._answers:
            print_note("there is no answer yet")
            return
        print_note(f"last answer: {statistics_line(self._answers[-1])}")
        print_note(f"conversation: {conversation_line(self._answers)}")

    def _quit(self, argument: str) -> None:
        self._is_over = True

    def _clear(self) -> None:
        self._conversation.reset()
        self._media.clear()
        self._answers = []


def run_repl(conversation: Conversation, model_name: str, attached: Sequence[Attachment] = ()) -> int:
    """Run a conversation in the terminal until the user exits; return the exit code.

    Args:
        conversation: conversation with the model.
        model_name: name in the greeting.
        attached: images and videos for the first message.

    Raises:
        RingError: the connection between the hosts was lost.
        KeyboardInterrupt: Ctrl-C was pressed twice during one answer.
    """
    repl = Repl(conversation, model_name, attached)
    folder = state_folder()
    about = {command.name: command.about for command in repl.commands.values()}
    with open_input_line(about, FILE_COMMANDS, folder / "history" if folder else None) as line:
        repl.run(line)
    return 0


@contextmanager
def _ctrl_c_stops(conversation: Conversation) -> Generator[Callable[[], bool], None, None]:
    """Make Ctrl-C stop the answer and a second Ctrl-C raise KeyboardInterrupt.

    Yields:
        function that returns whether Ctrl-C was pressed.
    """
    is_stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        if is_stopped:
            raise KeyboardInterrupt
        is_stopped = True
        conversation.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: is_stopped
    finally:
        signal.signal(signal.SIGINT, before)
