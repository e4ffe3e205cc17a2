"""The commands of `kimi-mlx`: names, summaries and examples, known without importing what they need."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from kimi_mlx.errors import UsageError

PANELS = (
    *("Options", "Prompt", "Answer", "Model", "Sampling", "History", "Tools"),
    *("Quantization", "Cluster", "Server"),
    *("Measurement", "Cost", "Output", "Advanced"),
)
"""Panels of a command's help, in their order; options without a panel are in the first."""


@dataclass(frozen=True)
class CommandInfo:
    """A command in the list of `kimi-mlx --help`.

    Attributes:
        name: word that the user types; also the name of the function, and of its module in `cli/`.
        summary: first line of the function's docstring, at most 50 characters.
        examples: lines at the end of the command's help.
        is_hidden: True to leave it out of the list.
        settings: settings of the command's context, see Click.
        module: name of its module in `cli/`, if it is not `name`.
        has_defaults: whether files set defaults of its options, see kimi_mlx.cli.option_defaults.
        commands: its own commands, if it is a group such as `kimi-mlx service`; it then has no function.
    """

    name: str
    summary: str
    examples: Sequence[str] = ()
    is_hidden: bool = False
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    module: str | None = None
    has_defaults: bool = False
    commands: Sequence[CommandInfo] = ()

    def load(self) -> Any:
        """Import the command's module and return its Click command."""
        if self.commands:
            return _group(self)
        single = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
        single.command(
            self.name,
            cls=PanelCommandWithDefaults if self.has_defaults else PanelCommand,
            hidden=self.is_hidden,
            epilog=_epilog(self.examples),
            context_settings={"help_option_names": ["-h", "--help"], **self.settings},
        )(self.function())
        return get_command(single)

    def function(self) -> Any:
        """Import the command's module and return its function."""
        return getattr(import_module(f"kimi_mlx.cli.{self.module or self.name}"), self.name)


