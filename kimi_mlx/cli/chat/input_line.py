"""The input line of the conversation: reads one message of the user, on any terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import has_focus, is_searching
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.styles import Style

from kimi_mlx.cli.chat.dropped_files import last_word_start, quote_name, unescape
from kimi_mlx.cli.chat.media_files import media_kind
from kimi_mlx.cli.chat.terminal_modes import quiet_between_prompts, read_typed_ahead

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

    def read(self, draft: str = "") -> str:
        """Read one message, which may have several lines; return an empty one if it was cleared.

        Args:
            draft: text to begin with, if this terminal can edit it.

        Raises:
            EOFError: Ctrl-D was pressed, or the input has ended.
            KeyboardInterrupt: Ctrl-C was pressed on an empty line.
        """
        ...


@contextmanager
def open_input_line(
    commands: Mapping[str, str], file_commands: Sequence[str], history: Path | None
) -> Generator[InputLine, None, None]:
    """Open the best input line that this terminal supports.

    Args:
        commands: names to complete, such as `/help`, with their descriptions.
        file_commands: those commands that are followed by the name of a file.
        history: file of previous messages; None keeps them in memory only.
    """
    stream = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
    if stream is None or os.environ.get("TERM", "").lower() in ("", "dumb", "unknown"):
        yield PlainInputLine(sys.stdin.buffer, sys.stderr)
        return
    typed_ahead = read_typed_ahead()
    with quiet_between_prompts():
        completer = _MessageCompleter(commands, file_commands)
        yield EditedInputLine(completer, _open_history(history), stream, typed_ahead)


class EditedInputLine:
    """An input line with editing, completion and history. Enter sends; Alt-Enter and Ctrl-J start a new line.

    Args:
        completer: completes what is typed.
        history: previous messages.
        stream: terminal to write to.
        typed_ahead: lines that were typed before; read() returns all but the last one, which is unfinished.
    """

    def __init__(self, completer: Completer, history: History, stream: TextIO, typed_ahead: Sequence[str]):
        self._typed_ahead = list(typed_ahead)
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", PROMPT)],
            multiline=True,
            prompt_continuation=_continuation,
            key_bindings=_key_bindings(),
            completer=completer,
            complete_while_typing=False,
            history=history,
            enable_suspend=True,
            style=STYLE,
            output=_output(stream),
        )

    def read(self, draft: str = "") -> str:
        """Read one message."""
        self._session.app.erase_when_done = False
        line, is_finished = draft, False
        if not draft and self._typed_ahead:
            line = self._typed_ahead.pop(0)
            is_finished = bool(self._typed_ahead)
        try:
            return _without_surrogates(self._session.prompt(default=line, accept_default=is_finished))
        except (OSError, termios.error):  # the terminal was closed
            raise EOFError from None


class PlainInputLine:
    """An input line for a terminal without any control sequences; a backslash at the end continues the line."""

    def __init__(self, source: BinaryIO, prompts: TextIO):
        self._source = source
        self._prompts = prompts

    def read(self, draft: str = "") -> str:
        """Read one message."""
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
        except OSError:  # the terminal was closed
            raise EOFError from None
        except (KeyboardInterrupt, EOFError):
            print(file=self._prompts)
            raise
        return line.decode("utf-8", errors="replace").removesuffix("\n")


class _MessageCompleter(Completer):
    """Completes the name of a command at the very start of a message, and the name of the file after it.

    Args:
        commands: names of commands, with their descriptions.
        file_commands: commands that are followed by the name of an image or a video.
    """

    def __init__(self, commands: Mapping[str, str], file_commands: Sequence[str]):
        self._commands = commands
        self._file_commands = file_commands
        self._files = _FileCompleter()

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield the commands or files that start with the text before the cursor."""
        typed = document.text_before_cursor
        command, space, name = typed.partition(" ")
        if space and command in self._file_commands:
            yield from self._files.get_completions(Document(name), complete_event)
        elif typed.startswith("/"):
            for command, about in self._commands.items():
                if command.startswith(typed):
                    yield Completion(command, start_position=-len(typed), display_meta=about)


class _FileCompleter(Completer):
    """Completes the last of several file names, with a backslash before each space and a slash behind a folder.

    If all that was typed is the beginning of one name with plain spaces, that name is completed as it is.
    """

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True, file_filter=_is_folder_or_media)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield the files and folders whose names begin with what was typed."""
        typed = document.text_before_cursor
        last = typed[last_word_start(typed) :]
        names = list(self._complete(typed, complete_event)) if last != typed else []
        quote = quote_name if not names else str
        for name, display in names or self._complete(unescape(last), complete_event):
            yield Completion(quote(name), start_position=-len(typed if names else last), display=display)

    def _complete(self, beginning: str, event: CompleteEvent) -> Iterator[tuple[str, str]]:
        """Yield the names that have a beginning, and how they are shown."""
        for completion in self._paths.get_completions(Document(beginning), event):
            name = beginning + completion.text
            is_folder = os.path.isdir(os.path.expanduser(name))
            yield (f"{name}/" if is_folder else name), completion.display_text


def _is_folder_or_media(name: str) -> bool:
    return os.path.isdir(name) or media_kind(Path(name)) is not None


class _PrivateHistory(FileHistory):
    """A history file that ignores errors of reading and writing."""

    def load_history_strings(self) -> Iterable[str]:
        """Return the messages, latest first."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Append a message."""
        with contextlib.suppress(OSError):  # a full disk must not end the conversation
            super().store_string(_without_surrogates(string))


def _open_history(path: Path | None) -> History:
    """Open the history file, readable only by its owner; use memory if it cannot be written."""
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
            event.app.erase_when_done = True  # remove the message from the screen
            event.app.exit(result="")
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return bindings


def _continuation(width: int, line_number: int, wrap_count: int) -> StyleAndTextTuples:
    return [("class:prompt", CONTINUATION)]


def _output(stream: TextIO) -> Output:
    colours = ColorDepth.from_env()  # none with NO_COLOR
    output = Vt100_Output.from_pty(stream, term=os.environ.get("TERM"), default_color_depth=colours)
    # Do not query the cursor position: it warns about terminals that do not answer, and a late answer would become
    # part of the next message.
    output.enable_cpr = False
    return output


def _is_continued(line: str) -> bool:
    """Return whether a line ends in a single backslash."""
    return line.endswith("\\") and not line.endswith("\\\\")


def _without_surrogates(text: str) -> str:
    """Replace bytes that were not UTF-8 by question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
