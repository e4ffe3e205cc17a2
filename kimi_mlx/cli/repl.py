"""The conversation in the terminal: messages, answers as they stream, commands that begin with a slash."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.input_line import InputLine, open_input_line
from kimi_mlx.cli.output import print_error, stderr, stdout
from kimi_mlx.cli.stream import AnswerPrinter, count, statistics_line
from kimi_mlx.engine.request import Finished, FinishReason, Prefilled, Statistics
from kimi_mlx.errors import KimiMlxError, RingError, UsageError
from kimi_mlx.folders import state_folder
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.units import format_rate, format_seconds

KEYS = {
    "Enter": "sends the message",
    "Alt-Enter, Ctrl-J": "begin a new line; so does a backslash at the end of a line",
    "Ctrl-C": "stops the answer; clears the message; twice in an empty message leaves",
    "Ctrl-D": "leaves",
    "Up, Down, Ctrl-R": "earlier messages, search in them",
    "Tab": "completes a command",
    "//text": "sends a message that begins with a slash",
}
REMARKS: dict[FinishReason, str] = {
    "cancelled": "stopped",
    "length": "stopped at the token limit",
}


@dataclass(frozen=True)
class Command:
    """A command of the conversation.

    Args:
        name: with its slash.
        argument: how help writes what follows the name, empty if nothing does.
        about: what it does.
        run: gets what follows the name.
    """

    name: str
    argument: str
    about: str
    run: Callable[[str], None]


class Repl:
    """A conversation with its commands.

    Args:
        conversation: who answers.
        model_name: for the greeting.
    """

    def __init__(self, conversation: Conversation, model_name: str):
        self._conversation = conversation
        self._model_name = model_name
        self._answers: list[Statistics] = []
        self._is_over = False
        commands = [
            Command("/help", "", "list commands and keys", self._help),
            Command("/reset", "", "forget the conversation; the system prompt stays", self._reset),
            Command("/system", "[TEXT|-]", "show the system prompt, set it to TEXT, or remove it", self._system),
            Command("/stats", "", "figures of the last answer and of the conversation", self._stats),
            Command("/quit", "", "leave", self._quit),
            Command("/exit", "", "leave, as /quit does", self._quit),
        ]
        self.commands = {command.name: command for command in commands}

    def run(self, line: InputLine) -> None:
        """Talk until the user leaves.

        Raises:
            RingError: the model is gone.
            KeyboardInterrupt: Ctrl-C, twice within one answer.
        """
        _note(f"{self._model_name} · /help lists commands and keys, Ctrl-D leaves\n")
        was_interrupted = False
        while not self._is_over:
            try:
                message = line.read()
            except KeyboardInterrupt:
                if was_interrupted:
                    return
                was_interrupted = True
                _note("Press Ctrl-C again to exit")
            except EOFError:
                return
            else:
                was_interrupted = False
                self.handle(message)

    def handle(self, message: str) -> None:
        """Run a command, or answer a message; an empty one does nothing."""
        typed = message.strip()
        try:
            if typed.startswith("//"):
                self._answer(typed[1:])
            elif typed.startswith("/"):
                self._command(typed)
            elif typed:
                self._answer(message.strip("\n"))
        except RingError:
            raise
        except KimiMlxError as error:
            print_error(error)
        if typed and not self._is_over:
            stderr.print()

    def _answer(self, text: str) -> None:
        with (
            AnswerPrinter(stdout, show_reasoning=True, plain=False) as printer,
            _ctrl_c_stops(self._conversation) as is_stopped,
        ):
            stderr.print()
            for item in self._conversation.ask(text):
                if isinstance(item, Prefilled) and is_stopped():
                    self._conversation.cancel()  # again: the first time it had perhaps not begun
                printer.show(item)
                if isinstance(item, Finished):
                    printer.finish()
                    self._answers.append(item.statistics)
                    if remark := REMARKS.get(item.reason, "" if printer.has_shown else "no answer"):
                        _note(f"[{remark}]")

    def _command(self, typed: str) -> None:
        name, *rest = typed.split(maxsplit=1)
        if name in self.commands:
            self.commands[name].run("".join(rest))
            return
        nearest = difflib.get_close_matches(name, self.commands, n=2, cutoff=0.6)
        is_it = " or ".join(f"`{candidate}`" for candidate in nearest) or "`/help`"
        raise UsageError(
            f"there is no command `{name}`",
            hint=f"try {is_it}; to send a message that starts with /, type //",
        )

    def _help(self, argument: str) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for command in self.commands.values():
            table.add_row(f"{command.name} {command.argument}".rstrip(), command.about)
        table.add_row()
        for key, about in KEYS.items():
            table.add_row(key, about)
        stderr.print(table, soft_wrap=False)

    def _reset(self, argument: str) -> None:
        self._start_anew()
        _note("conversation cleared")

    def _system(self, argument: str) -> None:
        if not argument:
            _note(self._conversation.system or "there is no system prompt")
            return
        self._conversation.system = None if argument == "-" else argument
        self._start_anew()
        done = "set" if self._conversation.system else "removed"
        _note(f"the system prompt is {done}; conversation cleared")

    def _stats(self, argument: str) -> None:
        if not self._answers:
            _note("there is no answer yet")
            return
        _note(f"last answer: {statistics_line(self._answers[-1])}")
        _note(f"conversation: {conversation_line(self._answers)}")

    def _quit(self, argument: str) -> None:
        self._is_over = True

    def _start_anew(self) -> None:
        self._conversation.reset()
        self._answers = []


def run_repl(conversation: Conversation, model_name: str) -> int:
    """Talk in the terminal until the user leaves; returns the exit code.

    Raises:
        RingError: the model is gone.
        KeyboardInterrupt: Ctrl-C, twice within one answer.
    """
    repl = Repl(conversation, model_name)
    folder = state_folder()
    about = {command.name: command.about for command in repl.commands.values()}
    with open_input_line(about, folder / "history" if folder else None) as line:
        repl.run(line)
    return 0


def conversation_line(answers: Sequence[Statistics]) -> str:
    """The figures of a conversation in one line; there is at least one answer."""
    tokens = sum(answer.generated_tokens for answer in answers)
    decode_s = sum(answer.decode_s for answer in answers)
    decoded = sum(max(answer.generated_tokens - 1, 0) for answer in answers)  # the others: see Statistics
    parts = [
        count(len(answers), "answer"),
        f"{count(tokens, 'token')} in {format_seconds(decode_s)}",
        *([format_rate(decoded / decode_s)] if decoded and decode_s else []),
        f"context {count(answers[-1].prompt_tokens + answers[-1].generated_tokens, 'token')}",
    ]
    return " · ".join(parts)


@contextmanager
def _ctrl_c_stops(conversation: Conversation) -> Generator[Callable[[], bool], None, None]:
    """Let Ctrl-C end the answer, and a second one raise KeyboardInterrupt; yields whether it was pressed."""
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


def _note(text: str) -> None:
    """A word of the program's own, dimmed."""
    stderr.print(Text(text, style="dim"), soft_wrap=False)
