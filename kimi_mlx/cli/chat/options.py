"""Options of `kimi-mlx chat`, one dataclass per subject."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.chat.files.media_files import check_files, media_kind, to_path
from kimi_mlx.cli.chat.schema import Schema, read_schema
from kimi_mlx.cli.options import (
    ANSWER,
    HISTORY,
    MODEL,
    PROMPT,
    SAMPLING,
    TOOLS,
    DiskCacheOptions,
    RunOptions,
    ToolArgumentsOption,
)
from kimi_mlx.errors import UsageError

if TYPE_CHECKING:
    from kimi_mlx.cli.chat.output.answer_view import ReasoningMode
    from kimi_mlx.text.media import MediaKind
    from kimi_mlx.tools.config import ServerConfig

PIPE = "-"
"""Name of the piped input, as a prompt or as a file."""
MAX_TEMPERATURE = 2
"""Maximum temperature: that of the OpenAI API."""


@dataclass(frozen=True)
class SamplingOptions:
    """Options of how tokens are sampled; None takes the model's default."""

    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "--temp",
            "-t",
            min=0,
            max=MAX_TEMPERATURE,
            help="Sampling temperature; 0 is greedy. Default: the model's.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0,
            max=1,
            metavar="P",
            help="Nucleus sampling: keep the most likely tokens whose probabilities add up to P.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=0,
            metavar="K",
            help="Sample from the K most likely tokens; 0 disables.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            min=0,
            max=1,
            metavar="P",
            help="Drop tokens with less than P times the top token's probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            "--frequency-penalty",
            min=-2,
            max=2,
            metavar="X",
            help="Lower the logit of a token by X for each time that the answer has it.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        typer.Option(
            "--presence-penalty",
            min=-2,
            max=2,
            metavar="X",
            help="Lower the logits of all tokens that the answer has by X.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            min=0.01,
            max=100,
            metavar="X",
            help="Divide positive logits of all tokens so far, prompt included, by X; negative ones are multiplied.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Random seed.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            help="Maximum number of tokens to generate. Default: the remaining context.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Turn reasoning on or off, for models that can do both.",
            rich_help_panel=SAMPLING,
        ),
    ] = None


@dataclass(frozen=True)
class PresetOptions:
    """A file with defaults of the options, which is read before them: see kimi_mlx.cli.option_defaults."""

    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="FILE",
            help="TOML file with defaults for these options, such as `model`, `system` and `temperature`; or the name "
            "of one in the folder that `kimi-mlx config path` shows.",
            show_default=False,
        ),
    ] = None