COMMANDS = (
    CommandInfo(
        "chat",
        "Chat with a model in the terminal.",
        (
            "kimi-mlx chat                          chat with kimi-mini; /help lists commands and keys",
            'kimi-mlx chat kimi-mini -p "Hello"     print one answer on stdout',
            'git diff | kimi-mlx chat kimi-k2 -p "Review this"',
            'kimi-mlx chat kimi-k2 -f main.py -f notes.md -p "What is missing?"',
            'kimi-mlx chat kimi-k2.5 -f cat.png -p "What is it?"',
            "kimi-mlx chat kimi-k2 -p \"Ada, born 1815\" --schema 'name, year int'",
            "kimi-mlx chat --continue               go on with the latest conversation",
            "kimi-mlx chat --url http://mac-a:8080  with a model that a server has loaded",
            "kimi-mlx chat ./Kimi-K2-4bit --ranks 2",
        ),
        module="chat.command",
        has_defaults=True,
    ),
    CommandInfo(
        "history",
        "List, search and show past chats.",
        (
            "kimi-mlx history                       the latest conversations",
            "kimi-mlx history quarterly report      those with both words in a message",
            "kimi-mlx history show k3m9             the conversation whose id begins with k3m9",
            "kimi-mlx history export k3m9 chat.md   as Markdown; other names get JSON in OpenAI's format",
            "kimi-mlx history rm k3m9 tax           remove two conversations",
            "kimi-mlx chat --continue k3m9          continue one",
        ),
    ),
    CommandInfo(
        "serve",
        "Serve a model over HTTP (OpenAI, Anthropic APIs).",
        (
            "kimi-mlx serve kimi-mini",
            "kimi-mlx serve kimi-k2 --ranks 2 --port 8000 --served-name gpt-4o",
            "kimi-mlx serve --host 0.0.0.0 --api-key-file keys      for other machines, too",
            "kimi-mlx launch --hosts mac-a.local,mac-b.local serve kimi-k2",
        ),
        has_defaults=True,
    ),
    CommandInfo(
        "status",
        "Show the state of a server and its hosts.",
        (
            "kimi-mlx status                        your server on this machine",
            "kimi-mlx status http://mac-a:8080 --watch",
            "kimi-mlx status --json",
        ),
    ),
    CommandInfo(
        "download",
        "Download a model, optionally split for N ranks.",
        (
            "kimi-mlx download kimi-k2 --dry-run              show the files and the disk space needed",
            "kimi-mlx download moonlight                      into the Hugging Face cache, unchanged",
            "kimi-mlx download kimi-k2 --ranks 2              one store per rank, for `chat kimi-k2 --ranks 2`",
            "kimi-mlx download kimi-k2 --ranks 2 --verify     check all files, download broken ones again",
            "mlx.launch --hostfile two.json -- kimi-mlx download kimi-k2    one store per host",
        ),
    ),
    CommandInfo(
        "models",
        "List known models: size, memory, what is here.",
        ("kimi-mlx models", "kimi-mlx models kimi-k2.5", "kimi-mlx models --json"),
    ),
    CommandInfo(
        "rm",
        "Remove a model's downloads and stores.",
        ("kimi-mlx rm moonlight", "kimi-mlx rm kimi-k2 --yes --json"),
    ),
    CommandInfo(
        "plan",
        "Predict memory and speed on one or more Macs.",
        (
            "kimi-mlx plan kimi-k2 --machines m3-ultra-512x2       memory, predicted speed, recommendation",
            "kimi-mlx plan kimi-k2.5 --machines m3-ultra-512x2 --cost --subscription 200",
            "kimi-mlx plan kimi-k2.6 --machines m5-ultra-512x2 --draft auto    with and without a draft model",
            "kimi-mlx plan kimi-k2 --machines m6-ultra-512:1500GB/s            a chip that is not in the table",
            "kimi-mlx plan kimi-k2 --hostfile two.json --link measured",
            "kimi-mlx plan --backtest                              compare predictions with published results",
        ),
    ),
    CommandInfo(
        "bench",
        "Measure speed, latency and memory of a model.",
        (
            "kimi-mlx bench",
            "kimi-mlx bench kimi-mini --prompt-tokens 128,512 --repeat 5 --json",
            "kimi-mlx bench kimi-mini-vl --images 1,4 --image-size 1024x768",
            "kimi-mlx bench --synthetic wide --ranks 2 --link-delay-ms 4 --against mlx-lm",
            "kimi-mlx bench kimi-k2 --prompt-tokens 128,8192 --depth 0,8192 --concurrency 1,4 --plot result.png",
        ),
        has_defaults=True,
    ),
    CommandInfo(
        "convert",
        "Convert a checkpoint to MLX's quantized format.",
        (
            "kimi-mlx convert moonshotai/Kimi-K2-Thinking ./thinking-mlx --dry-run",
            "kimi-mlx convert kimi-k2.6 ./k2.6-mlx           INT4, lossless",
            "kimi-mlx convert ./Kimi-K2 ./k2-3bit --expert-bits 3",
            "kimi-mlx convert ./Kimi-K2 ./k2-2bit --preset 2bit --importance k2.importance",
        ),
    ),
    CommandInfo(
        "importance",
        "Measure which inputs of a model matter.",
        (
            "kimi-mlx importance ./Kimi-K2 code.py notes.md -o k2.importance",
            'kimi-mlx importance kimi-mini "What is 12 + 30?" --chat -o mini.importance',
        ),
    ),
    CommandInfo(
        "compare",
        "Compare two models on the same text.",
        (
            "kimi-mlx compare ./Kimi-K2 ./k2-2bit book.txt",
            "git diff | kimi-mlx compare ./Kimi-K2 ./k2-2bit - --json",
        ),
    ),
    CommandInfo(
        "launch",
        "Check and connect several Macs, then run COMMAND.",
        (
            "kimi-mlx launch --hosts mac-a.local,mac-b.local --install         install kimi-mlx on both, then chat",
            "kimi-mlx launch --hosts mac-a.local,mac-b.local download kimi-k2  each host downloads its part",
            'kimi-mlx launch --hosts mac-a.local,mac-b.local chat kimi-k2 -p "Hi"',
            "kimi-mlx launch --hosts mac-a.local,mac-b.local chat kimi-k2 --strategy pipeline:3:1",
            "kimi-mlx launch --hosts mac-a.local,mac-b.local serve kimi-k2",
            "kimi-mlx launch --hosts mac-a.local,mac-b.local --save two.json check kimi-k2",
            "kimi-mlx launch --hostfile two.json bench kimi-k2 --prompt-tokens 128,1024",
        ),
        # the words after COMMAND belong to it
        settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
        has_defaults=True,
    ),
    CommandInfo(
        "service",
        "Run a server in the background, from login on.",
        (
            "kimi-mlx service install                             kimi-mini at http://127.0.0.1:8080/v1",
            "kimi-mlx service install moonlight --port 8000 --name moon",
            "kimi-mlx service install kimi-k2 --hosts mac-a.local,mac-b.local",
            "kimi-mlx service status",
            "kimi-mlx service logs -f",
            "kimi-mlx service uninstall",
        ),
        commands=(
            CommandInfo(
                "install",
                "Install a server, with the options of `serve`.",
                (
                    "kimi-mlx service install kimi-mini --dry-run",
                    "kimi-mlx service install moonlight --host 0.0.0.0 --api-key-file keys",
                    "kimi-mlx service install kimi-k2 --hostfile two.json --served-name gpt-4o",
                ),
                module="service.install",
            ),
            CommandInfo("status", "Show whether the server runs and answers.", module="service.status"),
            CommandInfo("logs", "Print the log of the server.", module="service.logs"),
            CommandInfo("start", "Start the server of an installed service.", module="service.start"),
            CommandInfo("stop", "Stop the server until the next login or start.", module="service.start"),
            CommandInfo("restart", "Restart the server, e.g. after an update.", module="service.start"),
            CommandInfo("uninstall", "Stop the server and remove the service.", module="service.uninstall"),
        ),
    ),
    CommandInfo("check", "Check that a cluster gives equal answers.", is_hidden=True),
    CommandInfo(
        "config",
        "Show defaults of options, and where they are set.",
        (
            "kimi-mlx config                        the values of a chat's options",
            "kimi-mlx config serve --json",
            "kimi-mlx config path                   where config.toml is",
        ),
    ),
    CommandInfo(
        "doctor",
        "Find problems of a Mac or cluster, and the fix.",
        (
            "kimi-mlx doctor                        this machine",
            "kimi-mlx doctor kimi-k2 --hosts mac-a.local,mac-b.local --save two.json",
            "kimi-mlx doctor --hostfile two.json --quick --json",
            "kimi-mlx doctor --gpu                  the model on this machine's GPU",
        ),
    ),
)
LAUNCHED_COMMANDS = ("chat", "serve", "bench", "check", "download")
"""Commands that `kimi-mlx launch` can run on a cluster; the first is the default."""

