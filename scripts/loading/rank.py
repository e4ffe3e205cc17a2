"""A rank of the loading benchmark: on a command, it loads its share of a model and reports time and memory.

The clock starts at the command, when everything is imported and the ranks are connected; it ends when all parameters
are in memory. The process then waits until its input ends.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.group import MlxGroup
from kimi_mlx.rank.channel import Channel, run_rank
from kimi_mlx.rank.rendezvous import join_with_peers
from kimi_mlx.runtime.load import load_share, prepare_device

Loader = Callable[[], nn.Module]
PROCESS = Path("/proc/self")


def main() -> None:
    """Load with kimi-mlx, from a store or from a checkpoint."""
    run(open_kimi_mlx)


def open_kimi_mlx(start: Message, group: mx.distributed.Group) -> Loader:
    """Return a function that loads this rank's share."""
    folder = Path(start["folders"][group.rank()])
    return lambda: load_share(folder, load_config(folder), start["dtype"], MlxGroup(group))


def run(open_loader: Callable[[Message, mx.distributed.Group], Loader]) -> None:
    """Run a rank: prepare, wait for the command, load, and report. Does not return."""

    def serve(channel: Channel, start: Message) -> None:
        prepare_device()
        group = join_with_peers(channel, start)
        load = open_loader(start, group)
        channel.send("ready")
        channel.next_command()
        channel.report_progress("load")
        channel.send("measured", load=measure(load))
        channel.next_command()

    run_rank(serve)


def measure(load: Loader) -> dict[str, Any]:
    """Load, and return the fields of scripts.loading.measure.Load."""
    before_bytes = start_memory()
    mx.reset_peak_memory()
    mlx_before_bytes = mx.get_active_memory()
    before = bytes_read()
    started = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - started
    after = bytes_read()
    read, disk = (None, None) if before is None or after is None else (after[0] - before[0], after[1] - before[1])
    parameters: Any = tree_flatten(model.parameters())
    return {
        "seconds": seconds,
        "read_bytes": read,
        "disk_bytes": disk,
        "held_bytes": sum(array.nbytes for _, array in parameters),
        "peak_bytes": peak_memory() - before_bytes,
        "mlx_peak_bytes": mx.get_peak_memory() - mlx_before_bytes,
    }


def bytes_read() -> tuple[int, int] | None:
    """Return the bytes that this process has read by system calls, and from the disk; None on macOS."""
    path = PROCESS / "io"
    if not path.exists():
        return None
    fields = dict(line.split(": ") for line in path.read_text().splitlines())
    return int(fields["rchar"]), int(fields["read_bytes"])


def start_memory() -> int:
    """Return the current RSS of this process (macOS: its peak so far), and restart the peak of peak_memory."""
    if (PROCESS / "clear_refs").exists():
        (PROCESS / "clear_refs").write_text("5")  # reset the peak
        return _status_bytes("VmRSS")
    return peak_memory()


def peak_memory() -> int:
    """Return the peak RSS of this process.

    Linux does not use ru_maxrss, because a child inherits its parent's.
    """
    if (PROCESS / "status").exists():
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status_bytes(name: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


if __name__ == "__main__":
    main()
