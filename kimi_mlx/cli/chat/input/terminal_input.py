"""Keys from the terminal, with pasted text as one key even if the terminal does not mark it."""

from __future__ import annotations

import re
import select

from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys

from kimi_mlx.cli.chat.input.terminal_modes import BEGIN_PASTE, END_PASTE

CHUNK_BYTES = 65536
CTRL_C = "\x03"
LONG = 256
"""Number of characters that come at once only if they are pasted."""

PAUSE_S = 0.03
"""Pause that ends a pasted text whose end the terminal does not mark."""

_UNFINISHED_KEY = re.compile(r"\x1b(\[[0-9;]*)?\Z")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # which no key sends
_LINE_END_OR_TAB = re.compile(r"[\r\n\t]")
_LINES_OR_COLUMNS = re.compile(r"[^\r\n\t][\r\n\t]+[^\r\n\t]")
_MODIFIERS = {2: "shift", 3: "alt", 5: "ctrl", 6: "ctrl-shift"}


def add_csi_u_keys() -> None:
    """Make prompt_toolkit know keys in the form `CSI code ; modifiers u`, which kitty, iTerm2 and tmux can send.

    Source: https://sw.kovidgoyal.net/kitty/keyboard-protocol/; `CSI 27 ; modifiers ; code ~` is xterm's form.
    """
    for modifier in _MODIFIERS:  # Enter with any of them starts a new line
        for sequence in (f"\x1b[13;{modifier}u", f"\x1b[27;{modifier};13~"):
            ANSI_SEQUENCES[sequence] = Keys.ControlJ
    for code in range(ord("a"), ord("z") + 1):
        control = Keys(f"c-{chr(code)}")
        for sequence in (f"\x1b[{code};5u", f"\x1b[27;5;{code}~"):
            ANSI_SEQUENCES[sequence] = control
    for code, key in ((27, Keys.Escape), (9, Keys.ControlI), (13, Keys.ControlM), (127, Keys.Backspace)):
        ANSI_SEQUENCES[f"\x1b[{code}u"] = key
    ANSI_SEQUENCES["\x1b[9;2u"] = Keys.BackTab


class TerminalInput(Vt100Input):
    """Keys from the terminal.

    A terminal without bracketed paste sends pasted text like keys that are pressed very quickly: each line end would
    send a message. Text that comes faster than anybody types is taken as pasted.
    """

    _has_unfinished_key = False

    def store_typed_ahead(self, data: bytes) -> None:
        """Keep what was typed before the prompt as keys for it: there, each Enter sends a message."""
        self._feed(data.decode(errors="surrogateescape"))
        store_typeahead(self, self._take_keys())

    def read_keys(self) -> list[KeyPress]:
        """Return the keys that were pressed since the last call."""
        data = self._read()
        if data == CTRL_C and self._is_in_paste():  # the end of the paste was lost
            data = END_PASTE + CTRL_C
        if not self._has_unfinished_key and not self._is_in_paste() and _may_be_pasted(data):
            while self._is_readable(PAUSE_S) and (more := self._read()):
                data += more
            data = _mark_pasted(data)
        self._feed(data)
        return self._take_keys()

    def _feed(self, data: str) -> None:
        self.vt100_parser.feed(data)
        self._has_unfinished_key = _UNFINISHED_KEY.search(data) is not None

    def _read(self) -> str:
        return self.stdin_reader.read(CHUNK_BYTES)

    def _is_readable(self, timeout_s: float) -> bool:
        return bool(select.select([self.fileno()], [], [], timeout_s)[0])

    def _is_in_paste(self) -> bool:
        return self.vt100_parser._in_bracketed_paste  # pyright: ignore[reportPrivateUsage]

    def _take_keys(self) -> list[KeyPress]:
        keys, self._buffer = self._buffer, []
        return keys


def _may_be_pasted(data: str) -> bool:
    """Return whether data may be the beginning of a pasted text: more characters than one key sends."""
    return len(data) > 1 and not data.startswith("\x1b") and (len(data) >= LONG or bool(_LINE_END_OR_TAB.search(data)))


def _mark_pasted(data: str) -> str:
    """Return data that came at once with the marks of pasted text, if it was pasted and has none.

    A line end after a single line stays outside: it is the same as Enter, which sends the message.
    """
    is_long, has_lines = len(data) >= LONG, _LINES_OR_COLUMNS.search(data) is not None
    num_keys = sum(not character.isprintable() and character not in "\t\r\n" for character in data[:LONG])
    is_typed = num_keys > (LONG / 2 if is_long else 0)  # such as Backspace over a slow connection
    is_typed = is_typed and not _COLOUR.search(data)
    if BEGIN_PASTE in data or is_typed or not (is_long or has_lines):
        return data
    text = data if has_lines else data.rstrip("\r\n")
    return f"{BEGIN_PASTE}{text}{END_PASTE}{data[len(text) :]}"
