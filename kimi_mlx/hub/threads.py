"""Run a function for many items on several threads that stop quickly after an error or Ctrl-C."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")

GRACE_S = 1.0
"""Longest wait for threads to stop. A thread that waits for the network may end later; its result is ignored."""


def for_each(work: Callable[[Item, threading.Event], object], items: Iterable[Item], workers: int) -> None:
    """Call `work(item, stop)` for all items. The first error, or Ctrl-C, stops the others and is raised.

    Args:
        work: function that checks the event `stop` often and raises once it is set.
        items: items to process, in this order.
        workers: number of threads.
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
        except BaseException as raised:  # any exception is passed to the caller
            error = raised
        ended.put(error)

    started: list[threading.Thread] = []
    try:
        for _ in range(min(workers, todo.qsize())):
            # daemon threads: one that hangs in the network does not keep the process alive
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
