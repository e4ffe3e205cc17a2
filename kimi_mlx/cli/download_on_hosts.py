"""`kimi-mlx launch ... download`: each host fetches its part of a model, and keeps its store."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from kimi_mlx.cli.download_output import print_result
from kimi_mlx.cli.download_progress import TerminalObserver, byte_bars
from kimi_mlx.cli.open_model import LaunchContext, name_for_hosts
from kimi_mlx.cli.output import print_json, stderr
from kimi_mlx.cluster.ring.messages import Message
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.errors import RingError, UsageError, WeightsError
from kimi_mlx.store.locate import ModelRef
from kimi_mlx.store.prepare import DownloadReport
from kimi_mlx.store.rounds import BuildProgress
from kimi_mlx.units import format_bytes

MODULE = "kimi_mlx.rank.download"

STALL_S = 1800.0
"""Without a byte fetched or checked: the hub may ask us to wait for long."""


def download_over_hosts(
    launched: LaunchContext,
    target: ModelRef,
    revision: str | None,
    is_dry: bool,
    is_check: bool,
    keep_source: bool,
    *,
    is_json: bool,
) -> None:
    """Fetch a model once in all, and print what became of it.

    Raises:
        KimiMlxError: of any host; the same command goes on where it was.
    """
    if launched.cluster.size < 2:
        raise UsageError("there is only one rank", hint="name two hosts or more, or type `kimi-mlx download` alone")
    started = time.monotonic()
    limits = replace(launched.limits, stall_s=STALL_S)
    with closing(Ring(launched.cluster, limits, MODULE)) as ring, _shown(target, is_json) as show:
        ring.start(
            model=name_for_hosts(target),
            strategy=launched.choice.strategy,
            revision=revision,
            is_dry=is_dry,
            is_check=is_check,
            keep_source=keep_source,
        )
        results = _results(ring, show)
    hosts = [host.ssh for host in launched.cluster.hostfile.hosts]
    result: DownloadReport = {**_joined(results, hosts), "seconds": round(time.monotonic() - started, 3)}
    if is_json:
        print_json(result)
    else:
        print_result(result)
    for each in result["hosts"]:
        missing = each.get("disk_needed_bytes", 0) - each.get("disk_free_bytes", 0)
        if missing > 0:
            raise WeightsError(
                f"the disk of `{each['host']}` is {format_bytes(missing)} too small",
                hint="free some space there, or keep stores elsewhere: `--env KIMI_MLX_STORES=FOLDER`",
            )


def _results(ring: Ring, show: Any) -> dict[int, DownloadReport]:
    results: dict[int, DownloadReport] = {}
    try:
        for rank, message in ring.messages():
            if message["kind"] == "done":
                results[rank] = message["result"]
            elif rank == 0:
                show(message)
            if len(results) == ring.world_size:
                break
    except RingError as error:
        raise RingError(error.message, f"type the same command again, it goes on where it was; {error.hint}") from error
    return results


@contextmanager
def _shown(target: ModelRef, is_quiet: bool) -> Generator[Any]:
    """Bars of what rank 0 tells; yields what to call with its messages."""
    with byte_bars(is_quiet) as bars:
        tasks: dict[str, Any] = {}

        def bar(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=None)
            bars.update(tasks[what], completed=done, total=total)

        def show(message: Message) -> None:
            if message["kind"] == "beginning":
                TerminalObserver(target, is_quiet).beginning(message["vision_bytes"])
            elif message["kind"] == "checking":
                bar("checking", message["done"], message["total"])
            elif message["kind"] == "building":
                progress = BuildProgress(**{name: value for name, value in message.items() if name != "kind"})
                bar(f"fetching {target.name}", progress.fetched_bytes, progress.total_bytes)
                bar("storing", progress.stored_bytes, progress.total_bytes)

        try:
            yield show
        except (KeyboardInterrupt, SystemExit):
            if not is_quiet:
                stderr.print("stopped; run the same command again to resume", markup=False)
            raise


def _joined(results: dict[int, DownloadReport], hosts: list[str]) -> DownloadReport:
    """One result of all: rank 0's, with the stores of all ranks and the disks of all hosts."""
    disk = ("disk_needed_bytes", "disk_free_bytes")
    each = [
        {"host": hosts[rank], "folder": result["folder"]} | {name: result[name] for name in disk if name in result}
        for rank, result in sorted(results.items())
    ]
    ranks = (
        results[0]["ranks"]
        if "files" in results[0]
        else [item for r in sorted(results) for item in results[r]["ranks"]]
    )
    kept = sum(result.get("kept_bytes", 0) for result in results.values())
    return {**results[0], "ranks": ranks, "hosts": each, "kept_bytes": kept}