@dataclass(frozen=True)
class PromptOptions:
    """Options of the prompt."""

    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Answer this prompt and exit. Piped input is appended to it; `-` uses only the piped input.",
            show_default=False,
            rich_help_panel=PROMPT,
        ),
    ] = None
    file: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="Text file or image for the prompt, or for the first message; one `-f` per file. `-` is the piped "
            "input.",
            show_default=False,
            rich_help_panel=PROMPT,
        ),
    ] = None
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            metavar="FILE",
            help="Image for the prompt, or for the first message; one `--image` per file.",
            show_default=False,
            rich_help_panel=PROMPT,
        ),
    ] = None
    video: Annotated[
        list[str] | None,
        typer.Option(
            "--video",
            metavar="FILE",
            help="Video for the prompt, or for the first message; one `--video` per file. Needs the package `av`.",
            show_default=False,
            rich_help_panel=PROMPT,
        ),
    ] = None
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            "-s",
            metavar="TEXT",
            help="System prompt.",
            rich_help_panel=PROMPT,
        ),
    ] = None
    system_file: Annotated[
        str | None,
        typer.Option(
            "--system-file",
            metavar="FILE",
            help="Text file with the system prompt.",
            show_default=False,
            rich_help_panel=PROMPT,
        ),
    ] = None

    @property
    def media(self) -> list[tuple[Path, MediaKind]]:
        """Images, then videos, then files with the name of an image or a video."""
        named: list[tuple[str, MediaKind]] = [
            *((name, "image") for name in self.image or ()),
            *((name, "video") for name in self.video or ()),
        ]
        paths = [to_path(name) for name in self.file or ()]
        return [
            *((to_path(name), kind) for name, kind in named),
            *((path, kind) for path in paths if (kind := media_kind(path)) is not None),
        ]

    @property
    def text_files(self) -> list[Path]:
        """Files of `--file` that are neither images nor videos by name; `-` is the piped input."""
        return [path for name in self.file or () if media_kind(path := to_path(name)) is None]

    @property
    def takes_pipe_as_file(self) -> bool:
        """Whether the piped input is attached as a file, and not appended to the prompt."""
        return PIPE in (self.file or ())

    def check(self) -> None:
        """Check the names and the number of the files, without reading them.

        Raises:
            UsageError: a file does not exist, or is a folder or a device, or there are too many.
        """
        from kimi_mlx.images.limits import DEFAULT_LIMITS  # not for `--help` or a usage error

        if self.system is not None and self.system_file is not None:
            raise UsageError("--system and --system-file exclude each other", hint="leave one of them out")
        if self.takes_pipe_as_file and (self.prompt == PIPE or (self.file or ()).count(PIPE) > 1):
            raise UsageError("the piped input can be used only once", hint="leave out one of the `-`")
        if len(self.media) > (limit := DEFAULT_LIMITS.max_images):
            raise UsageError(f"{len(self.media)} images and videos are more than {limit}", hint="send fewer of them")
        check_files(path for path, _ in self.media)
        check_files((path for path in self.text_files if path != Path(PIPE)), "a text file")

    def read_system(self) -> str | None:
        """Return the system prompt.

        Raises:
            UsageError: the file cannot be read, or is not text.
        """
        from kimi_mlx.cli.chat.files.text_files import read_text_file  # Rich: not for `--help`

        return self.system if self.system_file is None else read_text_file(to_path(self.system_file)).text.strip("\n")


@dataclass(frozen=True)
class OutputOptions:
    """Options of the answer to a prompt, and of what is printed."""

    schema: Annotated[
        str | None,
        typer.Option(
            "--schema",
            metavar="FILE|JSON|FIELDS",
            help="Answer with JSON of this schema: a file, a JSON schema, or fields such as `name, age int`.",
            show_default=False,
            rich_help_panel=ANSWER,
        ),
    ] = None
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON document: text, reasoning, tool calls, usage, and errors too.",
            rich_help_panel=ANSWER,
        ),
    ] = False
    no_stream: Annotated[
        bool,
        typer.Option(
            "--no-stream",
            help="Print the answer when it is complete.",
            rich_help_panel=ANSWER,
        ),
    ] = False
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Print nothing but the answer, and warnings and errors on stderr.",
            rich_help_panel=ANSWER,
        ),
    ] = False

    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Print answers as the model writes them, without rendering their Markdown.",
            rich_help_panel=ANSWER,
        ),
    ] = False
    show_thinking: Annotated[
        bool | None,
        typer.Option(
            "--show-thinking/--hide-thinking",
            help="Show all of the reasoning, or nothing. Default: its end while it lasts, then one line.",
            show_default=False,
            rich_help_panel=ANSWER,
        ),
    ] = None

    @property
    def reasoning(self) -> ReasoningMode:
        """What is shown of the reasoning."""
        if self.quiet or self.show_thinking is False:
            return "hide"
        return "show" if self.show_thinking else "fold"

    @property
    def need_prompt(self) -> list[str]:
        """Options given that make no sense in a conversation."""
        given = {"--json": self.json, "--schema": self.schema is not None, "--no-stream": self.no_stream}
        return [name for name, is_given in given.items() if is_given]

    def read_schema(self) -> Schema | None:
        """Return the schema of the answer; None for text.

        Raises:
            UsageError: it cannot be read, or cannot be enforced.
        """
        return None if self.schema is None else read_schema(self.schema)


