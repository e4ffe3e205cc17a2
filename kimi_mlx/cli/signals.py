"""Signals that end the command: SIGINT, SIGTERM and SIGHUP raise an exception in the main thread, so that ranks end.

An exception can be raised where it does harm or is lost. MLX's extension calls Python code while it is imported, and
aborts the process if that code fails; Python ignores exceptions in `__del__` and in callbacks of the garbage collector
and of weak references. In both cases the signal is sent again, until the exception can end the command.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from types import FrameType

from kimi_mlx.cli.start_status import is_importing

RESEND_AFTER_S = 0.01


class SignalExit(SystemExit):
    """The end of the command by a signal.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


class EndSignals:
    """Handlers of the signals that end the command. Create this in the main thread.

    SIGINT raises KeyboardInterrupt. SIGTERM and SIGHUP raise SignalExit, and so does every signal after the first.
    Signals that are ignored, as by `nohup`, stay ignored.

    Attributes:
        first: number of the signal that ends the command; None without one. Later signals do not change the exit code.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._unraisable_hook = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_signal)

    def end(self, number: int) -> None:
        """End the command from any thread, with the exit code of a signal that was not received."""
        if self.first is None:
            self.first = number
        os.kill(os.getpid(), signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_in_import = is_importing(frame)
        # Ctrl-C that arrives during an import may be handled by another handler later, which only stops an answer.
        if self.first is None and not (is_in_import and number == signal.SIGINT):
            self.first = number
            if number == signal.SIGINT:
                raise KeyboardInterrupt
        if not is_in_import:
            raise SignalExit(number if self.first is None else self.first)
        _send_later(number)

    def _on_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Send a signal again whose exception Python ignores; print any other exception."""
        if isinstance(unraisable.exc_value, SignalExit):
            _send_later(unraisable.exc_value.number)
        elif unraisable.exc_type is KeyboardInterrupt:
            self.first = None
            _send_later(signal.SIGINT)
        else:
            self._unraisable_hook(unraisable)


def end_command(number: int) -> None:
    """End the running command from any thread, with the exit code of a signal that was not received.

    Without the handlers of EndSignals, as in a test, this does nothing.
    """
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(owner, EndSignals):
        owner.end(number)


def _send_later(number: int) -> None:
    def send() -> None:
        time.sleep(RESEND_AFTER_S)
        os.kill(os.getpid(), number)

    # threading.Thread takes locks, which the interrupted code may hold
    _thread.start_new_thread(send, ())