OTHER_TOOLS_COMMANDS = (
    *("list", "ls", "pull", "run", "ps", "remove", "delete", "show", "info", "help", "version", "stop"),
)
"""Commands of other tools; each exits with a hint to ours."""

_ANY_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": list[str]()}
_BY_NAME = {info.name: info for info in COMMANDS} | {
    name: CommandInfo(name, "Not a command of kimi-mlx.", (), True, _ANY_ARGUMENTS, "other_tools")
    for name in OTHER_TOOLS_COMMANDS
}


def load_command(name: str) -> Any:
    """Import one of our commands and return its Click command."""
    return _BY_NAME[name].load()


def command_names() -> list[str]:
    """Return the names of all commands of ours, hidden ones too."""
    return [info.name for info in COMMANDS]


class PanelCommand(TyperCommand):
    """A command whose help lists its options in panels, in plain text.

    The value of an option whose placeholder is in brackets, such as `[ID]`, may be left out; it is then empty.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the command line."""
        names = [
            name
            for parameter in self.get_params(ctx)
            if parameter.param_type_name == "option" and str(parameter.metavar).startswith("[")
            for name in parameter.opts
        ]
        words = list(_with_empty_values(args, names))
        self.set_defaults(ctx, words)
        return super().parse_args(ctx, words)

    def set_defaults(self, context: Any, words: list[str]) -> None:
        """Set defaults of the options for a command line."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options of each panel."""
        records: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{panel: [] for panel in PANELS}}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or PANELS[0]
                records[panel].append(record)
        for panel, rows in records.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)