@dataclass(frozen=True)
class HistoryOptions:
    """Options of the history."""

    continue_: Annotated[
        str | None,
        typer.Option(
            "--continue",
            "-c",
            metavar="[ID]",
            help="Continue a conversation of the history, given by its id or title; without ID the latest. Its model "
            "and settings are used unless others are given.",
            show_default=False,
            rich_help_panel=HISTORY,
        ),
    ] = None
    no_log: Annotated[
        bool,
        typer.Option(
            "--no-log",
            help="Do not store this chat in the history.",
            rich_help_panel=HISTORY,
        ),
    ] = False


@dataclass(frozen=True)
class RemoteOptions:
    """Options of a server that has the model."""

    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Chat with the model of a running server, `kimi-mlx serve` or any other with OpenAI's API, such as "
            "`http://mac-a:8080`. Nothing is loaded here.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="File with the server's API key. Default: $KIMI_MLX_API_KEY.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    load: Annotated[
        bool,
        typer.Option(
            "--load",
            help="Load the model even if a server on this machine has it.",
            rich_help_panel=MODEL,
        ),
    ] = False

    def check(self) -> None:
        """Check the options.

        Raises:
            UsageError: `--load` with `--url`.
        """
        if self.load and self.url is not None:
            raise UsageError("--url and --load exclude each other", hint="leave one of them out")


@dataclass(frozen=True)
class ToolOptions:
    """Options of tools."""

    mcp: Annotated[
        list[str] | None,
        typer.Option(
            "--mcp",
            metavar="FILE",
            help="Offer the tools of the MCP servers in this file, `mcpServers` as in Claude Desktop; one `--mcp` per "
            "file. Needs the package `mcp`.",
            show_default=False,
            rich_help_panel=TOOLS,
        ),
    ] = None
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="TOOL,...",
            help="Let the model call these tools without asking: names, patterns such as `git_*`, or `all`.",
            show_default=False,
            rich_help_panel=TOOLS,
        ),
    ] = None
    max_rounds: Annotated[
        int,
        typer.Option(
            "--max-rounds",
            min=1,
            metavar="N",
            help="Maximum number of rounds of tool calls before an answer.",
            rich_help_panel=TOOLS,
        ),
    ] = 25
    tool_arguments: ToolArgumentsOption = "schema"

    @property
    def allowed(self) -> list[str]:
        """Names and patterns of tools that need no question."""
        words = (word.strip() for names in self.allow or () for word in names.split(","))
        return [word for word in words if word]

    def read_servers(self) -> tuple[list[ServerConfig], list[str]]:
        """Return the servers of the files, and notes about keys that are not used.

        Raises:
            UsageError: `--allow` without `--mcp`, or a file that is wrong.
        """
        from kimi_mlx.tools.config import read_config  # not for `--help`

        if self.allow and not self.mcp:
            raise UsageError("--allow needs --mcp", hint="add `--mcp FILE`")
        return read_config([to_path(name) for name in self.mcp or ()])


@dataclass(frozen=True)
class ChatArguments:
    """All arguments of `kimi-mlx chat`. A new subject is one dataclass and one field here.

    Args:
        prompt: prompt, system prompt, and files of the first message.
        output: what is printed, and how.
        run: the model and how it runs.
        preset: file with defaults of all options.
        remote: server that has the model.
        sampling: how tokens are sampled.
        disk: prompt cache on disk.
        history: the conversation to continue, and whether this one is stored.
        tools: MCP servers, and what they may do.
    """

    run: RunOptions
    preset: PresetOptions
    remote: RemoteOptions
    prompt: PromptOptions
    output: OutputOptions
    history: HistoryOptions
    sampling: SamplingOptions
    disk: DiskCacheOptions
    tools: ToolOptions

    def check(self) -> None:
        """Check the options before input is read and a model or a host is used.

        Raises:
            UsageError: options that are wrong or exclude each other, or a file that does not exist.
        """
        self.remote.check()
        self.prompt.check()
        self.prompt.read_system()
        self.output.read_schema()
        self.disk.check()
        self.tools.read_servers()
