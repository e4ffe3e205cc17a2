"""The process of a rank during a download to several hosts: each rank builds its own store, with data of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.hub.retries import LOG
from kimi_mlx.parallel.all_ranks import run_on_all_ranks
from kimi_mlx.parallel.checked_group import CheckedGroup
from kimi_mlx.parallel.group import MlxGroup
from kimi_mlx.rank.channel import Channel, run_rank
from kimi_mlx.rank.rendezvous import join_with_peers
from kimi_mlx.store.download import StoreOptions
from kimi_mlx.store.locate import stores_root
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.store.prepare import prepare_stores
from kimi_mlx.store.rounds import BuildProgress


class ChannelObserver:
    """Reports the progress of a download to the front: `starting`, `checking`, `rewriting`, `building`."""

    def __init__(self, channel: Channel):
        self._channel = channel

    @contextmanager
    def on_look_up(self) -> Generator[None]:
        """Report nothing: the front shows that it waits for the hosts."""
        yield

    def on_start(self, skipped_bytes: int) -> None:
        """Report that the download starts."""
        self._channel.send("starting", skipped_bytes=skipped_bytes)

    def on_check(self, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Report the bytes checked; yields the callback for further bytes."""
        return self._report_bytes("check", "checking", total_bytes)

    def on_rewrite(self, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Report the bytes rewritten; yields the callback for further bytes."""
        return self._report_bytes("rewrite", "rewriting", total_bytes)

    @contextmanager
    def on_build(self) -> Generator[Callable[[BuildProgress], None]]:
        """Report the building of stores; yields the callback for progress."""

        def report(progress: BuildProgress) -> None:
            self._channel.exit_if_ending()
            self._channel.report_progress("download")
            self._channel.send("building", **asdict(progress))

        yield report

    @contextmanager
    def _report_bytes(self, stage: str, kind: str, total_bytes: int) -> Generator[Callable[[int], None]]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            self._channel.exit_if_ending()
            done += count
            self._channel.report_progress(stage)
            self._channel.send(kind, done=done, total=total_bytes)

        yield advance


class WaitReporter(logging.Handler):
    """Sends the waits of the hub's client to the front as `waiting` messages. Each counts as progress."""

    def __init__(self, channel: Channel):
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Report a line of the hub's client."""
        self._channel.report_progress("download")
        self._channel.send("waiting", text=record.getMessage())


def main() -> None:
    """Run a rank."""
    run_rank(serve)


def serve(channel: Channel, start: Message) -> None:
    """Build the store, send the result as `done`, and wait for the end, so that no peer loses its neighbour."""
    LOG.addHandler(WaitReporter(channel))
    group = CheckedGroup(MlxGroup(join_with_peers(channel, start)), channel.sockets)
    channel.report_progress("download")
    target = run_on_all_ranks(group, lambda: resolve_model_name(start["model"]))
    options = StoreOptions(
        target.source,
        run_on_all_ranks(group, stores_root),
        group.size,
        start["strategy"],
        revision=start["revision"],
        keep_source=start["keep_source"],
        skips_vision=start["skips_vision"],
    )
    result = prepare_stores(
        target, options, group, ChannelObserver(channel), dry_run=start["dry_run"], verify=start["verify"]
    )
    channel.report_progress("idle")
    channel.send("done", result=result)
    channel.next_command()
