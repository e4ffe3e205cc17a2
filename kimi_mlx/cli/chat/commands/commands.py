"""Commands of a conversation in the terminal: their names, their help, and suggestions for a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kimi_mlx.errors import UsageError

KEYS = {
    "Enter": "send the message",
    "Alt-Enter, Ctrl-J": "start a new line; so do Shift-Enter, where the terminal sends it, and \\ at the end",
    "Ctrl-C": "stop the answer, or clear the message; twice on an empty line: exit",
    "Ctrl-D": "exit",
    "Up, Down, Ctrl-R": "previous messages, search them",
    "Ctrl-X Ctrl-E": "edit the message in your text editor",
    "Tab": "complete a command, its argument, or a file after @",
    "@file": "attach a file: a text, or an image if the model sees them",
    "//text": "send a message that starts with a slash",
}
CommandGroup = Literal["Conversation", "Message", "Model", "Program"]
"""Heading of a command in the help."""

LEFT: Sequence[CommandGroup] = ("Conversation", "Program")
RIGHT: Sequence[CommandGroup] = ("Message", "Model")
"""Columns of the help."""

TWO_COLUMNS = 76
"""Width from which the help has two columns."""

ABOUT_CHARS = 28
"""Maximum length of a command's description, so that two columns fit 80 characters."""

ELSEWHERE = {
    "/read": "/file",
    "/attach": "/file",
    "/add": "/file",
    "/show": "/model",
    "/status": "/model",
    "/context": "/model",
    "/cost": "/stats",
    "/usage": "/stats",
    "/regen": "/retry",
    "/rewind": "/undo",
    "/mcp": "/tools",
    "/config": "/set",
    "/think": "/thinking on",
    "/nothink": "/thinking off",
    "/no_think": "/thinking off",
    "/temperature": "/set temperature",
    "/seed": "/set seed",
    "/copy": "/export",
    "/multiline": "/help keys",
}
"""Commands of other tools (ollama, llama-cli, llm, Claude Code), and those that do the same here."""


@dataclass(frozen=True)
class Command:
    """A command of the conversation.

    Args:
        name: name with its slash.
        argument: placeholder of the argument; empty for none.
        about: description in the list of all commands, of at most ABOUT_CHARS characters.
        run: function that receives the text after the name, without spaces around it.
        group: heading in the list of all commands.
        details: additional lines of `/help NAME`.
        complete: function that receives the argument so far and returns what its last word may be completed to.
        other_names: names that users of other tools type, which mean the same.
        hint: what to type instead of an argument, for a command that takes none.
    """

    name: str
    argument: str
    about: str
    run: Callable[[str], None]
    group: CommandGroup = "Program"
    details: str = ""
    complete: Callable[[str], Iterable[str]] | None = None
    other_names: Sequence[str] = ()
    hint: str = ""

    def call(self, argument: str) -> None:
        """Run the command.

        Raises:
            UsageError: the command takes no argument, and there is one.
            KimiMlxError: the command failed.
        """
        if argument and not self.argument:
            raise UsageError(f"`{self.name}` takes no argument", hint=self.hint or f"type `{self.name}` alone")
        self.run(argument)


class CommandList:
    """All commands of a conversation, by name.

    Args:
        commands: the commands; their names differ.
    """

    def __init__(self, commands: Iterable[Command]):
        self._commands = {command.name: command for command in commands}
        self._by_any_name = {name: command for command in self for name in (command.name, *command.other_names)}

    def __iter__(self) -> Iterator[Command]:
        """Yield the commands."""
        return iter(self._commands.values())

    def __contains__(self, name: object) -> bool:
        """Return whether a name, or another one that users type, is that of a command."""
        return isinstance(name, str) and name.lower() in self._by_any_name

    def find(self, name: str) -> Command:
        """Return the command with a name, in small or capital letters.

        Raises:
            UsageError: there is none; the hint has similar names.
        """
        typed, name = name, name.lower()
        if name in self._by_any_name:
            return self._by_any_name[name]
        similar = [other for other in self._commands if len(name) > 1 and other.startswith(name)]
        similar += difflib.get_close_matches(name, self._by_any_name, n=3, cutoff=0.6)
        names = list(dict.fromkeys(self._by_any_name[candidate].name for candidate in similar))[:2]
        if name in ELSEWHERE:
            names = [ELSEWHERE[name]]
        suggestion = " or ".join(f"`{candidate}`" for candidate in names) or "`/help`"
        raise UsageError(
            f"there is no command `{typed}`",
            hint=f"try {suggestion}; to send a message that starts with /, type //",
        )

    def overview(self, width: int) -> RenderableType:
        """Return the help of all commands.

        Args:
            width: width of the terminal; a narrow one has one column.
        """
        left, right = (self._groups(groups) for groups in (LEFT, RIGHT))
        rows = list(zip_longest(left, right)) if width >= TWO_COLUMNS else [(row, None) for row in (*left, *right)]
        name_width = max(len(command.name) for command in self)
        table = Table.grid(padding=(0, 1))
        for _ in range(2 if width >= TWO_COLUMNS else 1):
            table.add_column(min_width=name_width, no_wrap=True)
            table.add_column(overflow="fold")
        for pair in rows:
            table.add_row(*(cell for row in pair for cell in row or ("", "")))
        footer = "/help COMMAND: more about one. /help keys: the keys. //text: send /text."
        return Group(table, Text(footer, style="dim"))

    def _groups(self, groups: Sequence[CommandGroup]) -> list[tuple[Text, str]]:
        """Return the lines of a column: headings, names and descriptions."""
        lines: list[tuple[Text, str]] = []
        for group in groups:
            commands = [command for command in self if command.group == group]
            lines += [(Text(group, style="bold"), "")] if commands else []
            lines += [(Text(command.name), command.about) for command in commands]
        return lines


def describe_command(command: Command) -> RenderableType:
    """Return the help of one command: its usage, its description, its details, and its other names."""
    lines = [Text(f"{command.name} {command.argument}".rstrip(), style="bold"), Text(command.about)]
    lines += [Text(command.details)] if command.details else []
    lines += [Text(f"Also: {', '.join(command.other_names)}", style="dim")] if command.other_names else []
    return Group(*lines)


def keys_table() -> RenderableType:
    """Return the help of the keys."""
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for key, about in KEYS.items():
        table.add_row(key, about)
    return table
