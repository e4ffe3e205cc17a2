"""The whole chat on a real terminal at three widths, and a window that is resized in the middle of an answer."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Spawn
from tests.screen import Screen, check_screens
from tests.terminal import CONTROLLING_TERMINAL, CTRL_D, ENTER, ROOT

SCREENS = Path(__file__).parent / "screens"
ANSWER = "Two things:\\n\\n1. **bold** text that is longer than the narrowest of the three screens\\n2. `code`\\n"
CHAT = (
    CONTROLLING_TERMINAL
    + """
from kimi_mlx.cli.chat.repl import run_repl
from kimi_mlx.cli.chat.repl_state import ReplState
from tests.fakes import conversation_of
run_repl(ReplState(conversation_of({answer})))
"""
)
IN_COLOUR = {"TERM": "xterm-256color", "NO_COLOR": "", "COLORTERM": ""}


@pytest.mark.slow
def test_a_chat_at_three_widths(spawn: Spawn) -> None:
    screens: dict[str, str] = {}
    for columns in (40, 80, 200):
        terminal = spawn(CHAT.format(answer=f"'{ANSWER}', 'I think so.'"), columns=columns, **IN_COLOUR)
        terminal.expect("> ")
        terminal.send("hello" + ENTER)
        terminal.expect("code")
        terminal.expect("> ")
        terminal.expect("tok/s")
        screen = Screen(columns)
        screen.write(terminal.raw.decode().replace("\r\n", "\n"))
        screens[f"{columns} columns"] = screen.text
        terminal.send(CTRL_D)
        assert terminal.wait() == 0
        assert terminal.has_old_modes()
    check_screens(SCREENS, "chat", screens)


class Window:
    """A window of tmux, which wraps rows again when it becomes narrower.

    Args:
        folder: folder of its socket.
        command: program that runs in it.
    """

    def __init__(self, folder: Path, command: list[str]):
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        variables = ["env", "NO_COLOR=", "COLORTERM=", "TERM=tmux", f"PYTHONPATH={ROOT}", f"XDG_STATE_HOME={folder}"]
        self._run("new-session", "-d", "-x", "80", "-y", "24", *variables, *command)

    def _run(self, *arguments: str) -> str:
        return subprocess.run([*self._tmux, *arguments], check=True, capture_output=True, text=True, timeout=10).stdout

    @property
    def text(self) -> str:
        """The scrollback and the screen."""
        return self._run("capture-pane", "-p", "-S", "-")

    def send(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def resize(self, columns: int, lines: int) -> None:
        self._run("resize-window", "-x", str(columns), "-y", str(lines))

    def wait_for(self, is_there: Callable[[str], bool]) -> str:
        """Wait until the text is as it should be."""
        deadline = time.monotonic() + 30
        while not is_there(text := self.text):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        return text

    @property
    def has_cursor(self) -> bool:
        return self._run("display-message", "-p", "#{cursor_flag}").strip() == "1"

    def close(self) -> None:
        self._run("kill-server")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_a_window_that_is_resized_keeps_no_old_rows(tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(50))
    # the screen is full: rows that tmux pushes off the top of a new one cannot be erased
    code = f"print('filler\\n' * 30)\n{CHAT.partition('termios.TIOCSCTTY, 0)')[2]}".format(
        answer=f"'{words} end', '{words}', pause_s=0.02"
    )
    window = Window(tmp_path, [sys.executable, "-c", code])
    try:
        window.wait_for(lambda text: "\n>" in text)
        window.send("hello", "Enter")
        window.wait_for(lambda text: "thinking" in text)
        for columns, lines in ((50, 24), (100, 24), (40, 20), (80, 30), (40, 24)):
            window.resize(columns, lines)
            time.sleep(0.7)
        text = window.wait_for(lambda text: " end" in text and text.rstrip().endswith("tok/s"))
    finally:
        window.close()
    answer = text.partition("thought for")[2]
    assert text.count("thinking") == 0
    assert text.count("answering") == 0
    assert [answer.count(f"word{number} ") + answer.count(f"word{number}\n") for number in range(50)] == [1] * 50


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_an_answer_is_suspended_and_continued(tmp_path: Path) -> None:
    code = CHAT.partition("termios.TIOCSCTTY, 0)")[2].format(answer=f"'{'word ' * 100} end', pause_s=0.05")
    (tmp_path / "chat.py").write_text(code)
    window = Window(tmp_path, ["bash", "--norc"])
    try:
        window.send(f"PS1='shell: '; {sys.executable} {tmp_path}/chat.py", "Enter")
        window.wait_for(lambda text: "\n>" in text)
        window.send("hello", "Enter")
        window.wait_for(lambda text: "answering" in text)
        assert not window.has_cursor
        window.send("C-z")
        text = window.wait_for(lambda text: text.rstrip().endswith("shell:"))
        assert "answering" not in text
        assert window.has_cursor
        window.send("fg", "Enter")
        text = window.wait_for(lambda text: " end" in text and "tok/s" in text)
    finally:
        window.close()
    assert text.partition("fg")[2].count("word") == 100
