"""Signal handlers for a part of a chat."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FrameType


@contextmanager
def signal_handlers(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], object]]) -> Generator[None]:
    """Set signal handlers until the end of the block. Only in the main thread."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ctrl_c_raises() -> AbstractContextManager[None]:
    """Make Ctrl-C raise KeyboardInterrupt until the end of the block; between prompts it is ignored."""
    return signal_handlers({signal.SIGINT: signal.default_int_handler})
