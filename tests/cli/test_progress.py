"""What a terminal shows of work that takes long: it appears, says what and how far, and is gone at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Spawn
from tests.terminal import Terminal

pyte = pytest.importorskip("pyte")

NO_ECHO = """
import termios
modes = termios.tcgetattr(0)
modes[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, modes)
"""
OUTPUT = NO_ECHO + "import time\nfrom kimi_mlx.cli import output\noutput.PROGRESS_AFTER_S = 0.1\n"
STATUS = (
    OUTPUT + "with output.slow_status() as set_status:\n"
    "    set_status('contacting [mac-a], ' + 60 * 'mac-b ')\n    time.sleep(0.5)\n    input()\nprint('over')"
)
LOADING = (
    OUTPUT + "with output.load_progress(['mac-a: loading kimi-k2', 'mac-b: loading kimi-k2']) as update:\n"
    "    update(12, 61, 0)\n    time.sleep(0.5)\n    input()\n"
    "    update(61, 61, 0)\n    time.sleep(0.5)\n    input()\nprint('over')"
)
CLOSING = (
    OUTPUT + "class Slow:\n    def close(self): time.sleep(0.5); input()\n"
    "with output.closing_with_status(Slow()): pass\nprint('over')"
)
SLOW_IMPORT = """
import sys, time
from kimi_mlx.cli import standard_streams, start_status
start_status.AFTER_S = 0.2
standard_streams.repair_standard_streams()
start_status.START_LINE.watch()
import slow_module
print('over')
"""


def screen(terminal: Terminal, columns: int) -> list[str]:
    """Lines that are on the screen now, without the empty ones."""
    display = pyte.Screen(columns, 24)
    pyte.ByteStream(display).feed(terminal.raw)
    return [line.rstrip() for line in display.display if line.strip()]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_status_is_one_line_and_is_gone_at_the_end(spawn: Spawn, columns: int) -> None:
    terminal = spawn(STATUS, columns=columns, COLUMNS=str(columns))
    terminal.expect("contacting [mac-a], mac-b")
    terminal.expect("0:00:00")
    assert len(screen(terminal, columns)) == 1
    terminal.send("\r")
    terminal.expect("over")
    assert terminal.wait() == 0
    assert screen(terminal, columns)[-1] == "over"
    assert "contacting" not in "\n".join(screen(terminal, columns))


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_loading_shows_each_host(spawn: Spawn, columns: int) -> None:
    terminal = spawn(LOADING, columns=columns, COLUMNS=str(columns))
    terminal.expect("12/61 layers")
    first, second = screen(terminal, columns)
    assert "mac-a" in first
    assert "12/61 layers" in first
    assert "mac-b" in second
    assert "starting" in second
    terminal.send("\r")
    terminal.expect("preparing")
    terminal.send("\r")
    terminal.expect("over")
    assert terminal.wait() == 0
    assert screen(terminal, columns)[-1] == "over"
    assert "mac-a" not in "\n".join(screen(terminal, columns))


def test_the_end_of_ranks_shows_a_status(spawn: Spawn) -> None:
    terminal = spawn(CLOSING)
    terminal.expect("ending and releasing memory")
    terminal.send("\r")
    terminal.expect("over")
    assert terminal.wait() == 0


@pytest.mark.parametrize(("columns", "text"), [(100, "starting: loading libraries, "), (5, "star")])
def test_a_slow_import_shows_that_the_program_is_starting(
    spawn: Spawn, tmp_path: Path, columns: int, text: str
) -> None:
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(1)\n")
    terminal = spawn(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SLOW_IMPORT}", columns=columns)
    terminal.expect(text)
    terminal.expect("over")
    assert terminal.wait() == 0
    assert screen(terminal, columns) == ["over"]


def test_a_quick_import_shows_nothing(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("")
    terminal = spawn(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SLOW_IMPORT}time.sleep(0.5)")
    assert terminal.wait() == 0
    assert "starting" not in terminal.text
