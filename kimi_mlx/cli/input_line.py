"""The input line of the conversation: one message of the user, on any terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import has_focus, is_searching
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.styles import Style

PROMPT, CONTINUATION = "> ", "  "
STYLE = Style.from_dict(
    {
        "prompt": "bold ansicyan",
        "completion-menu": "fg:default bg:default",
        "completion-menu.completion.current": "fg:default bg:default reverse",
        "completion-menu.meta.completion": "fg:ansibrightblack bg:default",
        "completion-menu.meta.completion.current": "fg:default bg:default",
        "scrollbar.background": "bg:default",
        "scrollbar.button": "bg:default",
    }
)


class InputLine(Protocol):
    """Reads what the user types."""

    def read(self) -> str:
        """One message, perhaps of several lines; empty if there is nothing to do.

        Raises:
            EOFError: the user leaves (Ctrl-D).
            KeyboardInterrupt: Ctrl-C on an empty line.
        """
        ...


@contextmanager
def open_input_line(commands: Mapping[str, str], history: Path | None) -> Generator[InputLine, None, None]:
    """The best input line that this terminal allows.

    Args:
        commands: names to complete, such as `/help`, with what they do.
        history: the file of earlier messages; None keeps them only for this run.
    """
    stream = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
    if stream is None or os.environ.get("TERM", "").lower() in ("", "dumb", "unknown"):
        yield PlainInputLine(sys.stdin.buffer, sys.stderr)
        return
    with _quiet_between_prompts():
        yield EditedInputLine(commands, _open_history(history), stream)


class EditedInputLine:
    """A line with editing, completion and history. Enter sends, Alt-Enter and Ctrl-J begin a new line."""

    def __init__(self, commands: Mapping[str, str], history: History, stream: TextIO):
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", PROMPT)],
            multiline=True,
            prompt_continuation=_continuation,
            key_bindings=_key_bindings(),
            completer=_CommandCompleter(commands),
            complete_while_typing=False,
            history=history,
            enable_suspend=True,
            style=STYLE,
            output=_output(stream),
        )

    def read(self) -> str:
        """One message."""
        self._session.app.erase_when_done = False
        return _without_surrogates(self._session.prompt())


class PlainInputLine:
    """What is left on a terminal that can do nothing: a line at a time, a backslash at its end continues."""

    def __init__(self, source: BinaryIO, prompts: TextIO):
        self._source = source
        self._prompts = prompts

    def read(self) -> str:
        """One message."""
        lines = [self._read_line(PROMPT)]
        while _is_continued(lines[-1]):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line(CONTINUATION))
        return "\n".join(lines)

    def _read_line(self, prompt: str) -> str:
        try:
            print(prompt, end="", file=self._prompts, flush=True)
            line = self._source.readline()
            if not line:
                raise EOFError
        except (KeyboardInterrupt, EOFError):
            print(file=self._prompts)
            raise
        return line.decode("utf-8", errors="replace").removesuffix("\n")


class _CommandCompleter(Completer):
    """Completes the name of a command at the very start of a message."""

    def __init__(self, commands: Mapping[str, str]):
        self._commands = commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Commands that begin like the text before the cursor."""
        typed = document.text_before_cursor
        if typed.startswith("/"):
            for name, about in self._commands.items():
                if name.startswith(typed):
                    yield Completion(name, start_position=-len(typed), display_meta=about)


class _PrivateHistory(FileHistory):
    """A file that goes without what cannot be written to it."""

    def load_history_strings(self) -> Iterable[str]:
        """Messages, the latest first."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Add a message."""
        with contextlib.suppress(OSError):  # a full disk is no reason to stop talking
            super().store_string(_without_surrogates(string))


def _open_history(path: Path | None) -> History:
    """The history's file, readable by its owner alone; in memory where it cannot be written."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError:
        return InMemoryHistory()
    return _PrivateHistory(str(path))


@contextmanager
def _quiet_between_prompts() -> Generator[None, None, None]:
    """Keep what is typed while nothing is asked for the next prompt, unseen; Ctrl-C does nothing then."""
    modes = termios.tcgetattr(sys.stdin)
    quiet = list(modes)
    quiet[0] &= ~termios.ICRNL  # Enter stays what the prompt takes for Enter
    quiet[3] &= ~termios.ECHO
    handler = signal.signal(signal.SIGINT, lambda number, frame: None)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)
        signal.signal(signal.SIGINT, handler)


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()
    at_message = has_focus("DEFAULT_BUFFER") & ~is_searching

    @bindings.add("enter", filter=at_message)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if _is_continued(buffer.document.text_before_cursor) and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif buffer.text.strip():
            buffer.validate_and_handle()
        else:
            buffer.reset()

    @bindings.add("escape", "enter", filter=at_message)
    @bindings.add("c-j", filter=at_message)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c", filter=at_message)
    @bindings.add("<sigint>")
    def interrupt(event: KeyPressEvent) -> None:
        if event.app.current_buffer.text:
            event.app.erase_when_done = True  # as if nothing had been typed
            event.app.exit(result="")
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return bindings


def _continuation(width: int, line_number: int, wrap_count: int) -> StyleAndTextTuples:
    return [("class:prompt", CONTINUATION)]


def _output(stream: TextIO) -> Output:
    colours = ColorDepth.from_env()  # none with NO_COLOR
    output = Vt100_Output.from_pty(stream, term=os.environ.get("TERM"), default_color_depth=colours)
    # No questions about the cursor's position: terminals that do not answer would earn a warning, and late
    # answers would end up in the next message.
    output.enable_cpr = False
    return output


def _is_continued(line: str) -> bool:
    """Whether a line ends in a backslash that is not doubled."""
    return line.endswith("\\") and not line.endswith("\\\\")


def _without_surrogates(text: str) -> str:
    """Text in which bytes that were no UTF-8 are question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
