"""Options that several commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from kimi_mlx.errors import UsageError
from kimi_mlx.parallel.placement import STRATEGIES, parse_strategy
from kimi_mlx.session.session import DEFAULT_CACHE_DISK_BYTES, MAX_CHECK_EVERY, MAX_DRAFT_TOKENS
from kimi_mlx.settings import Settings
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.units import MB, format_bytes, parse_bytes

PROMPT, ANSWER, HISTORY, TOOLS = "Prompt", "Answer", "History", "Tools"
MODEL, SAMPLING = "Model", "Sampling"
CLUSTER, SERVER = "Cluster", "Server"
QUANTIZATION, MEASUREMENT, COST, OUTPUT = "Quantization", "Measurement", "Cost", "Output"
ADVANCED = "Advanced"
"""Panels of the help; see PANELS in command_list.py for their order."""

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="An alias (see `kimi-mlx models`), a folder, or a Hugging Face repository `owner/name`. "
        "Default: $KIMI_MLX_MODEL, else kimi-mini.",
        show_default=False,
    ),
]
RanksOption = Annotated[
    int,
    typer.Option(
        "--ranks",
        min=1,
        help="Number of processes on this machine that share the model.",
        rich_help_panel=MODEL,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16|float16",
        help="Data type of the computation. Default: the checkpoint's on a GPU, float32 on a CPU.",
        show_default=False,
        rich_help_panel=ADVANCED,
    ),
]
FastSyncOption = Annotated[
    bool,
    typer.Option(
        "--fast-sync",
        help="Faster GPU-network synchronisation (MLX_METAL_FAST_SYNCH=1: 4 us instead of 180 us). Risky: may hang "
        "the GPU and require a restart. Ranks then use all_sum only, and --check-every is 16 unless set.",
        rich_help_panel=ADVANCED,
    ),
]


def _check_strategy(text: str | None) -> str | None:
    if text is not None:
        parse_strategy(text)
    return text


def _check_expert_memory(text: str) -> str:
    ExpertMemory.parse(text)
    return text


StrategyOption = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME[:W:W...]",
        callback=_check_strategy,
        help=f"How ranks share the model: {', '.join(STRATEGIES)}; with weights for unequal hosts, e.g. "
        "`pipeline:3:1`. Default: as stored on disk, else the planner's choice.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
ToolArgumentsOption = Annotated[
    Literal["schema", "as-written"],
    typer.Option(
        "--tool-arguments",
        help="Enforce the schemas of tools in the arguments of calls, or leave the arguments as the model writes them.",
        rich_help_panel=TOOLS,
    ),
]
SpeculateOption = Annotated[
    int | None,
    typer.Option(
        "--speculate",
        min=0,
        max=MAX_DRAFT_TOKENS,
        metavar="N",
        help="Propose up to N tokens per step: from earlier text (prompt lookup), which is faster for code and "
        "quotations, and from --draft. The text stays the same. 0 turns both off. Default: 7 with --draft, else 0.",
        show_default=False,
        rich_help_panel=ADVANCED,
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="auto|NAME|FOLDER",
        help="Propose tokens with this draft model (EAGLE-3 or 3.1), which may double the speed; the text stays the "
        "same. `auto`: the known draft model of the model (`kimi-mlx models MODEL` names it).",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
CheckEveryOption = Annotated[
    int,
    typer.Option(
        "--check-every",
        min=0,
        max=MAX_CHECK_EVERY,
        metavar="K",
        help="Compare checksums of hidden states, chosen experts and logits across ranks every K steps; 0 disables. "
        "The cost is low; 64 is a good value.",
        rich_help_panel=ADVANCED,
    ),
]


def _parse_size(text: str | int) -> int:
    if isinstance(text, int):  # the default, which Typer parses too
        return text
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise UsageError(str(error), hint="write the size as `20GB` or `512MiB`") from None
    if size < MB:
        raise UsageError(f"a cache of {size} bytes is too small", hint="write the size as `20GB` or `512MiB`")
    return size


CacheMemoryOption = Annotated[
    int | None,
    typer.Option(
        "--cache-memory",
        parser=_parse_size,
        metavar="SIZE",
        help="Memory per rank for the KV caches of all conversations, e.g. `20GB`. Default: free memory, "
        "up to 8 full contexts.",
        show_default=False,
        rich_help_panel=ADVANCED,
    ),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        file_okay=False,
        help="Also keep the prompt cache in this folder on each host, so that it survives restarts. Prompts are "
        "stored there unencrypted, readable only by you. Default: in memory only.",
        show_default=False,
        rich_help_panel=ADVANCED,
    ),
]
CacheDiskOption = Annotated[
    int,
    typer.Option(
        "--cache-disk",
        parser=_parse_size,
        metavar="SIZE",
        help="Maximum size of --cache-dir per host, e.g. `50GB`; least recently used entries are deleted. "
        f"Default: {format_bytes(DEFAULT_CACHE_DISK_BYTES)}.",
        show_default=False,
        rich_help_panel=ADVANCED,
    ),
]
ExpertMemoryOption = Annotated[
    str,
    typer.Option(
        "--expert-memory",
        metavar="auto|SIZE|all",
        callback=_check_expert_memory,
        help="Memory per rank for routed experts, e.g. `40GB`, or `35%` of them; the others are read from the SSD when "
        "a token needs them. `auto`: all if they fit, else as many as fit.",
        rich_help_panel=MODEL,
    ),
]
NoVisionOption = Annotated[
    bool,
    typer.Option(
        "--no-vision",
        help="Leave out the vision tower (0.9 GB in Kimi K2.5): the model then refuses images.",
        rich_help_panel=MODEL,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@dataclass(frozen=True)
class RunOptions:
    """Options of each command that loads a model."""

    model: ModelArgument = None
    ranks: RanksOption = 1
    strategy: StrategyOption = None
    dtype: DtypeOption = None
    draft: DraftOption = None
    speculate: SpeculateOption = None
    check_every: CheckEveryOption = 0
    fast_sync: FastSyncOption = False
    cache_memory: CacheMemoryOption = None
    expert_memory: ExpertMemoryOption = "auto"

    @property
    def model_name(self) -> str:
        """Name of the model: the argument, else the environment's default."""
        return model_name(self.model)

    @property
    def used_draft(self) -> str | None:
        """Value of `--draft`; None if `--speculate 0` turns drafts off."""
        return used_draft(self.draft, self.speculate)


