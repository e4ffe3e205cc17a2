"""`kimi-mlx convert`: convert a checkpoint of any supported format to MLX's affine quantization."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import TaskID
from rich.table import Table

from kimi_mlx.cli.download_progress import byte_bars
from kimi_mlx.cli.fetch_model import fetch
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import QUANTIZATION, JsonOption
from kimi_mlx.cli.output import print_json, stderr, stdout
from kimi_mlx.hub.client import find_local, look_up
from kimi_mlx.model.names import TEXT_PREFIX
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name
from kimi_mlx.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kimi_mlx.weights.conversion import Conversion
    from kimi_mlx.weights.convert import ConversionResult
    from kimi_mlx.weights.convert_options import ConvertOptions
    from kimi_mlx.weights.convert_plan import ConversionPlan

Bits = Literal["2", "3", "4", "5", "6", "8", "bf16"]


@dataclass(frozen=True)
class QuantizationOptions:
    """Options of the target format."""

    bits: Annotated[
        Bits | None,
        typer.Option(
            "--bits",
            help="Bits of all quantizable matrices; bf16 keeps floats, as bfloat16. Default: quantized matrices are "
            "copied unchanged; if there are none (FP8, floats), 4.",
            show_default=False,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    expert_bits: Annotated[
        Bits | None,
        typer.Option(
            "--expert-bits",
            help="Bits of the routed experts, which are most of the model; --bits is then for the rest. Default: as "
            "--bits. Without --bits the rest gets 8 bits.",
            show_default=False,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    group_size: Annotated[
        Literal["32", "64", "128"] | None,
        typer.Option(
            "--group-size",
            help="Number of values that share a scale and a bias. Default: 64; 32 if SRC has experts in groups of 32.",
            show_default=False,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None

    def to_options(self) -> ConvertOptions:
        """Return the options as numbers."""
        from kimi_mlx.weights.convert_options import ConvertOptions

        group_size = int(self.group_size) if self.group_size else None
        return ConvertOptions(_number(self.bits), _number(self.expert_bits), group_size)


@with_option_groups
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Checkpoint to convert: an alias, a folder, or a Hugging Face repository `owner/name`; FP8, INT4, "
            "floats, or MLX's own format.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="New folder, or one with an unfinished run of the same conversion.")
    ],
    quantization: QuantizationOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be done and the size of the result.")
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

    options = quantization.to_options()
    folder, origin = target.expanduser(), resolve_model_name(source)
    if dry_run and origin.repository is not None and find_local(origin.repository) is None:
        _show_plan(_plan_from_hub(origin.repository, options), folder, json)
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
        f"{result.bits_per_weight:.2f} bits per weight, in {format_seconds(result.seconds)}",
        markup=False,
    )
    if result.files_before:
        stdout.print(f"{result.files_before} of these files are from an earlier run", markup=False)
    _print_notes(conversion.plan)


def _plan_from_hub(repository: str, options: ConvertOptions) -> ConversionPlan:
    """Return the plan of a repository that is not on this machine; downloads only the headers of its files."""
    from kimi_mlx.store.hub_source import read_contents
    from kimi_mlx.weights.checkpoint import Checkpoint
    from kimi_mlx.weights.convert_plan import plan_conversion

    contents = read_contents(look_up(repository))
    checkpoint = Checkpoint(contents.config(), contents.table, repository)
    checkpoint.check_names()
    has_prefix = any(name.startswith(TEXT_PREFIX) for name in contents.table)
    return plan_conversion(checkpoint, options, has_prefix)


def _source_folder(target: ModelRef, is_quiet: bool) -> Path:
    """Return the folder of the checkpoint, never of a store; it is downloaded if it is not on this machine."""
    if target.repository is None:
        assert target.folder is not None
        return target.folder
    folder = find_local(target.repository)
    return fetch(target, look_up(target.repository), is_quiet) if folder is None else folder


def _number(bits: Bits | None) -> int | None:
    from kimi_mlx.weights.convert_options import BFLOAT16_BITS

    return None if bits is None else BFLOAT16_BITS if bits == "bf16" else int(bits)


def _run(conversion: Conversion, folder: Path, is_quiet: bool) -> ConversionResult:
    """Convert behind a progress bar; if it is stopped, print how to resume."""
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
    """Show a progress bar of bytes written, on stderr of a terminal.

    Yields:
        function to call with (done, total).
    """
    with byte_bars(is_quiet) as progress:
        task: TaskID | None = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None:  # bytes of an earlier run count for the bar, not for the speed
                task = progress.add_task("converting", completed=done, total=total)
            progress.update(task, completed=done)

        yield show


def _show_plan(plan: ConversionPlan, folder: Path, is_json: bool) -> None:
    """Print what would be done."""
    from kimi_mlx.weights.convert_report import list_notes, summarize

    if is_json:
        print_json(
            {
                "folder": str(folder),
                "files": len(plan.files),
                "size_bytes": plan.size_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "matrices": [asdict(row) for row in summarize(plan)],
                "notes": list_notes(plan),
            }
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("tensors", "from", "to"):
        table.add_column(header)
    table.add_column("size", justify="right")
    for row in summarize(plan):
        table.add_row(row.kind, row.source, row.target, format_bytes(row.size_bytes))
    stdout.print(table, soft_wrap=False)
    stdout.print(
        f"{folder}: {len(plan.files)} files, {format_bytes(plan.size_bytes)}, "
        f"{plan.bits_per_weight:.2f} bits per weight; nothing has been written",
        markup=False,
    )
    _print_notes(plan)


def _print_notes(plan: ConversionPlan) -> None:
    from kimi_mlx.weights.convert_report import list_notes

    for note in list_notes(plan):
        stderr.print(f"note: {note}", markup=False)


def _result_to_dict(result: ConversionResult, conversion: Conversion) -> dict[str, Any]:
    from kimi_mlx.weights.convert_report import list_notes

    return {**asdict(result), "folder": str(result.folder), "notes": list_notes(conversion.plan)}
