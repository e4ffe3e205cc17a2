"""Keys from a terminal: pasted text without marks, text typed ahead, and keys in the form CSI u."""

from __future__ import annotations

import os
import pty
import threading
import tty
from collections.abc import Iterator

import pytest
from prompt_toolkit.input.typeahead import get_typeahead
from prompt_toolkit.keys import Keys

from kimi_mlx.cli.chat.input.terminal_input import TerminalInput, add_csi_u_keys


class Keyboard:
    """A terminal whose keys are read by TerminalInput."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        tty.setraw(slave)
        self._slave = open(slave)  # noqa: SIM115
        self.input = TerminalInput(self._slave)

    def press(self, data: str) -> list[tuple[str, str]]:
        """Keys, with the text of those that have one."""
        thread = threading.Thread(target=self._write, args=(data.encode(),))
        thread.start()
        keys = []
        while thread.is_alive() or self.input._is_readable(0.0):  # pyright: ignore[reportPrivateUsage]
            keys += self.input.read_keys()
        return [(str(getattr(key.key, "value", key.key)), key.data) for key in keys]

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._master, data) :]

    def close(self) -> None:
        self._slave.close()
        os.close(self._master)


@pytest.fixture
def keyboard() -> Iterator[Keyboard]:
    keyboard = Keyboard()
    keyboard._write(b"x")  # pyright: ignore[reportPrivateUsage]
    keyboard.input.read_keys()
    yield keyboard
    keyboard.close()


PASTE = Keys.BracketedPaste.value


@pytest.mark.parametrize("text", ["a\rb", "a\nb\n", "\ta\tb", "x" * 3000, "漢字 " * 5000, "\x1b[1mbold\x1b[0m " * 30])
@pytest.mark.parametrize("is_marked", [True, False])
def test_pasted_text_is_one_key(keyboard: Keyboard, text: str, is_marked: bool) -> None:
    text = text if is_marked or not text.startswith("\x1b") else f"x{text}"
    data = f"\x1b[200~{text}\x1b[201~" if is_marked else text
    assert keyboard.press(data) == [(PASTE, text)]


def test_enter_behind_a_long_line_is_a_key(keyboard: Keyboard) -> None:
    assert keyboard.press("x" * 3000 + "\r") == [(PASTE, "x" * 3000), ("c-m", "\r")]


@pytest.mark.parametrize(
    "data", ["one\x1b\rtwo\r", "hello\r", "/sy\t", "ab", "a", "\r", "\x7f" * 300, "\x1b[A" * 100, "\x03", "é\r"]
)
def test_keys_are_keys(keyboard: Keyboard, data: str) -> None:
    assert PASTE not in [key for key, _ in keyboard.press(data)]


def test_ctrl_c_ends_a_paste_whose_end_was_lost(keyboard: Keyboard) -> None:
    assert keyboard.press("\x1b[200~never ended") == []
    assert keyboard.press("\x03") == [(PASTE, "never ended"), ("c-c", "\x03")]


def test_text_typed_ahead_is_keys(keyboard: Keyboard) -> None:
    keyboard.input.store_typed_ahead(b"one\rtwo\r\x1b[200~a\rb\x1b[201~")
    keys = get_typeahead(keyboard.input)
    assert "".join(key.data for key in keys[:-1]) == "one\rtwo\r"
    assert (keys[-1].key, keys[-1].data) == (Keys.BracketedPaste, "a\rb")


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("\x1b[13;2u", "c-j"),
        ("\x1b[27;2;13~", "c-j"),
        ("\x1b[13;3u", "c-j"),
        ("\x1b[99;5u", "c-c"),
        ("\x1b[114;5u", "c-r"),
        ("\x1b[27;5;100~", "c-d"),
        ("\x1b[27u", "escape"),
        ("\x1b[13u", "c-m"),
        ("\x1b[127u", "c-h"),
    ],
)
def test_keys_in_the_form_csi_u(keyboard: Keyboard, data: str, key: str) -> None:
    add_csi_u_keys()
    assert [name for name, _ in keyboard.press(data)] == [key]
