"""Options of `kimi-mlx chat`, one dataclass per subject."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.chat.media_files import check_files, to_path
from kimi_mlx.cli.options import SAMPLING, DiskCacheOptions, JsonOption, RunOptions
from kimi_mlx.errors import UsageError

if TYPE_CHECKING:
    from kimi_mlx.text.media import MediaKind

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
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Random seed.", rich_help_panel=SAMPLING)] = None
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
class PromptOptions:
    """Options of the prompt."""

    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Answer this prompt and exit. Piped input is appended to it; `-` uses only the piped input.",
            show_default=False,
        ),
    ] = None
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            metavar="FILE",
            help="Image for the prompt, or for the first message; one `--image` per file.",
            show_default=False,
        ),
    ] = None
    video: Annotated[
        list[str] | None,
        typer.Option(
            "--video",
            metavar="FILE",
            help="Video for the prompt, or for the first message; one `--video` per file. Needs the package `av`.",
            show_default=False,
        ),
    ] = None

    @property
    def files(self) -> list[tuple[Path, MediaKind]]:
        """Images, then videos."""
        named: list[tuple[str, MediaKind]] = [
            *((name, "image") for name in self.image or ()),
            *((name, "video") for name in self.video or ()),
        ]
        return [(to_path(name), kind) for name, kind in named]

    def check(self) -> None:
        """Check the names and the number of the files, without reading them.

        Raises:
            UsageError: a file does not exist, or is a folder or a device, or there are too many.
        """
        from kimi_mlx.images.limits import DEFAULT_LIMITS  # not for `--help` or a usage error

        if len(self.files) > (limit := DEFAULT_LIMITS.max_images):
            raise UsageError(f"{len(self.files)} images and videos are more than {limit}", hint="send fewer of them")
        check_files(path for path, _ in self.files)


@dataclass(frozen=True)
class OutputOptions:
    """Options of what is printed, and how."""

    json: JsonOption = False


@dataclass(frozen=True)
class ChatArguments:
    """All arguments of `kimi-mlx chat`. A new subject is one dataclass and one field here.

    Args:
        prompt: prompt, system prompt, and files of the first message.
        output: what is printed, and how.
        run: the model and how it runs.
        sampling: how tokens are sampled.
        disk: prompt cache on disk.
    """

    run: RunOptions
    prompt: PromptOptions
    output: OutputOptions
    sampling: SamplingOptions
    disk: DiskCacheOptions

    def check(self) -> None:
        """Check the options without reading input and before a model or a host is asked.

        Raises:
            UsageError: options that are wrong or exclude each other, or a file that does not exist.
        """
        self.prompt.check()
        self.disk.check()
