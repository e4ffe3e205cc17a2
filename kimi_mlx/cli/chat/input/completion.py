"""Completion of commands, their arguments, and files after `@`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.files.media_files import media_kind
from kimi_mlx.cli.chat.input.dropped_files import last_word_start, quote_name, unescape
from kimi_mlx.cli.chat.input.mentions import mention_start

MAX_NAMES = 10_000
"""Maximum number of names of one folder that are read."""


class MessageCompleter(Completer):
    """Completes the name of a command at the start of a message, then its argument, and files after `@` anywhere.

    Args:
        commands: commands of the conversation.
    """

    def __init__(self, commands: Iterable[Command]):
        self._commands = {command.name: command for command in commands}

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield what may follow the text before the cursor."""
        typed = document.text_before_cursor
        name, space, argument = typed.partition(" ")
        command = self._commands.get(name)
        if space and command is not None:
            if command.complete is not None:
                yield from _completions(argument[last_word_start(argument) :], command.complete(argument))
        elif typed.startswith("/") and not typed.startswith("//"):
            for name, command in self._commands.items():
                if name.startswith(typed):
                    yield Completion(name, start_position=-len(typed), display_meta=command.about)
        elif (start := mention_start(typed)) is not None:
            yield from _completions(typed[start:], complete_file(typed[start:]))


def complete_file(argument: str) -> list[str]:
    """Return the names of files and folders that begin with a word, with a backslash before each space."""
    return [quote_name(name) for name in _names(unescape(argument))]


def complete_mention(argument: str) -> list[str]:
    """Return the names of files and folders that begin with an argument, each with `@` before it."""
    return [f"@{name}" for name in complete_file(argument[1:])] if argument.startswith("@") else []


def complete_files(argument: str) -> list[str]:
    """Return the names of files and folders to which the last word of an argument may be completed.

    If the whole argument is the beginning of one name with plain spaces, that name is completed as it is.
    """
    return _complete_last(argument, lambda path: True)


def complete_media_files(argument: str) -> list[str]:
    """Return the names of folders, images and videos to which the last word of an argument may be completed."""
    return _complete_last(argument, lambda path: media_kind(path) is not None)


def _complete_last(argument: str, is_wanted: Callable[[Path], bool]) -> list[str]:
    start = last_word_start(argument)
    if start and (names := _names(argument, is_wanted)):
        return [name[start:] for name in names]
    return [quote_name(name) for name in _names(unescape(argument[start:]), is_wanted)]


def _names(beginning: str, is_wanted: Callable[[Path], bool] = lambda path: True) -> list[str]:
    """Return the names of files and folders with a beginning, as it is written; folders end with a slash.

    Hidden files need a dot in the beginning. Upper and lower case are the same if no name matches exactly.
    """
    folder, slash, last = beginning.rpartition("/")
    place = os.path.expanduser(folder + slash) if folder.startswith("~") or slash else "."
    try:
        with os.scandir(place) as entries:
            found = [entry for entry, _ in zip(entries, range(MAX_NAMES), strict=False)]
    except (OSError, ValueError):
        return []
    found = [entry for entry in found if last.startswith(".") or not entry.name.startswith(".")]
    exact = [entry for entry in found if entry.name.startswith(last)]
    similar = exact or [entry for entry in found if entry.name.lower().startswith(last.lower())]
    return sorted(
        folder + slash + entry.name + ("/" if _is_folder(entry) else "")
        for entry in similar
        if _is_folder(entry) or is_wanted(Path(entry.name))
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _completions(word: str, candidates: Iterable[str]) -> Iterator[Completion]:
    """Yield completions of a word; the menu shows the last part of a path."""
    for candidate in candidates:
        if candidate.lower().startswith(word.lower()):
            name = candidate.rstrip("/").rpartition("/")[2] + ("/" if candidate.endswith("/") else "")
            yield Completion(candidate, start_position=-len(word), display=unescape(name))
