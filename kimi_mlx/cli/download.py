"""`kimi-mlx download`: download and verify a model; with --ranks split into stores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import (
    ADVANCED,
    MODEL,
    JsonOption,
    ModelArgument,
    NoVisionOption,
    StrategyOption,
    model_name,
)
from kimi_mlx.errors import UsageError


@dataclass(frozen=True)
class DownloadOptions:
    """Options of a download."""

    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=1,
            max=64,
            help="Split the model for N ranks. Source files are deleted after processing. "
            "Default: download the checkpoint unchanged, into the Hugging Face cache.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    strategy: StrategyOption = None
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            help="Branch, tag or commit. Default: the one on this machine, else the main branch.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the files, the size of each rank's part, and the disk needed.")
    ] = False
    verify: Annotated[
        bool, typer.Option("--verify", help="Check all files on this machine and download broken ones again.")
    ] = False
    keep_source: Annotated[
        bool,
        typer.Option(
            "--keep-source",
            help="With --ranks: keep the source files in the Hugging Face cache.",
            rich_help_panel=ADVANCED,
        ),
    ] = False

    no_vision: NoVisionOption = False

    def with_ranks(self, num_hosts: int) -> DownloadOptions:
        """Return the options with the number of ranks; each of several hosts is one.

        Raises:
            UsageError: `--ranks` is another number, or an option needs `--ranks`.
        """
        options = self
        if num_hosts > 1:
            if self.ranks not in (None, num_hosts):
                raise UsageError(f"--ranks is {self.ranks}, but there are {num_hosts} hosts", hint="leave --ranks out")
            options = replace(self, ranks=num_hosts)
        if options.ranks is None and options.keep_source:
            raise UsageError("--keep-source needs --ranks", hint="without --ranks all files are kept anyway")
        if options.ranks is None and options.strategy is not None:
            raise UsageError("--strategy needs --ranks", hint="add the number of ranks, such as `--ranks 2`")
        return options


@with_option_groups
def download(
    context: typer.Context, options: DownloadOptions, model: ModelArgument = None, json: JsonOption = False
) -> None:
    """Download a model, optionally split for N ranks."""
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.open_model import launch_context

    name = model_name(model)
    launch = launch_context(context)
    if launch is not None:
        from kimi_mlx.cli.download_on_hosts import download_on_hosts

        download_on_hosts(launch, name, options, is_json=json)
    else:
        from kimi_mlx.cli.download_here import download_here

        download_here(name, options, is_json=json)
