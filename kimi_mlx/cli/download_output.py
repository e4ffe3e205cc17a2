"""Output of `kimi-mlx download`: the folder of the model, or what would be downloaded."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.output import error_to_dict, print_json, stderr, stdout
from kimi_mlx.errors import WeightsError
from kimi_mlx.store.prepare import DownloadReport
from kimi_mlx.units import format_bytes, format_gib, format_seconds


def _print_result(result: DownloadReport) -> None:
    """Print the folder on stdout and the rest on stderr; a dry run prints a table on stdout."""
    if "files" in result:
        _print_dry_run(result)
        return
    seconds = format_seconds(result["seconds"])
    stderr.print(f"{result['model']} {result['state']}, {seconds}", markup=False, style="dim")
    for rank in result.get("ranks", []):
        stderr.print(f"rank {rank['rank']}: {format_bytes(rank['size_bytes'])}", style="dim")
    if kept_bytes := result.get("kept_bytes"):
        stderr.print(
            f"{format_bytes(kept_bytes)} of it were in the Hugging Face cache before and are kept; "
            f"remove them with `hf cache rm model/{result['repository']}`",
            style="dim",
            markup=False,
        )
    stdout.print(result["folder"], markup=False)


def _print_dry_run(result: DownloadReport) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(Text(f"{result['repository']} at {result['commit'][:12]}"), overflow="fold")
    for unit in ("GB", "GiB"):
        table.add_column(unit, justify="right")
    rows = [(file["name"], file["size_bytes"]) for file in result["files"]]
    rows += [("configuration and tokenizer", result["small_bytes"])]
    rows += [("all files", sum(size for _, size in rows)), ("still to download", result["fetch_bytes"])]
    rows += [(f"rank {rank['rank']}", rank["size_bytes"]) for rank in result["ranks"]]
    if rewrite_bytes := result.get("rewrite_bytes"):
        rows += [("to rewrite, file by file", rewrite_bytes)]
    rows += [("disk needed", result["disk_needed_bytes"]), ("disk free", result["disk_free_bytes"])]
    for name, size in rows:
        table.add_row(Text(name), f"{size / 1e9:,.3f}", f"{size / 2**30:,.3f}")
    stdout.print(table, soft_wrap=False)
    if result["disk_needed_bytes"] <= result["disk_free_bytes"]:
        stdout.print(f"the disk of {result['folder']} has enough free space; nothing has been downloaded", markup=False)


def show_result(result: DownloadReport, is_json: bool) -> None:
    """Print the result of a download, or of a dry run.

    Args:
        result: report of the download.
        is_json: whether to print JSON.

    Raises:
        WeightsError: a dry run found too little disk space; as JSON, its message is part of the result.
        typer.Exit: the same, after the JSON.
    """
    problem = _disk_problem(result)
    if is_json:
        print_json(result if problem is None else {**result, **error_to_dict(problem)})
        if problem is not None:
            raise typer.Exit(1)
        return
    _print_result(result)
    if problem is not None:
        raise problem


def _disk_problem(result: DownloadReport) -> WeightsError | None:
    """Return the error of a disk that is too small, of this machine or of a host; None if there is enough space."""
    for host in result.get("hosts", [result]):
        missing = host.get("disk_needed_bytes", 0) - host.get("disk_free_bytes", 0)
        if missing > 0 and "host" in host:
            return WeightsError(
                f"not enough disk space on `{host['host']}`: {format_bytes(missing)} are missing",
                hint="free some space there, or use another folder: `--env KIMI_MLX_STORES=FOLDER`",
            )
        if missing > 0:
            return WeightsError(
                f"not enough disk space: {format_bytes(missing)} ({format_gib(missing)}) are missing",
                hint="free some space, or set KIMI_MLX_STORES (stores) or HF_HUB_CACHE (checkpoints) to a larger disk",
            )
    return None
