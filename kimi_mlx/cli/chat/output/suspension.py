"""Ctrl-Z while something is drawn: the terminal is left in order, and drawing continues after `fg`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def call_before_suspension(release: Callable[[], None]) -> Generator[None]:
    """Call a function each time before Ctrl-Z suspends the program, until the end of the block.

    Nothing happens outside the main thread, or if SIGTSTP is ignored or handled already.

    Args:
        release: function that leaves the terminal in order.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTSTP) is not signal.SIG_DFL:
        yield
        return

    def suspend(number: int, frame: FrameType | None) -> None:
        release()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # the program stops here until `fg`
        signal.signal(signal.SIGTSTP, suspend)

    signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
