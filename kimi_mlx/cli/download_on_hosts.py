"""`kimi-mlx launch ... download`: each host downloads a part of the files and stores its share of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from kimi_mlx.cli.download import DownloadOptions
from kimi_mlx.cli.download_output import show_result
from kimi_mlx.cli.download_progress import TerminalObserver, byte_bars, fetch_label, print_rewrite
from kimi_mlx.cli.open_model import LaunchContext, name_for_hosts
from kimi_mlx.cli.output import closing_with_status, hides_messages, stderr
from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.errors import RingError, UsageError
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name
from kimi_mlx.store.prepare import DownloadReport
from kimi_mlx.store.rounds import BuildProgress

MODULE = "kimi_mlx.rank.download"

WAITING = "waiting"
"""Key of the bar before the first message of the hosts."""

STALL_S = 1800.0
"""Timeout without progress: Hugging Face may ask clients to wait for a long time."""


def download_on_hosts(launch: LaunchContext, name: str, options: DownloadOptions, is_json: bool) -> None:
    """Download a model, each file by one host only, and print the result.

    Args:
        launch: the hosts.
        name: name of the model.
        options: options of the user; the placement is that of `launch`.
        is_json: whether to print JSON.

    Raises:
        KimiMlxError: error of any host; the same command resumes.
    """
    if launch.cluster.size < 2:
        raise UsageError(
            "there is only one rank", hint="name two or more hosts, or run `kimi-mlx download` without launch"
        )
    started = time.monotonic()
    target = resolve_model_name(name)
    timeouts = replace(launch.timeouts, stall_s=STALL_S)
    is_quiet = hides_messages(is_json)
    ring = Ring(launch.cluster, timeouts, MODULE)
    with closing_with_status(ring, is_quiet), _show_progress(target, is_quiet) as show:
        ring.start(
            model=name_for_hosts(target),
            strategy=launch.choice.strategy,
            revision=options.revision,
            dry_run=options.dry_run,
            verify=options.verify,
            keep_source=options.keep_source,
            skips_vision=options.no_vision,
        )
        names = [host.ssh for host in launch.cluster.hostfile.hosts]
        results = _collect(ring, show, names)
    result: DownloadReport = {**_merge(results, names), "seconds": round(time.monotonic() - started, 3)}
    show_result(result, is_json)


def _collect(ring: Ring, show: Callable[[Message], None], names: list[str]) -> dict[int, DownloadReport]:
    """Return the report of each rank. Meanwhile show rank 0's progress, and which host waits for the hub."""
    results: dict[int, DownloadReport] = {}
    try:
        for rank, message in ring.messages():
            if message["kind"] == "done":
                results[rank] = message["result"]
            elif message["kind"] == "waiting":
                show({**message, "text": f"{names[rank]}: {message['text']}"})
            elif rank == 0:
                show(message)
            if len(results) == ring.world_size:
                break
    except RingError as error:
        raise RingError(error.message, f"run the same command again to resume; {error.hint}") from error
    return results


@contextmanager
def _show_progress(target: ModelRef, is_quiet: bool) -> Generator[Callable[[Message], None]]:
    """Show progress bars of rank 0.

    Yields:
        function to call with its messages.
    """
    with byte_bars(is_quiet) as bars:
        tasks: dict[str, Any] = {}
        if stderr.is_terminal:  # until the first host reports
            tasks[WAITING] = bars.add_task(f"starting {target.name} on the hosts", total=None)

        def bar(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=None)
            bars.update(tasks[label], completed=done, total=total)

        def show(message: Message) -> None:
            if WAITING in tasks:
                bars.remove_task(tasks.pop(WAITING))
            if message["kind"] == "starting":
                TerminalObserver(target, is_quiet).on_start(message["skipped_bytes"])
            elif message["kind"] == "waiting":
                stderr.print(message["text"], markup=False)
            elif message["kind"] in ("checking", "rewriting"):
                if message["kind"] not in tasks and message["kind"] == "rewriting":
                    print_rewrite(message["total"], is_quiet)
                bar(message["kind"], message["done"], message["total"])
            elif message["kind"] == "building":
                progress = BuildProgress(**{name: value for name, value in message.items() if name != "kind"})
                bar(fetch_label(target), progress.fetched_bytes, progress.total_bytes)
                bar("storing", progress.stored_bytes, progress.total_bytes)

        try:
            yield show
        except (KeyboardInterrupt, SystemExit):
            if not is_quiet:
                stderr.print("stopped; run the same command again to resume", markup=False)
            raise


def _merge(results: dict[int, DownloadReport], names: list[str]) -> DownloadReport:
    """Return rank 0's report with the stores of all ranks and the disks of all hosts."""
    disk = ("disk_needed_bytes", "disk_free_bytes")
    hosts = [
        {"host": names[rank], "folder": result["folder"]} | {name: result[name] for name in disk if name in result}
        for rank, result in sorted(results.items())
    ]
    ranks = (
        results[0]["ranks"]
        if "files" in results[0]
        else [item for r in sorted(results) for item in results[r]["ranks"]]
    )
    kept_bytes = sum(result.get("kept_bytes", 0) for result in results.values())
    return {**results[0], "ranks": ranks, "hosts": hosts, "kept_bytes": kept_bytes}
