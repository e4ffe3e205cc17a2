"""Commands that show and change how the model answers."""

from __future__ import annotations

from collections.abc import Sequence

from kimi_mlx.cli.chat.commands import Command
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.chat.statistics_text import conversation_line, statistics_line
from kimi_mlx.cli.output import print_note


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
            Command("/system", "[TEXT|-]", "show or set the instructions", self._system, "Model"),
            Command("/stats", "", "tokens and speed so far", self._stats, "Model"),
        ]

    def _system(self, argument: str) -> None:
        conversation = self._state.conversation
        if not argument:
            print_note(conversation.system or "there is no system prompt")
            return
        conversation.system = None if argument == "-" else argument
        self._state.clear()
        print_note(f"system prompt {'set' if conversation.system else 'removed'}; conversation cleared")

    def _stats(self, argument: str) -> None:
        answers = self._state.answers
        if not answers:
            print_note("there is no answer yet")
            return
        print_note(f"last answer: {statistics_line(answers[-1])}")
        print_note(f"conversation: {conversation_line(answers)}")
