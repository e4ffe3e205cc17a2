"""The conversation in the terminal: messages, streamed answers, and commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Sequence

from kimi_mlx.cli.chat.answer_turn import show_answer
from kimi_mlx.cli.chat.commands.commands import (
    Command,
    CommandList,
    describe_command,
    keys_table,
)
from kimi_mlx.cli.chat.commands.conversation_commands import ConversationCommands
from kimi_mlx.cli.chat.commands.file_commands import FileCommands
from kimi_mlx.cli.chat.commands.settings_commands import SettingsCommands
from kimi_mlx.cli.chat.commands.status_commands import StatusCommands
from kimi_mlx.cli.chat.commands.tool_commands import ToolCommands
from kimi_mlx.cli.chat.files.message_files import has_dropped_media
from kimi_mlx.cli.chat.input.input_line import InputLine, open_input_line
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.chat.tools.tool_permissions import TerminalQuestion
from kimi_mlx.cli.output import print_error, print_note, stderr
from kimi_mlx.errors import ImageError, KimiMlxError, RingError, ServerError, UsageError
from kimi_mlx.folders import state_folder
from kimi_mlx.text.messages import Content

QUIT_WORDS = ("exit", "quit")
"""Messages that end the chat, as in shells and other chats."""


class Repl:
    """A conversation with its commands.

    Args:
        state: the conversation, with the files of the first message.
    """

    def __init__(self, state: ReplState):
        self._state = state
        self._files = FileCommands(state)
        self._conversations = ConversationCommands(state)
        state.tools.permissions.ask = TerminalQuestion(self._keep_typed)
        others = SettingsCommands(state), StatusCommands(state), ToolCommands(state.tools)
        sources = (self, self._conversations, self._files, *others)
        self.command_list = CommandList(command for source in sources for command in source.commands())

    def commands(self) -> Sequence[Command]:
        """Return the commands of the conversation as a whole, and of the program."""
        return [
            Command(
                *("/clear", "", "start a new conversation", self._clear, "Conversation"),
                details="The model, the system prompt and the settings stay.",
                other_names=("/new", "/reset"),
            ),
            Command(
                *("/help", "[COMMAND|keys]", "this list, or more of one", self._help),
                complete=lambda _: ["keys", *(command.name.removeprefix("/") for command in self.command_list)],
                other_names=("/?",),
            ),
            Command("/quit", "", "exit (Ctrl-D)", self._quit, other_names=("/exit", "/bye")),
        ]

    def _keep_typed(self, text: str) -> None:
        """Keep what was typed before a question for the next message."""
        self._state.draft += text

    def run(self, line: InputLine) -> None:
        """Read and answer messages until the user exits.

        Raises:
            RingError: the connection between the hosts was lost.
            KeyboardInterrupt: Ctrl-C was pressed twice during one answer.
        """
        state = self._state
        print_note(f"{state.conversation.model.name} · /help lists commands, Ctrl-D exits\n")
        if state.history.resumed is not None:
            self._conversations.show_resumed()
            stderr.print()
        self._files.show_attached()
        was_interrupted = False
        while not state.is_over:
            draft, state.draft = state.draft, ""
            try:
                message = line.read(draft, None if state.is_plain else state.status.line)
            except KeyboardInterrupt:
                if was_interrupted:
                    return
                was_interrupted = True
                print_note("Press Ctrl-C again to exit")
            except EOFError:
                return
            else:
                was_interrupted = False
                if not self.handle(message):
                    state.draft = message.text.strip("\n")

    def handle(self, message: UserInput) -> bool:
        """Run a command or answer a message; do nothing if it is empty.

        Returns:
            False if the message could not be sent or run as it was typed.
        """
        typed = message.text.strip()
        num_messages = len(self._state.conversation.messages)
        is_accepted = True
        try:
            if message.is_typed_command and typed.startswith("//"):
                self._send(typed[1:])
            elif message.is_typed_command and self._is_command(typed):
                self._command(typed)
            elif typed in QUIT_WORDS and not message.pasted:
                self._state.is_over = True
            elif typed:
                self._send(self._files.read_message(message))
        except RingError:
            raise
        except KimiMlxError as error:
            print_error(error)
            is_kept = len(self._state.conversation.messages) > num_messages
            is_accepted = is_kept or not isinstance(error, UsageError | ImageError | ServerError)
        if typed and not self._state.is_over:
            stderr.print()
        return is_accepted

    def _is_command(self, typed: str) -> bool:
        """Return whether a message that begins with a slash is a command, and not the path of a dropped file."""
        return typed.split(maxsplit=1)[0] in self.command_list or not has_dropped_media(typed)

    def _send(self, content: Content) -> None:
        """Answer a message with the files that are attached to it; they stay attached if it is not answered."""
        if content is None:
            return
        conversation = self._state.conversation
        num_messages = len(conversation.messages)
        try:
            show_answer(self._state, conversation.ask(self._files.add_attached(content)))
        finally:
            self._files.finish_message(len(conversation.messages) > num_messages)

    def _command(self, typed: str) -> None:
        name, *rest = typed.split(maxsplit=1)
        if name not in self.command_list:
            self._files.refuse_other_file(typed)
        self.command_list.find(name).call("".join(rest))

    def _help(self, argument: str) -> None:
        if not argument:
            stderr.print(self.command_list.overview(stderr.width), soft_wrap=False)
        elif argument == "keys":
            stderr.print(keys_table(), soft_wrap=False)
        else:
            name = argument if argument.startswith("/") else f"/{argument}"
            stderr.print(describe_command(self.command_list.find(name)), soft_wrap=False)

    def _clear(self, argument: str) -> None:
        self._state.clear()
        print_note("conversation cleared")

    def _quit(self, argument: str) -> None:
        self._state.is_over = True


def run_repl(state: ReplState, keeps_input: bool = True) -> int:
    """Run a conversation in the terminal until the user exits; return the exit code.

    Args:
        state: the conversation, with the files of the first message.
        keeps_input: whether messages are kept for the input line of later chats.

    Raises:
        RingError: the connection between the hosts was lost.
        KeyboardInterrupt: Ctrl-C was pressed twice during one answer.
    """
    repl = Repl(state)
    folder = state_folder() if keeps_input else None
    with open_input_line(repl.command_list, folder / "history" if folder else None) as line:
        repl.run(line)
    return 0
