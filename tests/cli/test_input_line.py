"""The line of input on pseudo-terminals: pasted text, files, history, editors, and what happens to the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.conftest import Spawn
from tests.screen import check_screens
from tests.terminal import ALT_ENTER, CONTROLLING_TERMINAL, CTRL_C, CTRL_D, ENTER, TAB, UP, Terminal

SCREENS = Path(__file__).parent / "screens"
WIDTHS = (40, 80, 200)
SLOW = ((), pytest.mark.slow)
CTRL_R, CTRL_X_CTRL_E, BACKSPACE, LEFT = "\x12", "\x18\x05", "\x7f", "\x1b[D"

LINE = (
    CONTROLLING_TERMINAL
    + """
import json, sys
from pathlib import Path
from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.input.completion import complete_files
from kimi_mlx.cli.chat.input.input_line import open_input_line

commands = [
    Command("/file", "FILE", "attach text files", print, complete=complete_files),
    Command("/files", "", "list files", print),
    Command("/set", "NAME", "change a setting", print, complete=lambda argument: ("temperature", "top_p", "top_k")),
]
for number in range(3):
    print(f"above {number}", flush=True)
with open_input_line(commands, Path(sys.argv[1])) as line:
    while True:
        try:
            read = line.read(toolbar=lambda width: "kimi-mini · 2 ranks"[:width])
        except EOFError:
            break
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            continue
        with open(sys.argv[2], "a") as file:
            print(json.dumps(read.text), file=file)
        print(f"read {len(read.text)}", flush=True)
"""
)

LOADING = (
    CONTROLLING_TERMINAL
    + """
import select, sys
from kimi_mlx.cli.chat.input.input_line import open_input_line

print("loading", flush=True)
select.select([sys.stdin], [], [])
with open_input_line([], None) as line:
    print("opened", flush=True)
    select.select([sys.stdin], [], [])
    print([line.read().text for _ in range(3)], flush=True)
