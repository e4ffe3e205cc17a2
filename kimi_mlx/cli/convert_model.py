"""Carry out a conversion behind a progress bar, or only show its plan."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.progress import TaskID
from rich.table import Table

from kimi_mlx.cli.download_progress import byte_bars
from kimi_mlx.cli.fetch_model import fetch
from kimi_mlx.cli.output import hides_messages, print_json, slow_status, stderr, stdout
from kimi_mlx.hub.client import find_local, look_up
from kimi_mlx.model.names import TEXT_PREFIX
from kimi_mlx.store.hub_source import read_contents
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name
from kimi_mlx.text.template import check_text_files
from kimi_mlx.units import format_bytes, format_seconds
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.conversion import Conversion, open_conversion
from kimi_mlx.weights.convert import ConversionResult, convert
from kimi_mlx.weights.convert_folder import check_folder, check_space
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.convert_plan import plan_conversion
from kimi_mlx.weights.convert_report import list_notes, summarize
from kimi_mlx.weights.converted_files import ConversionPlan


def show_conversion(source: str, folder: Path, options: ConvertOptions, is_json: bool) -> None:
    """Print the plan of a conversion. For a repository that is not on this machine, download only the files' headers.

    Args:
        source: name of the checkpoint.
        folder: folder of the result.
        options: target format.
        is_json: whether to print JSON.

    Raises:
        KimiMlxError: the checkpoint cannot be converted, or the folder contains something else.
    """
    origin = resolve_model_name(source)
    if origin.repository is not None and find_local(origin.repository) is None:
        with slow_status(hides_messages(is_json)) as set_status:
            set_status(f"reading the headers of the files of {origin.name} on Hugging Face")
            plan = _plan_from_hub(origin.repository, options)
        _print_plan(plan, folder, is_json)
        return
    conversion = _open(origin, options, is_json)
    check_folder(conversion, folder)
    _print_plan(conversion.plan, folder, is_json)


def convert_model(source: str, folder: Path, options: ConvertOptions, is_json: bool) -> None:
    """Convert a checkpoint and print the result; the arguments are those of show_conversion().

    Raises:
        KimiMlxError: the checkpoint cannot be converted, or the folder cannot hold the result.
    """
    conversion = _open(resolve_model_name(source), options, is_json)
    check_folder(conversion, folder)
    check_space(conversion, folder)
    result = _run(conversion, folder, hides_messages(is_json))
    if is_json:
        print_json({**asdict(result), "folder": str(result.folder), "notes": list_notes(conversion.plan)})
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
    contents = read_contents(replace(look_up(repository), skips_vision=options.no_vision))
    config = contents.config()
    checkpoint = Checkpoint(replace(config, vision=None) if options.no_vision else config, contents.table, repository)
    checkpoint.check_names()
    has_prefix = any(name.startswith(TEXT_PREFIX) for name in contents.table)
    return plan_conversion(checkpoint, options, has_prefix)


def _open(origin: ModelRef, options: ConvertOptions, is_json: bool) -> Conversion:
    is_quiet = hides_messages(is_json)
    folder = _source_folder(origin, options, is_quiet)
    with slow_status(is_quiet) as set_status:
        set_status("reading the tokenizer and the headers of the files")
        check_text_files(folder)
        return open_conversion(folder, options)


def _source_folder(target: ModelRef, options: ConvertOptions, is_quiet: bool) -> Path:
    """Return the folder of the checkpoint, never of a store; it is downloaded if it is not on this machine."""
    if target.repository is None:
        assert target.folder is not None
        return target.folder
    folder = find_local(target.repository)
    if folder is not None:
        return folder
    with slow_status(is_quiet) as set_status:
        set_status(f"asking Hugging Face for the files of {target.name}")
        repository = look_up(target.repository)
    return fetch(target, replace(repository, skips_vision=options.no_vision), is_quiet)


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


def _print_plan(plan: ConversionPlan, folder: Path, is_json: bool) -> None:
    """Print the plan of a conversion."""
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
    for note in list_notes(plan):
        stderr.print(f"note: {note}", markup=False)
