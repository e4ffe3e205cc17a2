"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kimi_mlx.errors import UsageError
from kimi_mlx.parallel.placement import STRATEGIES, parse_strategy
from kimi_mlx.session.session import DEFAULT_CACHE_DISK_BYTES, MAX_CHECK_EVERY, MAX_DRAFT_TOKENS
from kimi_mlx.units import MB, format_bytes, parse_bytes

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="An alias (see `kimi-mlx models`), a folder, or a hub repository `owner/name`. "
        "Default: $KIMI_MLX_MODEL, else kimi-mini.",
        show_default=False,
    ),
]
RanksOption = Annotated[
    int,
    typer.Option("--ranks", min=1, help="Processes on this machine that share the model over MLX's ring."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16|float16",
        help="Type to compute in. Default: the checkpoint's on a GPU, float32 on the CPU.",
        show_default=False,
    ),
]
FastSyncOption = Annotated[
    bool,
    typer.Option(
        "--fast-sync",
        help="With MLX's fast fence (MLX_METAL_FAST_SYNCH=1): about 4 instead of 180 us each time ranks exchange "
        "something. Risky: it can wedge the GPU, so that the Mac must be restarted.",
    ),
]


def _check_strategy(text: str | None) -> str | None:
    if text is not None:
        parse_strategy(text)
    return text


StrategyOption = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME[:W:W...]",
        callback=_check_strategy,
        help=f"How ranks share the model: {', '.join(STRATEGIES)}; with weights for unequal ones, such as "
        "`pipeline:3:1`. Default: as it is stored, else what the planner finds best.",
        show_default=False,
    ),
]
SpeculateOption = Annotated[
    int,
    typer.Option(
        "--speculate",
        min=0,
        max=MAX_DRAFT_TOKENS,
        metavar="N",
        help="Draft up to N tokens a step from what was said before, and check them in one step: quicker where text "
        "repeats itself (code, quotations). The text stays the same.",
    ),
]
CheckEveryOption = Annotated[
    int,
    typer.Option(
        "--check-every",
        min=0,
        max=MAX_CHECK_EVERY,
        metavar="K",
        help="With several ranks: every K steps compare a hash of what they have, the logits or what a pipeline hands "
        "on; 0 never.",
    ),
]


def _parse_size(text: str | int) -> int:
    if isinstance(text, int):  # a default, which Typer reads, too
        return text
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise UsageError(str(error), hint="write it as `20GB` or `512MiB`") from None
    if size < MB:
        raise UsageError(f"a cache of {size} bytes holds nothing", hint="write its size as `20GB` or `512MiB`")
    return size


CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        file_okay=False,
        help="Keep the prompt cache in this folder of each host, too: what was read once is not computed again after a "
        "restart. Prompts lie in it in the clear, readable by you alone. Default: in memory only.",
        show_default=False,
    ),
]
CacheDiskOption = Annotated[
    int,
    typer.Option(
        "--cache-disk",
        parser=_parse_size,
        metavar="SIZE",
        help=f"All that may lie in --cache-dir on each host, such as `50GB`; what was used last stays. "
        f"Default: {format_bytes(DEFAULT_CACHE_DISK_BYTES)}.",
        show_default=False,
    ),
]
CacheMemoryOption = Annotated[
    int | None,
    typer.Option(
        "--cache-memory",
        parser=_parse_size,
        metavar="SIZE",
        help="Memory of each rank for the caches of all conversations, such as `20GB`. Default: what is free, "
        "for 8 full contexts at most.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def refuse_mlx_launch() -> None:
    """Refuse to be one of several processes that somebody else has started."""
    if "MLX_RANK" in os.environ:
        raise UsageError(
            "this command was started by `mlx.launch` (MLX_RANK is set), but starts its ranks itself",
            hint="type it alone, with `--ranks N`; only `kimi-mlx download` runs under `mlx.launch`",
        )
