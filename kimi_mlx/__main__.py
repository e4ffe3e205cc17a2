"""Run the command `kimi-mlx`, also as `python -m kimi_mlx`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Import and run the command line. The import takes a moment: Ctrl-C ends it without a traceback."""
    has_default_handler = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if has_default_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] == ["__complete"]:
        from kimi_mlx.cli.shell_completion.main import main as complete

        complete(*sys.argv[2:4])
        return
    from kimi_mlx.cli.app import main as run

    if has_default_handler:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