@dataclass(frozen=True)
class DiskCacheOptions:
    """Options of the prompt cache on disk."""

    cache_dir: CacheDirOption = None
    cache_disk: CacheDiskOption = DEFAULT_CACHE_DISK_BYTES

    def check(self) -> None:
        """Check that a limit has a folder.

        Raises:
            UsageError: `--cache-disk` without `--cache-dir`.
        """
        if self.cache_dir is None and self.cache_disk != DEFAULT_CACHE_DISK_BYTES:
            raise UsageError("--cache-disk limits --cache-dir, which is not set", hint="add `--cache-dir DIR`")


def model_name(argument: str | None) -> str:
    """Return the name of the model: the argument, else the environment's default."""
    return argument or Settings.from_environment().model


def used_draft(draft: str | None, speculate: int | None) -> str | None:
    """Return the value of `--draft`; None if `--speculate 0` turns drafts off."""
    return None if speculate == 0 else draft


def refuse_mlx_launch() -> None:
    """Check that `mlx.launch` has not started this process.

    Raises:
        UsageError: it has; this command starts its ranks itself.
    """
    if "MLX_RANK" in os.environ:
        raise UsageError(
            "this command was started by `mlx.launch` (MLX_RANK is set), but starts its ranks itself",
            hint="run it directly, with `--ranks N`; only `kimi-mlx download` works under `mlx.launch`",
        )
