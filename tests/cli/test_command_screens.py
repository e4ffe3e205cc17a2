"""What the commands of a chat show, at three widths: screens that are kept as text in `screens/`.

After a change of the commands, run this file with WRITE_SCREENS=1 and read what changed in the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

import pytest
from rich.console import ConsoleDimensions

from kimi_mlx.cli.chat.commands.status_commands import describe_model, describe_plan
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.repl import Repl
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.model_size import model_shape
from kimi_mlx.cli.output import stderr
from kimi_mlx.planner.choice import Choice, memory_of
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.session.chat_model import ChatOptions
from kimi_mlx.session.model_status import ModelStatus, RankStatus, Restart
from tests.fakes import conversation_of
from tests.screen import Screen, check_screens

SCREENS = Path(__file__).parent / "screens"
WIDTHS = (40, 80, 200)
STATUS = ModelStatus(
    *("kimi-k2", 131072, "hybrid", "ring", "hybrid on 2 ranks: mac-a.local, mac-b.local"),
    ranks=[
        RankStatus(0, "mac-a.local", "50% of each expert", {}, False, 289 * 10**9, 10**9, free_bytes=10**11),
        RankStatus(1, "mac-b.local", "50% of each expert", {}, False, 289 * 10**9, 10**9, free_bytes=10**11),
    ],
    cached_tokens=3000,
    restarts=[Restart(0.0, "rank 1 (`mac-b.local`) does not answer", 12.0)],
    uptime_s=7300.0,
    versions={"kimi-mlx": "0.3.0", "mlx": "0.32.4"},
)


@contextmanager
def terminal(columns: int) -> Iterator[Screen]:
    """Show what is printed on stderr on a screen."""
    screen = Screen(columns, 60)
    stderr.file, stderr.size = cast(TextIO, screen), ConsoleDimensions(columns, 60)
    try:
        yield screen
    finally:
        stderr._file = stderr._width = stderr._height = None  # pyright: ignore[reportPrivateUsage]


def type_all(columns: int, *lines: str) -> str:
    conversation = conversation_of("yes")
    conversation.options = ChatOptions(sampling={"temperature": 0.2})
    repl = Repl(ReplState(conversation, {"temperature": "config.toml"}))
    with terminal(columns) as screen:
        for line in lines:
            screen.write(f"> {line}\n")
            repl.handle(UserInput(line))
    return screen.text


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("help", ("/help",)),
        ("help_of_one", ("/help set", "/help keys", "/help sett")),
        ("settings", ("/set top_p 0.9", "/set", "/set temperature 3", "/set temprature 1", "/temperature 1")),
        ("system", ("/system", "/system Be brief.", "/system", "/thinking off", "/thinking maybe", "/stats")),
    ],
)
def test_screens_of_commands(name: str, lines: tuple[str, ...]) -> None:
    check_screens(SCREENS, f"command_{name}", {f"{width} columns": type_all(width, *lines) for width in WIDTHS})


def test_the_help_fits_a_terminal_of_24_lines() -> None:
    assert len(type_all(80, "/help").splitlines()) <= 22  # below it, the prompt and the status line


def test_screens_of_a_model_on_two_macs() -> None:
    memory = memory_of("hybrid", model_shape("kimi-k2"), parse_machines("m3-ultra-512x2"))
    plan = Choice("hybrid", "RDMA at 0.03 ms per message: 21.4 tok/s predicted, pipeline 14.2", memory)
    screens: dict[str, str] = {}
    for width in WIDTHS:
        with terminal(width) as screen:
            stderr.print(describe_model(STATUS, 12288, width), soft_wrap=False)
            screen.write("\n")
            stderr.print(describe_plan(plan, None, width), soft_wrap=False)
        screens[f"{width} columns"] = screen.text
    check_screens(SCREENS, "command_model", screens)
