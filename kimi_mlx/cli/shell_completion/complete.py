"""What can come next on a command line: commands, options, and values of options and arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kimi_mlx.cli.command_list import COMMANDS, LAUNCHED_COMMANDS, CommandInfo

MAX_HELP_CHARS = 60

ROOT_OPTIONS = {
    "--version": "Print the version.",
    "--install-completion": "Install completion for a shell.",
    "--show-completion": "Print the script of a shell.",
    "--help": "Show the help.",
}

Paths = Literal["none", "files", "folders"]
"""Paths that the shell adds to the candidates."""


@dataclass(frozen=True)
class Completion:
    """Candidates for the word at the cursor.

    Attributes:
        values: candidates, each the whole word, with a short description that may be empty.
        paths: paths that the shell adds.
        prefix: beginning of the word that the shell's paths do not have, such as `--file=`.
    """

    values: Sequence[tuple[str, str]] = ()
    paths: Paths = "none"
    prefix: str = ""

    def matching(self, word: str) -> Completion:
        """Return the candidates that begin with a word."""
        return replace(self, values=[(value, about) for value, about in self.values if value.startswith(word)])


def complete(words: Sequence[str], word: str) -> Completion:
    """Return the candidates for a word.

    Args:
        words: words before it, after `kimi-mlx`.
        word: beginning of the word; may be empty.
    """
    infos: Sequence[CommandInfo] = COMMANDS
    rest = list(words)
    while True:
        if not rest:
            is_option = word.startswith("-") and infos is COMMANDS
            return Completion(list(ROOT_OPTIONS.items()) if is_option else _names(infos)).matching(word)
        name = rest.pop(0)
        info = next((info for info in infos if info.name == name), None)
        if info is None:
            return Completion()
        if not info.commands:
            return _complete_command(info, rest, word)
        infos = info.commands


def _names(infos: Iterable[CommandInfo]) -> list[tuple[str, str]]:
    return [(info.name, info.summary) for info in infos if not info.is_hidden]


def _complete_command(info: CommandInfo, words: Sequence[str], word: str) -> Completion:
    """Return the candidates among the options and arguments of a command."""
    parameters: list[Any] = info.load().params
    options = {name: each for each in parameters for name in (*each.opts, *each.secondary_opts) if name[:1] == "-"}
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    position, waiting = 0, None
    for index, each in enumerate(words):
        if waiting is not None:
            waiting = None
        elif each.startswith("-"):
            option = options.get(each)
            waiting = option if option is not None and not option.is_flag else None
        elif info.name == "launch":
            return complete(words[index:], word) if each in LAUNCHED_COMMANDS else Completion()
        else:
            position += 1
    option_name, equals, value = word.partition("=")
    if waiting is not None:
        return _values(info, waiting, word).matching(word)
    if word.startswith("--") and equals and option_name in options:
        found = _values(info, options[option_name], value).matching(value)
        prefix = f"{option_name}="
        return replace(found, values=[(prefix + each, about) for each, about in found.values], prefix=prefix)
    if word.startswith("-"):
        return Completion(_options(options, words)).matching(word)
    if info.name == "launch":
        return Completion([each for each in _names(COMMANDS) if each[0] in LAUNCHED_COMMANDS]).matching(word)
    if not arguments:
        return Completion()
    return _values(info, arguments[min(position, len(arguments) - 1)], word).matching(word)


def _options(options: dict[str, Any], words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the options that can still be given, each by its long names."""
    used = {id(options[word]) for word in words if word in options and not options[word].multiple}
    return [
        (name, _short(option.help or ""))
        for name, option in options.items()
        if name.startswith("--") and id(option) not in used and not option.hidden
    ]


def _short(text: str) -> str:
    """Return the first sentence of a help text, or the beginning of it."""
    sentence = text.replace("\n", " ").partition(". ")[0].rstrip(".")
    return sentence if len(sentence) <= MAX_HELP_CHARS else f"{sentence[: MAX_HELP_CHARS - 3]}..."


def _values(info: CommandInfo, parameter: Any, word: str) -> Completion:
    """Return the values of an option or argument."""
    from kimi_mlx.cli.shell_completion.values import values_of

    hint = inspect.get_annotations(info.function(), eval_str=True).get(parameter.name)
    return values_of(parameter.name, parameter.metavar, hint, word)
