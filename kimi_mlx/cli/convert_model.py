"""Carry out a conversion behind a progress bar, or only show its plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import TaskID
from rich.table import Table

from kimi_mlx.cli.checkpoint_folder import checkpoint_folder
from kimi_mlx.cli.download_progress import byte_bars
from kimi_mlx.cli.output import hides_messages, print_json, slow_status, stderr, stdout
from kimi_mlx.errors import UnreachableError
from kimi_mlx.hub.client import find_local, look_up
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.names import TEXT_PREFIX
from kimi_mlx.planner.model_shape import known_config
from kimi_mlx.store.hub_source import read_contents
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name
from kimi_mlx.text.template import check_text_files
from kimi_mlx.units import format_bytes, format_duration, format_seconds
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.conversion import Conversion, open_conversion
from kimi_mlx.weights.convert import ConversionResult, convert
from kimi_mlx.weights.convert_folder import check_folder, check_space
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.convert_plan import plan_conversion
from kimi_mlx.weights.convert_report import list_importance_notes, list_notes, summarize
from kimi_mlx.weights.converted_files import ConversionPlan
from kimi_mlx.weights.importance import Importance
from kimi_mlx.weights.reference_table import PublishedFormat, reference_checkpoint
from kimi_mlx.weights.scale_search import measure_speed


def show_conversion(source: str, folder: Path, options: ConvertOptions, importance: Path | None, is_json: bool) -> None:
    """Print the plan of a conversion. For a repository that is not on this machine, download only the files' headers.

    If the hub cannot be reached, the plan of a known model is made from its known dimensions.

    Args:
        source: name of the checkpoint.
        folder: folder of the result.
        options: target format.
        importance: importance file, if any.
        is_json: whether to print JSON.

    Raises:
        KimiMlxError: the checkpoint cannot be converted, or the folder contains something else.
    """
    origin = resolve_model_name(source)
    weighs = None if importance is None else Importance(importance.expanduser())
    notes: list[str] = []
    if origin.repository is not None and find_local(origin.repository) is None:
        plan, notes = _plan_without_files(origin, options, hides_messages(is_json))
        if weighs is not None:
            weighs.check(plan.weights)
            notes.append("the importance file is compared by names and shapes only, because no weights are here")
    else:
        conversion = _open(origin, options, weighs, is_json)
        check_folder(conversion, folder)
        plan = conversion.plan
    search_s = estimate_search_s(plan, weighs is not None) if options.scales == "search" else None
    _print_plan(plan, folder, search_s, [*list_notes(plan), *list_importance_notes(weighs), *notes], is_json)


def convert_model(source: str, folder: Path, options: ConvertOptions, importance: Path | None, is_json: bool) -> None:
    """Convert a checkpoint and print the result; the arguments are those of show_conversion().

    Raises:
        KimiMlxError: the checkpoint cannot be converted, or the folder cannot hold the result.
    """
    weighs = None if importance is None else Importance(importance.expanduser())
    conversion = _open(resolve_model_name(source), options, weighs, is_json)
    check_folder(conversion, folder)
    check_space(conversion, folder)
    result = _run(conversion, folder, hides_messages(is_json))
    notes = [*list_notes(conversion.plan), *list_importance_notes(weighs)]
    if is_json:
        print_json({**asdict(result), "folder": str(result.folder), "notes": notes})
        return
    stdout.print(
        f"{result.folder}: {result.files} files, {format_bytes(result.size_bytes)}, "
        f"{result.bits_per_weight:.2f} bits per weight, in {format_seconds(result.seconds)}",
        markup=False,
    )
    if result.files_before:
        stdout.print(f"{result.files_before} of these files are from an earlier run", markup=False)
    if result.relative_errors:
        errors = ", ".join(f"{kind} {100 * error:.2g} %" for kind, error in result.relative_errors.items())
        stdout.print(f"relative error of the weights: {errors}", markup=False)
    _print_notes(notes)


def _plan_without_files(origin: ModelRef, options: ConvertOptions, is_quiet: bool) -> tuple[ConversionPlan, list[str]]:
    """Return the plan of a repository that is not on this machine, and notes on where it comes from."""
    assert origin.repository is not None
    form = _published_format(origin)
    try:
        with slow_status(is_quiet) as set_status:
            set_status(f"reading the headers of the files of {origin.name} on Hugging Face")
            return _plan_from_hub(origin.repository, options), []
    except UnreachableError as error:
        if form is None or origin.entry is None:
            raise
        reason = error.message
    config = known_config(origin.entry.alias)
    checkpoint = reference_checkpoint(replace(config, vision=None) if options.no_vision else config, form, origin.name)
    plan = plan_conversion(checkpoint, options, has_prefix=config.vision is not None)
    return plan, [f"planned from the known dimensions of {origin.entry.title}, not from its files: {reason}"]


def _published_format(origin: ModelRef) -> PublishedFormat | None:
    """Return the format of a known repository whose dimensions are known too; None for others."""
    entry = origin.entry
    if entry is None:
        return None
    if entry.repository != entry.original_repository and origin.repository == entry.repository:
        return "mlx-4bit" if entry.format == "MLX 4-bit g64" else "int4" if "INT4" in entry.format else None
    return "int4" if "INT4" in entry.format else "fp8" if entry.alias.startswith("kimi-k2") else None


def _plan_from_hub(repository: str, options: ConvertOptions) -> ConversionPlan:
    """Return the plan of a repository that is not on this machine; downloads only the headers of its files."""
    contents = read_contents(replace(look_up(repository), skips_vision=options.no_vision))
    config = contents.config()
    checkpoint = Checkpoint(replace(config, vision=None) if options.no_vision else config, contents.table, repository)
    checkpoint.check_names()
    has_prefix = any(name.startswith(TEXT_PREFIX) for name in contents.table)
    return plan_conversion(checkpoint, options, has_prefix)


def _open(origin: ModelRef, options: ConvertOptions, importance: Importance | None, is_json: bool) -> Conversion:
    is_quiet = hides_messages(is_json)
    folder = checkpoint_folder(origin, options.no_vision, is_quiet)
    with slow_status(is_quiet) as set_status:
        set_status("reading the tokenizer and the headers of the files")
        check_text_files(folder)
        return open_conversion(folder, options, importance)


def _run(conversion: Conversion, folder: Path, is_quiet: bool) -> ConversionResult:
    """Convert behind a progress bar; if it is stopped, print how to resume."""
    try:
        with _progress(is_quiet) as progress:
            return convert(conversion, folder, progress)
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


def estimate_search_s(plan: ConversionPlan, has_importance: bool) -> float:
    """Return the seconds that the search for scales takes on this device, from short runs."""
    values: Counter[Quantization] = Counter()
    for weight in plan.weights:
        if not weight.is_copied and weight.plan.quantization is not None:
            values[weight.plan.quantization] += math.prod(weight.shape)
    return sum(count / measure_speed(quantization, has_importance) for quantization, count in values.items())


def _print_plan(plan: ConversionPlan, folder: Path, search_s: float | None, notes: list[str], is_json: bool) -> None:
    """Print the plan of a conversion, with the duration of the search for scales if there is one."""
    if is_json:
        report: dict[str, Any] = {
            "folder": str(folder),
            "files": len(plan.files),
            "size_bytes": plan.size_bytes,
            "bits_per_weight": plan.bits_per_weight,
            "matrices": [asdict(row) for row in summarize(plan)],
            "notes": notes,
        }
        print_json(report if search_s is None else {**report, "search_s": search_s})
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
    if search_s is not None:
        stdout.print(
            f"the search for scales takes about {format_duration(search_s)} on this machine, reading and writing not "
            "included",
            markup=False,
        )
    _print_notes(notes)


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        stderr.print(f"note: {note}", markup=False)
