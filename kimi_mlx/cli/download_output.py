"""Output of `kimi-mlx download`: the folder of the model, or what would be downloaded."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.output import stderr, stdout
from kimi_mlx.errors import WeightsError
from kimi_mlx.store.prepare import DownloadReport
from kimi_mlx.units import format_bytes, format_gib, format_seconds


def print_result(result: DownloadReport) -> None:
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
    rows += [("disk needed", result["disk_needed_bytes"]), ("disk free", result["disk_free_bytes"])]
    for name, size in rows:
        table.add_row(Text(name), f"{size / 1e9:,.3f}", f"{size / 2**30:,.3f}")
    stdout.print(table, soft_wrap=False)
    if result["disk_needed_bytes"] <= result["disk_free_bytes"]:
        stdout.print(f"the disk of {result['folder']} has enough free space; nothing has been downloaded", markup=False)


def check_disk(result: DownloadReport) -> None:
    """Check that a dry run found enough free disk space.

    Raises:
        WeightsError: there is not enough.
    """
    missing = result.get("disk_needed_bytes", 0) - result.get("disk_free_bytes", 0)
    if missing > 0:
        raise WeightsError(
            f"not enough disk space: {format_bytes(missing)} ({format_gib(missing)}) are missing",
            hint="free some space, or set KIMI_MLX_STORES (stores) or HF_HUB_CACHE (checkpoints) to a larger disk",
        )