"""
)


class InputLine:
    """A program that reads messages."""

    def __init__(self, spawn: Spawn, folder: Path, columns: int = 80, **environment: str):
        self._folder = folder
        self._columns = columns
        arguments = (str(folder / "history"), str(folder / "messages"))
        self.terminal: Terminal = spawn(LINE, *arguments, columns=columns, cwd=folder, **environment)
        self.terminal.expect("above 2\n")
        self.screen("kimi-mini")

    def screen(self, text: str = "") -> str:
        return self.terminal.screen(self._columns, text)

    def paste(self, text: str, is_marked: bool = True) -> None:
        self.terminal.send(f"\x1b[200~{text}\x1b[201~" if is_marked else text)

    def enter(self) -> str:
        """Press Enter; returns the message that was read."""
        num_messages = len(self.messages)
        self.terminal.send(ENTER)
        self.terminal.expect("read ")
        assert len(self.messages) == num_messages + 1
        return self.messages[-1]

    @property
    def messages(self) -> list[str]:
        file = self._folder / "messages"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def lines(count: int) -> str:
    return "".join(f"line {number}\r" for number in range(count))


def test_what_is_typed_before_and_while_the_line_opens_is_in_order(spawn: Spawn) -> None:
    terminal = spawn(LOADING)
    terminal.expect("loading")
    terminal.send("first" + ENTER + "sec")
    terminal.expect("opened")
    terminal.send("ond" + ENTER + "third" + ENTER)
    terminal.expect("['first', 'second', 'third']")


@pytest.mark.parametrize("columns", [pytest.param(width, marks=SLOW[width != 80]) for width in WIDTHS])
@pytest.mark.parametrize("is_marked", [True, False])
def test_a_line_longer_than_the_screen_leaves_it_readable(
    spawn: Spawn, tmp_path: Path, columns: int, is_marked: bool
) -> None:
    line = InputLine(spawn, tmp_path, columns)
    text = "a line that is longer than the screen " * 300
    line.paste(text + ("\r" if is_marked else ""), is_marked)
    screen = line.screen("[pasted 11,40")
    assert screen.startswith("above 0\nabove 1\nabove 2\n> [pasted 11,40")
    assert line.enter() == text + ("\n" if is_marked else "")


PASTES = [
    "x",
    "two words",
    "a\rb",
    "a\r\nb\r\n",
    "a\nb\n\n\nc\nd\ne\nf\ng\n",
    "\tcolumn\tcolumn\r\tcolumn",
    "漢字" * 700,
    "é🙂" * 100 + "\r",
    "a\x1b[31mred\x1b[0m b\rc",
    "zero\x00bell\x07 x\ry",
    "\r" * 50,
    "word " * 20_000,
    lines(20_000),
]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, *(pytest.param(width, marks=pytest.mark.sweep) for width in (40, 200))])
def test_any_text_can_be_pasted(spawn: Spawn, tmp_path: Path, columns: int) -> None:
    line = InputLine(spawn, tmp_path, columns)
    last = "above 2"
    for text in [*PASTES, "x" * 2_000_000 + "\r", "line of a text\r\n" * 130_000]:
        line.paste(text)
        assert last in "\n".join(line.screen().splitlines()[-24:])
        assert line.enter() == text.replace("\r\n", "\n").replace("\r", "\n")
        last = f"read {len(line.messages[-1])}"
        assert last in line.screen(last)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, *(pytest.param(width, marks=pytest.mark.sweep) for width in (40, 200))])
def test_any_text_of_several_lines_can_be_pasted_without_marks(spawn: Spawn, tmp_path: Path, columns: int) -> None:
    line = InputLine(spawn, tmp_path, columns)
    last = "above 2"
    for text in [*PASTES[2:7], PASTES[8], *PASTES[11:], "line of a text\r" * 130_000]:
        line.paste(text, is_marked=False)
        assert last in "\n".join(line.screen().splitlines()[-24:])
        assert line.enter() == text.replace("\r\n", "\n").replace("\r", "\n")
        last = f"read {len(line.messages[-1])}"
        assert last in line.screen(last)


@pytest.mark.slow
@settings(max_examples=1, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_characters="\x1b", exclude_categories=["Cs"])), min_size=60, max_size=60))
def test_random_texts_arrive_as_they_were(spawn: Spawn, tmp_path: Path, texts: list[str]) -> None:
    line = InputLine(spawn, tmp_path)
    for text in texts:
        line.paste(f"|{text}|")
        assert line.enter() == f"|{text}|".replace("\r\n", "\n").replace("\r", "\n")


def test_blocks_are_edited_around_and_deleted_as_one(spawn: Spawn, tmp_path: Path) -> None:
    line = InputLine(spawn, tmp_path)
    line.paste(lines(48))
    line.terminal.send(" compared with ")
    line.paste("x" * 3000)
    line.screen("> [pasted 48 lines] compared with [pasted 3,000 characters]")
    line.terminal.send(BACKSPACE + "nothing" + LEFT * 22 + "?")
    line.screen("> [pasted 48 lines]? compared with nothing")
    assert line.enter() == lines(48).replace("\r", "\n") + "? compared with nothing"


@pytest.mark.slow
def test_dropped_files_are_no_block(spawn: Spawn, tmp_path: Path) -> None:
    line = InputLine(spawn, tmp_path)
    names = [str(tmp_path / f"{'x' * 100}{end}.png") for end in (*range(19), "é")]  # one letter is in one row
    for name in names:
        Path(name).write_text("")
    line.paste(" ".join(names))
    line.screen("é")
    assert line.enter() == " ".join(names)


@pytest.mark.slow
def test_history_is_kept_across_runs_with_its_blocks(spawn: Spawn, tmp_path: Path) -> None:
    line = InputLine(spawn, tmp_path)
    line.terminal.send("first" + ALT_ENTER + "of two lines")
    line.enter()
    line.terminal.send("see ")
    line.paste(lines(48))
    message = line.enter()
    line.terminal.send(CTRL_D)
    assert line.terminal.wait() == 0
    line = InputLine(spawn, tmp_path)
    line.terminal.send(UP)
    line.screen("> see [pasted 48 lines]")
    assert line.enter() == message
    line.terminal.send(CTRL_R)
    line.screen("search:")
    line.terminal.send("of two")
    assert "search: of two" in line.screen("> first\n  of two lines")
    line.terminal.send(ENTER)
    line.screen("> first\n  of two lines\nkimi-mini")
    assert line.enter() == "first\nof two lines"
    line.terminal.send(CTRL_R + "f")
    line.screen("search: f")
    line.terminal.send(CTRL_R)
    line.screen("search: f")
    line.terminal.send(CTRL_C)
    line.screen(">\nkimi-mini")
    line.terminal.send("typed")
    assert line.enter() == "typed"


@pytest.mark.slow
def test_completion_of_commands_arguments_and_files(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "two words.txt").write_text("words")
    line = InputLine(spawn, tmp_path)
    for typed, completed in (
        ("/fi" + TAB, "> /file"),
        ("/set te" + TAB, "> /set temperature"),
        ("/file no" + TAB, "> /file notes.md"),
        ("see @two" + TAB, "> see @two\\ words.txt"),
    ):
        line.terminal.send(typed[:-1])
        line.screen(typed[:-1])
        line.terminal.send(TAB)
        line.screen(completed)
        line.terminal.send(CTRL_C)
        line.screen()


@pytest.mark.slow
def test_menu_of_completions(spawn: Spawn, tmp_path: Path) -> None:
    screens: dict[str, str] = {}
    for columns in WIDTHS:
        line = InputLine(spawn, tmp_path, columns)
        line.terminal.send("/set t")
        line.screen("/set t")
        line.terminal.send(TAB)
        screens[f"{columns} columns"] = line.screen("top_k")
        line.terminal.send(TAB * 2 + ENTER)  # takes it, and does not send the message
        line.screen("> /set top_p\n")
    check_screens(SCREENS, "completion", screens)


@pytest.mark.slow
def test_a_long_message_scrolls_in_half_of_the_screen(spawn: Spawn, tmp_path: Path) -> None:
    screens: dict[str, str] = {}
    for columns in WIDTHS[:2]:
        line = InputLine(spawn, tmp_path, columns)
        words = [f"word-{number} of a typed line 漢字 🙂" for number in range(columns // 2)]
        for start in range(0, len(words), 10):
            line.paste("".join(f"{word} " for word in words[start : start + 10]))
        screens[f"{columns} columns, while it is edited"] = line.screen(words[-1].split()[0])
        assert line.enter() == " ".join(words) + " "
        screens[f"{columns} columns, sent"] = line.screen("read")
    check_screens(SCREENS, "long_message", screens)


def test_an_editor_gets_the_draft_and_gives_it_back(spawn: Spawn, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\ntest -t 0 && stty -a | grep -q " echo" && echo "edited" >> "$1"; exit $(cat code)\n')
    editor.chmod(0o700)
    (tmp_path / "code").write_text("0")
    line = InputLine(spawn, tmp_path, EDITOR="./editor")  # a message with a long path would be in several rows
    line.terminal.send("a draft ")
    line.paste(lines(48))
    line.terminal.send(CTRL_X_CTRL_E)
    line.screen("> a draft [pasted 48 lines]edited")
    (tmp_path / "code").write_text("3")
    line.terminal.send(CTRL_X_CTRL_E)
    screen = line.screen("exit code 3")
    assert "> a draft [pasted 48 lines]edited" in screen
    assert line.enter() == "a draft " + lines(48).replace("\r", "\n") + "edited"


def test_keys_of_vi(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "inputrc").write_text("# vi\nset editing-mode vi\n")
    line = InputLine(spawn, tmp_path, INPUTRC=str(tmp_path / "inputrc"))
    line.terminal.send("one two")
    line.screen("one two")
    line.terminal.send("\x1b")
    line.screen()
    line.terminal.send("bcwthree")
    line.screen("> one three")
    assert line.enter() == "one three"


def test_shift_enter_as_csi_u_begins_a_line(spawn: Spawn, tmp_path: Path) -> None:
    line = InputLine(spawn, tmp_path)
    line.terminal.send("one\x1b[13;2utwo\x1b[27;2;13~three")
    line.screen("> one\n  two\n  three")
    assert line.enter() == "one\ntwo\nthree"


def test_a_new_size_while_typing(spawn: Spawn, tmp_path: Path) -> None:
    line = InputLine(spawn, tmp_path, XTERM_VERSION="a terminal that does not wrap its rows again")
    line.terminal.send("some words that do not fit into forty columns")
    line.screen("forty columns")
    line.terminal.resize(40)
    line.terminal.send("!")
    screen = line.terminal.screen(40, "columns!")
    assert "> some words that do not fit into forty" in screen
    assert line.enter() == "some words that do not fit into forty columns!"


@pytest.mark.slow
def test_the_terminal_is_left_as_it_was(spawn: Spawn, tmp_path: Path) -> None:
    line = InputLine(spawn, tmp_path)
    line.terminal.send("never sent")
    line.screen("never sent")
    line.terminal.send(CTRL_C)
    line.screen("read 0")  # the message is cleared
    line.terminal.send(CTRL_C)
    line.screen("interrupted")
    line.terminal.send(CTRL_D)
    assert line.terminal.wait() == 0
    assert line.terminal.has_old_modes()
    assert "never sent" not in line.screen()
    modes = re.findall(rb"\x1b\[\?2004([hl])", line.terminal.raw)
    assert modes[-1] == b"l"


def test_a_dumb_terminal_has_plain_lines(spawn: Spawn, tmp_path: Path) -> None:
    terminal = spawn(LINE, str(tmp_path / "history"), str(tmp_path / "messages"), TERM="dumb")
    terminal.expect("> ")
    terminal.send("x" * 3000 + "\\\nmore\n")
    terminal.expect("read 3005")
    terminal.send(CTRL_D)
    assert terminal.wait() == 0
    assert b"\x1b" not in terminal.raw
