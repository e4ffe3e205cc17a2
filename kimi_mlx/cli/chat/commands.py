"""Commands and keys of a conversation in the terminal: their help, and suggestions for a misspelled command."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rich.table import Table

from kimi_mlx.errors import UsageError

KEYS = {
    "Enter": "send the message",
    "Alt-Enter, Ctrl-J": "start a new line; so does a backslash at the end of a line",
    "Ctrl-C": "stop the answer, or clear the message; twice on an empty line: exit",
    "Ctrl-D": "exit",
    "Up, Down, Ctrl-R": "previous messages, search them",
    "Tab": "complete a command, or a file name after /image",
    "//text": "send a message that starts with a slash",
}
FILE_COMMANDS = ("/image", "/video")
"""Commands whose argument is the name of a file."""


@dataclass(frozen=True)
class Command:
    """A command of the conversation.

    Attributes:
        name: name with its slash.
        argument: placeholder of the argument in the help; empty for none.
        about: description in the help.
        run: function that receives the text after the name.
    """

    name: str
    argument: str
    about: str
    run: Callable[[str], None]


def find_command(commands: Mapping[str, Command], name: str) -> Command:
    """Return the command with a name.

    Raises:
        UsageError: there is none; the hint has similar names.
    """
    if name in commands:
        return commands[name]
    similar = difflib.get_close_matches(name, commands, n=2, cutoff=0.6)
    suggestion = " or ".join(f"`{candidate}`" for candidate in similar) or "`/help`"
    raise UsageError(
        f"there is no command `{name}`",
        hint=f"try {suggestion}; to send a message that starts with /, type //",
    )


def help_table(commands: Iterable[Command]) -> Table:
    """Return the help: a table of the commands, then of the keys."""
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for command in commands:
        table.add_row(f"{command.name} {command.argument}".rstrip(), command.about)
    table.add_row()
    for key, about in KEYS.items():
        table.add_row(key, about)
    return table
