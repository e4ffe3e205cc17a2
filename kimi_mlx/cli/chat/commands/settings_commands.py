"""Commands that show and change how the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.chat.answer_settings import DEFAULT, SETTINGS, check_setting, complete_setting
from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.files.media_files import to_path
from kimi_mlx.cli.chat.files.text_files import read_text_file
from kimi_mlx.cli.chat.input.completion import complete_mention
from kimi_mlx.cli.chat.output.answer_view import ReasoningMode
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.output import print_note, stderr
from kimi_mlx.errors import UsageError
from kimi_mlx.units import format_count

SWITCH = {"on": True, "off": False, DEFAULT: None}
"""Words of `/thinking` for the reasoning of the model; None leaves it to the chat template."""

MODES: Sequence[ReasoningMode] = get_args(ReasoningMode)
"""Words of `/thinking` for the display."""

WORDS = (*SWITCH, *MODES)
"""Words of `/thinking`."""

FILE_MARK = "@"
"""Beginning of the argument of `/system` that names a file."""

REMOVE = "-"
"""Argument of `/system` that removes the system prompt."""


class SettingsCommands:
    """Commands that show and change how the model answers.

    Args:
        state: the conversation.
    """

    def __init__(self, state: ReplState):
        self._state = state

    def commands(self) -> Sequence[Command]:
        """Return the commands."""
        return [
            Command(
                *("/set", "[NAME VALUE]", "show or change sampling", self._set, "Model"),
                details=f"Settings: {', '.join(SETTINGS)}. Alone it lists them, with where each value comes from. "
                f"`/set temperature 0.6` holds for the next answers; `/set temperature {DEFAULT}` takes it back.",
                complete=complete_setting,
            ),
            Command(
                *("/system", "[TEXT|@FILE|-]", "show or set system prompt", self._system, "Model"),
                details="The system prompt is set to TEXT, or to the contents of FILE; `-` removes it. The messages so "
                "far stay; `/clear` drops them.",
                complete=complete_mention,
            ),
            Command(
                *("/thinking", "[on|off|show|hide|fold]", "reasoning on/off, display", self._thinking, "Model"),
                details=f"`on` and `off` switch the reasoning of models that can do both, `{DEFAULT}` leaves it to the "
                "model. `show`, `hide` and `fold` say how it is displayed: all of it, nothing, or one line.",
                complete=lambda argument: WORDS,
            ),
        ]

    def _set(self, argument: str) -> None:
        state, conversation = self._state, self._state.conversation
        name, value = _split_setting(argument)
        if name:
            check_setting(name)
        if value:
            conversation.options = state.settings.change(conversation.options, name, value)
        values = state.settings.values(conversation.options, conversation.model)
        table = Table.grid(padding=(0, 2))
        for setting in values:
            if name in ("", setting.name):
                table.add_row(setting.name, setting.value, Text(setting.source, style="dim"))
        stderr.print(table, soft_wrap=False)

    def _system(self, argument: str) -> None:
        conversation = self._state.conversation
        if not argument:
            print_note(conversation.system or "there is no system prompt; `/system TEXT` sets one")
            return
        before = conversation.system
        if argument == REMOVE:
            conversation.system = None
        elif argument.startswith(FILE_MARK):
            conversation.system = _read_system(argument[len(FILE_MARK) :].strip())
        else:
            conversation.system = argument
        if conversation.system == before:
            print_note("the system prompt is the same as before")
            return
        change = "removed" if conversation.system is None else "set"
        count = format_count(len(conversation.messages), "message")
        kept = f"; the {count} so far stay, /clear drops them" if conversation.messages else ""
        print_note(f"system prompt {change}{kept}")

    def _thinking(self, argument: str) -> None:
        state, conversation = self._state, self._state.conversation
        word = argument.lower()
        if word in SWITCH:
            if not conversation.model.can_switch_thinking and SWITCH[word] is not None:
                name = conversation.model.name
                raise UsageError(f"`{name}` cannot switch its thinking on or off", hint="/thinking hide hides it")
            variables = {key: value for key, value in conversation.options.template_kwargs.items() if key != "thinking"}
            if (is_on := SWITCH[word]) is not None:
                variables["thinking"] = is_on
            conversation.options = replace(conversation.options, template_kwargs=variables)
        elif word in MODES:
            state.reasoning = next(mode for mode in MODES if mode == word)
        elif word:
            raise UsageError(f"/thinking does not know `{argument:.40}`", hint=f"type one of {', '.join(WORDS)}")
        thinking = conversation.options.thinking
        switch = "as the model does by default" if thinking is None else "on" if thinking else "off"
        print_note(f"thinking {switch} · display: {state.reasoning}")


def _read_system(name: str) -> str:
    """Return the system prompt in a file.

    Raises:
        UsageError: the file cannot be read, is not text, or is empty.
    """
    text = read_text_file(to_path(name)).text.strip("\n")
    if not text.strip():
        raise UsageError(f"`{name}` is empty", hint="`/system -` removes the system prompt")
    return text


def _split_setting(argument: str) -> tuple[str, str]:
    """Return name and value, which are separated by spaces or `=`."""
    name, _, value = argument.replace("=", " ", 1).strip().partition(" ")
    return name, value.strip()
