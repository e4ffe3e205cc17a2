#!/usr/bin/env python3
"""Record a chat with kimi-mini on a real pseudo-terminal, and write it as docs/terminal.svg.

scripts/record_terminal.py            write docs/terminal.svg
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "terminal.svg"
COLUMNS, ROWS = 90, 40
QUESTIONS = ("What are you?", "What is 47 + 38?", "Section 7 has code 4821. What is the code of section 7?")
ANSWER_LIMIT_S = 60.0
QUIET_S = 1.0
"""An answer is complete when nothing was written for this long."""

FOREIGN = re.compile(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", re.DOTALL)
"""Fonts that a browser would fetch from another host; the system's monospace font does as well."""

COMMAND = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from kimi_mlx.cli.app import main; main()"


def record() -> str:
    """Return what a terminal receives while a user asks the questions, escape sequences included."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    variables = {
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm-256color",
        "COLUMNS": str(COLUMNS),
        "COLORTERM": "",
        "NO_COLOR": "",
    }
    command = [sys.executable, "-c", COMMAND, "chat", "kimi-mini", "--temperature", "0", "--no-log"]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env={**os.environ, **variables}
    )
    output = read_until_quiet(master)
    for question in QUESTIONS:
        os.write(master, question.encode() + b"\r")
        output += read_until_quiet(master)
    os.write(master, b"\x04")
    process.wait(ANSWER_LIMIT_S)
    return output.decode(errors="replace")


def read_until_quiet(master: int) -> bytes:
    """Return what is written until the program waits for input."""
    output, deadline = b"", time.monotonic() + ANSWER_LIMIT_S
    while time.monotonic() < deadline:
        if select.select([master], [], [], QUIET_S)[0]:
            output += os.read(master, 65536)
            if b"\x1b[6n" in output[-64:]:  # the program asks where the cursor is
                os.write(master, b"\x1b[1;1R")
        elif output:
            return output
    raise TimeoutError("the chat is not ready")


def draw(output: str) -> list[Text]:
    """Return the lines that a terminal shows after it has received the output."""
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.Stream(screen).feed(output.replace("\x1b[2m", "\x1b[90m"))  # pyte does not know dim text: grey here
    lines: list[Text] = []
    for row in range(ROWS):
        line = Text()
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            line.append(cell.data, style_of(cell))
        line.rstrip()
        lines.append(line)
    prompt = max(number for number, line in enumerate(lines) if line.plain.startswith(">"))
    lines = lines[:prompt]  # the last prompt is empty, and the speed below it is another one in each run
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def style_of(cell: pyte.screens.Char) -> str:
    """Return the style of a cell in Rich's words."""
    colour = {"brown": "yellow", "brightblack": "bright_black"}.get(cell.fg, cell.fg)
    return " ".join(filter(None, ["bold" if cell.bold else "", "" if colour == "default" else colour]))


def main() -> None:
    """Write the picture."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ kimi-mlx chat kimi-mini"))
    for line in draw(record()):
        console.print(line)
    picture = console.export_svg(title="kimi-mlx chat", theme=MONOKAI, unique_id="chat")
    PICTURE.write_text(FOREIGN.sub("", picture), encoding="utf-8")


if __name__ == "__main__":
    main()
