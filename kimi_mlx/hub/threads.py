"""The same work for many things, on several threads that stop soon."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")

GRACE_S = 1.0
"""How long to wait for threads that are to stop; one that waits for the network finds out later, and does nothing."""


def for_each(work: Callable[[Item, threading.Event], object], items: Iterable[Item], workers: int) -> None:
    """Call `work(item, stop)` for all items; the first error stops the others and is raised, as is Ctrl-C.

    Args:
        work: looks at the event `stop` often, and ends by an exception when it is set.
        items: what to work on, begun in this order.
        workers: how many at a time.
    """
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def drain() -> None:
        while not stop.is_set():
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            work(item, stop)

    def run() -> None:
        error: BaseException | None = None
        try:
            drain()
        except BaseException as raised:  # handed to the caller, whatever it is
            error = raised
        ended.put(error)

    started: list[threading.Thread] = []
    try:
        for _ in range(min(workers, todo.qsize())):
            # daemons: one that hangs in the network does not keep the process
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            started.append(thread)
        for _ in started:
            if (error := ended.get()) is not None:
                raise error
    finally:
        stop.set()
        deadline_s = time.monotonic() + GRACE_S
        for thread in started:
            thread.join(max(0.0, deadline_s - time.monotonic()))
