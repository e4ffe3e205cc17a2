"""Put the terminal back into its old state after an end in the middle of something.

Libraries restore what they have changed: Rich shows the cursor, prompt_toolkit sets the old modes. A second signal can
end the program before they have.
"""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from typing import Any

RESET = "\x1b[?25h\x1b[?2004l\x1b[0m"
"""Show the cursor; do not mark pasted text; end colours."""


class TerminalState:
    """The modes of the terminal of standard input at the start; nothing without one."""

    def __init__(self) -> None:
        self._modes: list[Any] | None = None
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):
            self._modes = termios.tcgetattr(sys.stdin.fileno())

    def restore(self) -> None:
        """Set the old modes, and reset what is drawn. A terminal that another program uses now is left alone."""
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):
            descriptor = sys.stdin.fileno()
            if self._modes is not None and os.tcgetpgrp(descriptor) == os.getpgrp():
                termios.tcsetattr(descriptor, termios.TCSANOW, self._modes)
        if os.environ.get("TERM") == "dumb":
            return
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if os.isatty(descriptor):
                    os.write(descriptor, RESET.encode())
                    return
