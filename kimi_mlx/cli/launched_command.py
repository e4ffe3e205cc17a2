"""The command that `kimi-mlx launch` runs on a cluster; its arguments are checked before a host is contacted."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from kimi_mlx.cli.chat.options import ChatArguments
from kimi_mlx.cli.chat.standard_input import require_prompt
from kimi_mlx.cli.command_list import LAUNCHED_COMMANDS, OTHER_TOOLS_COMMANDS, command_names
from kimi_mlx.cli.option_defaults import LAUNCHED, option_sources
from kimi_mlx.cli.option_file import CONFIG_NAME
from kimi_mlx.cli.option_groups import build_group
from kimi_mlx.cli.options import model_name, used_draft
from kimi_mlx.cli.other_tools import HINTS
from kimi_mlx.errors import UsageError
from kimi_mlx.parallel.placement import normalize_strategy
from kimi_mlx.sizing.expert_memory import ExpertMemory

if TYPE_CHECKING:
    from kimi_mlx.cli.open_model import LaunchContext


class LaunchedCommand:
    """A command with its arguments.

    Args:
        context: Typer's context of `launch`.
        words: the command with its arguments; without a command it is a chat.

    Raises:
        UsageError: the command cannot be launched, or its arguments are wrong.
    """

    def __init__(self, context: typer.Context, words: Sequence[str]):
        assert context.parent is not None
        self._parent = context.parent
        if words and not words[0].startswith("-"):
            _check_name(words[0])
        elif words:
            self._check_option(words[0])
        self.name = words[0] if words and words[0] in LAUNCHED_COMMANDS else LAUNCHED_COMMANDS[0]
        self._words = list(words[1:] if words and words[0] == self.name else words)
        group: Any = self._parent.command
        self._command = group.get_command(self._parent, self.name)
        self._refuse_options_of_launch(context)
        self._parent.meta[LAUNCHED] = True
        with self._context() as parsed:
            self._parameters: dict[str, Any] = dict(parsed.params)
            self._has_model = option_sources(parsed).get("model") not in (None, CONFIG_NAME)
        if self._parameters.get("model") in LAUNCHED_COMMANDS:
            name = self._parameters["model"]
            raise UsageError(f"`{words[0]}` must come after `{name}`", hint=f"put the options of `{name}` after it")
        if self._parameters.get("ranks") not in (None, 1):
            raise UsageError("--ranks and hosts exclude each other: each host is a rank", hint="leave --ranks out")
        if self._parameters.get("against") or self._parameters.get("synthetic"):
            raise UsageError("--against and --synthetic run on one machine only", hint="run bench without launch")

    @property
    def model(self) -> str:
        """Name of the model; that of the conversation to continue if no other is given.

        Raises:
            HistoryError: there is no such conversation, or the history cannot be used.
        """
        continued = self._parameters.get("continue_")
        if continued is not None and not self._has_model:
            from kimi_mlx.cli.chat.chat_history import stored_model  # SQLite: only to continue a conversation

            return stored_model(continued)
        return model_name(self._parameters.get("model"))

    @property
    def strategy(self) -> str | None:
        """Value of its `--strategy`."""
        return self._parameters.get("strategy")

    @property
    def draft(self) -> str | None:
        """Value of its `--draft`; None if drafts are off."""
        return used_draft(self._parameters.get("draft"), self._parameters.get("speculate"))

    @property
    def expert_memory(self) -> ExpertMemory:
        """Value of its `--expert-memory`."""
        return ExpertMemory.parse(self._parameters.get("expert_memory") or "auto")

    def check_strategy(self, num_ranks: int) -> None:
        """Check that its `--strategy`, if it has weights, has one for each rank.

        Raises:
            UsageError: the numbers differ.
        """
        if self.strategy is not None:
            normalize_strategy(self.strategy, num_ranks)

    def check_chat(self) -> None:
        """Check that a chat has a terminal, a pipe or a prompt, and check its options.

        Raises:
            UsageError: it has none of them, or an option is wrong.
        """
        if self.name == "chat":
            arguments = build_group(ChatArguments, self._parameters)
            require_prompt(arguments.prompt.prompt)
            arguments.check()

    @property
    def is_json(self) -> bool:
        """Whether it prints JSON."""
        return bool(self._parameters.get("json"))

    @property
    def has_fast_sync(self) -> bool:
        """Whether `--fast-sync` is among its options."""
        return bool(self._parameters.get("fast_sync"))

    def run(self, launched: LaunchContext) -> None:
        """Run the command on the cluster."""
        with self._context() as context:
            context.obj = launched
            self._command.invoke(context)

    def _context(self) -> Any:
        return self._command.make_context(self.name, list(self._words), parent=self._parent)

    def _check_option(self, word: str) -> None:
        """Check an option before the command: one of `launch`, or else of a chat.

        Raises:
            UsageError: neither command has it.
        """
        group: Any = self._parent.command
        commands = (group.get_command(self._parent, name) for name in ("launch", LAUNCHED_COMMANDS[0]))
        of_launch, of_chat = map(_option_names, commands)
        option = word.partition("=")[0]
        if not option.startswith("--") or option == "--help" or option in of_launch | of_chat:
            return
        similar = difflib.get_close_matches(option, sorted(of_launch | of_chat), n=1)
        hint = f"did you mean `{similar[0]}`?" if similar else "type `kimi-mlx launch --help` for the options"
        raise UsageError(f"launch has no option `{option}`", hint=hint)

    def _refuse_options_of_launch(self, context: typer.Context) -> None:
        """Refuse options of `launch` among the command's words, such as `launch chat --hosts a,b`.

        Raises:
            UsageError: there is one; the hint has the right order.
        """
        command: Any = context.command
        of_launch, own = _option_names(command), _option_names(self._command)
        for word in self._words:
            option = word.partition("=")[0]
            if option in of_launch and option not in own:
                example = f"{option} a,b" if option == "--hosts" else option
                raise UsageError(
                    f"`{option}` is an option of `launch`, and must come before `{self.name}`",
                    hint=f"type `kimi-mlx launch {example} ... {self.name} ...`",
                )


def _option_names(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")}


def _check_name(word: str) -> None:
    """Check the first word: a command that can be launched, or a model.

    Raises:
        UsageError: it is another command, a misspelled one, or no model.
    """
    if word in LAUNCHED_COMMANDS:
        return
    if word in OTHER_TOOLS_COMMANDS:
        raise UsageError(f"kimi-mlx has no command `{word}`", hint=HINTS[word])
    if word in command_names():
        names = ", ".join(f"`{name}`" for name in LAUNCHED_COMMANDS)
        raise UsageError(f"launch runs {names}, not `{word}`", hint=f"type `kimi-mlx {word}` without launch")
    from kimi_mlx.store.model_ref import resolve_model_name  # heavy: not for a usage error of an option

    try:
        resolve_model_name(word)
    except UsageError:
        similar = difflib.get_close_matches(word, LAUNCHED_COMMANDS, n=1)
        if not similar:
            raise
        raise UsageError(f"there is no command and no model `{word}`", hint=f"did you mean `{similar[0]}`?") from None
