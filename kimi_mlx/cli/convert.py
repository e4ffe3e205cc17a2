"""`kimi-mlx convert`: a checkpoint in any layout that we read, to MLX's affine one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import TaskID
from rich.table import Table

from kimi_mlx.cli.download_progress import byte_bars
from kimi_mlx.cli.fetch_model import fetch
from kimi_mlx.cli.options import JsonOption
from kimi_mlx.cli.output import print_json, stderr, stdout
from kimi_mlx.hub.client import find_local, look_up
from kimi_mlx.model.names import TEXT_PREFIX
from kimi_mlx.store.locate import ModelRef, resolve_model_name
from kimi_mlx.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kimi_mlx.weights.conversion import Conversion
    from kimi_mlx.weights.convert import ConversionResult
    from kimi_mlx.weights.convert_plan import ConversionPlan, ConvertOptions

Bits = Literal["2", "3", "4", "5", "6", "8", "bf16"]


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="The checkpoint: an alias, a folder, or a hub repository `owner/name`, in FP8, INT4, floats, or MLX's "
            "own layout.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="A new folder, or one with an unfinished run of the same conversion.")
    ],
    bits: Annotated[
        Bits | None,
        typer.Option(
            "--bits",
            help="Bits of every matrix that can be quantized; bf16 keeps floats, in bfloat16. Default: what is "
            "quantized stays as it is, bit for bit; if nothing is (FP8, floats), 4.",
            show_default=False,
        ),
    ] = None,
    expert_bits: Annotated[
        Bits | None,
        typer.Option(
            "--expert-bits",
            help="Bits of the routed experts, nearly all of the model; then --bits is of the rest. Default: as --bits, "
            "and with this option alone 8 for the rest.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[
        Literal["32", "64", "128"] | None,
        typer.Option(
            "--group-size",
            help="Values that share a scale and a bias. Default: 64; 32 if SRC has experts in groups of 32.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done and how large the result is; write nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Convert a checkpoint to MLX's quantized format.

    mlx-lm and others read the result too. Memory use is small for any model size. Run the same command again to
    resume. Tensors already in the requested format are copied unchanged; others are re-quantized, which loses more
    than quantizing the original floats. Norms and the router are never quantized. Floats keep the type of SRC.
    """
    from kimi_mlx.weights.conversion import open_conversion
    from kimi_mlx.weights.convert_folder import check_folder, check_space
    from kimi_mlx.weights.convert_plan import ConvertOptions

    options = ConvertOptions(_number(bits), _number(expert_bits), int(group_size) if group_size else None)
    folder, origin = target.expanduser(), resolve_model_name(source)
    if dry_run and origin.repository is not None and find_local(origin.repository) is None:
        _show_plan(_plan_from_afar(origin.repository, options), folder, json)
        return
    conversion = open_conversion(_source_folder(origin, json), options)
    check_folder(conversion, folder)
    if dry_run:
        _show_plan(conversion.plan, folder, json)
        return
    check_space(conversion, folder)
    result = _run(conversion, folder, json)
    if json:
        print_json(_result_to_dict(result, conversion))
        return
    stdout.print(
        f"{result.folder}: {result.files} files, {format_bytes(result.size_bytes)}, "
        f"{result.bits_per_weight:.2f} bits a weight, in {format_seconds(result.seconds)}",
        markup=False,
    )
    if result.files_before:
        stdout.print(f"{result.files_before} of the files were there from an earlier run", markup=False)
    _print_notes(conversion.plan)


def _plan_from_afar(repository: str, options: ConvertOptions) -> ConversionPlan:
    """The plan for a repository that is not here, from its headers."""
    from kimi_mlx.store.sources import read_contents
    from kimi_mlx.weights.checkpoint import Checkpoint
    from kimi_mlx.weights.convert_plan import plan_conversion

    contents = read_contents(look_up(repository))
    checkpoint = Checkpoint(contents.config(), contents.table, repository)
    checkpoint.check_names()
    has_prefix = any(name.startswith(TEXT_PREFIX) for name in contents.table)
    return plan_conversion(checkpoint, options, has_prefix)


def _source_folder(target: ModelRef, is_quiet: bool) -> Path:
    """The folder of the checkpoint itself, never of a shard store; fetched if it is not here."""
    if target.repository is None:
        assert target.folder is not None
        return target.folder
    folder = find_local(target.repository)
    return fetch(target, look_up(target.repository), is_quiet) if folder is None else folder


def _number(bits: Bits | None) -> int | None:
    from kimi_mlx.weights.convert_plan import BFLOAT16_BITS

    return None if bits is None else BFLOAT16_BITS if bits == "bf16" else int(bits)


def _run(conversion: Conversion, folder: Path, is_quiet: bool) -> ConversionResult:
    """Convert, with a bar; Ctrl-C leaves word how to go on."""
    from kimi_mlx.weights.convert import convert as run

    try:
        with _progress(is_quiet) as progress:
            return run(conversion, folder, progress)
    except (KeyboardInterrupt, SystemExit):
        if not is_quiet:
            stderr.print("stopped; run the same command again to resume", markup=False)
        raise


@contextmanager
def _progress(is_quiet: bool) -> Generator[Callable[[int, int], None]]:
    """A bar of bytes written, on stderr of a terminal; yields what to call with (done, total)."""
    with byte_bars(is_quiet) as progress:
        task: TaskID | None = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None:  # what an earlier run has done counts for the bar, not for the speed
                task = progress.add_task("converting", completed=done, total=total)
            progress.update(task, completed=done)

        yield show


def _show_plan(plan: ConversionPlan, folder: Path, is_json: bool) -> None:
    """What would be done."""
    if is_json:
        print_json(
            {
                "folder": str(folder),
                "files": len(plan.files),
                "size_bytes": plan.size_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "matrices": [asdict(row) for row in plan.summary()],
                "notes": plan.notes(),
            }
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("what", "from", "to"):
        table.add_column(header)
    table.add_column("size", justify="right")
    for row in plan.summary():
        table.add_row(row.kind, row.source, row.target, format_bytes(row.size_bytes))
    stdout.print(table, soft_wrap=False)
    stdout.print(
        f"{folder}: {len(plan.files)} files, {format_bytes(plan.size_bytes)}, "
        f"{plan.bits_per_weight:.2f} bits a weight; nothing has been written",
        markup=False,
    )
    _print_notes(plan)


def _print_notes(plan: ConversionPlan) -> None:
    for note in plan.notes():
        stderr.print(f"note: {note}", markup=False)


def _result_to_dict(result: ConversionResult, conversion: Conversion) -> dict[str, Any]:
    return {**asdict(result), "folder": str(result.folder), "notes": conversion.plan.notes()}
