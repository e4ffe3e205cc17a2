"""The command `kimi-mlx`, which is `python -m kimi_mlx`, too."""

from __future__ import annotations

import signal


def main() -> None:
    """Import the command line, which takes a moment, and run it; Ctrl-C ends it at any time without a traceback."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from kimi_mlx.cli.app import main as run

    if is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