class PanelCommandWithDefaults(PanelCommand):
    """A command whose options have defaults in `config.toml` and in presets."""

    def set_defaults(self, context: Any, words: list[str]) -> None:
        """Set the defaults of the files.

        Raises:
            UsageError: a file cannot be used.
        """
        if not context.resilient_parsing and not {"-h", "--help"} & set(words):
            from kimi_mlx.cli.option_defaults import set_defaults  # not for the list of commands

            set_defaults(self, context, words)


class LazyGroup(TyperGroup):
    """A group that imports only the command that runs; its list is static."""

    infos: Sequence[CommandInfo] = COMMANDS

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of our commands in the order of the list."""
        return [info.name for info in self.infos]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command; None for an unknown name."""
        info = self._find(cmd_name)
        return None if info is None else info.load()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the static list of names and summaries."""
        with formatter.section("Commands"):
            formatter.write_dl([(info.name, info.summary) for info in self.infos if not info.is_hidden])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of a command line.

        Raises:
            UsageError: unknown command; the hint has a similar name.
        """
        name = args[0]
        if self._find(name) is None and not name.startswith("-"):
            visible = [info.name for info in self.infos if not info.is_hidden]
            similar = difflib.get_close_matches(name, visible, n=1)
            own_name = "kimi-mlx" if ctx.parent is None else f"kimi-mlx {ctx.info_name}"
            hint = f"did you mean `{similar[0]}`?" if similar else f"type `{own_name} --help` for the commands"
            raise UsageError(f"{own_name} has no command `{name}`", hint=hint)
        return super().resolve_command(ctx, args)

    def _find(self, name: str) -> CommandInfo | None:
        return next((info for info in self.infos if info.name == name), None)


COMPLETION_OPTIONS = ("--install-completion", "--show-completion")


class RootGroup(LazyGroup):
    """The commands of `kimi-mlx`; those of other tools get a hint."""

    def _find(self, name: str) -> CommandInfo | None:
        return _BY_NAME.get(name)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the options before the command; those of completion may stand without a shell.

        Raises:
            UsageError: `-v`, which other tools have.
        """
        args = list(_with_empty_values(args, COMPLETION_OPTIONS))
        if args[:1] in (["-v"], ["-V"]):
            raise UsageError(f"kimi-mlx has no option `{args[0]}`", hint="type `kimi-mlx --version`")
        return super().parse_args(ctx, args)


def _with_empty_values(args: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """Yield a command line, with an empty value after each of these options that has none."""
    for index, word in enumerate(args):
        yield word
        if word == "--":
            yield from args[index + 1 :]
            return
        if word in names and (index + 1 == len(args) or args[index + 1].startswith("-")):
            yield ""


def _group(info: CommandInfo) -> Any:
    """Return the Click group of a command that has commands of its own."""
    group = typer.Typer(
        name=info.name,
        cls=type("CommandGroup", (LazyGroup,), {"infos": info.commands}),
        help=info.summary,
        epilog=_epilog(info.examples),
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.callback()(lambda: None)
    return get_command(group)


def _epilog(examples: Sequence[str]) -> str | None:
    """Return the end of a command's help; `\\b` keeps Click from wrapping the lines."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None
