"""The command `kimi-mlx` and its one error boundary."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer

from kimi_mlx.cli.command_list import LazyGroup
from kimi_mlx.errors import KimiMlxError, RingError, UsageError
from kimi_mlx.settings import Settings
from kimi_mlx.version import __version__

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="kimi-mlx",
    cls=LazyGroup,
    help="Run Moonshot's Kimi models on one Mac or on several.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"kimi-mlx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Run Moonshot's Kimi models on one Mac or on several."""


def main() -> None:
    """Run the command line and exit: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    code = EXIT_FAILED
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else EXIT_FAILED
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)  # without MLX's own clean-up, which sometimes aborts the process


def run() -> None:
    """Run a command; print a known error instead of its traceback."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that ranks are stopped, as after Ctrl-C
        signal.signal(number, _exit_on_signal)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # print "?" where the terminal cannot show a character
    try:
        app()
    except KimiMlxError as error:
        if Settings.from_environment().show_traceback:
            raise
        if os.environ.get("MLX_RANK", "0") == "0" or isinstance(error, RingError):  # other errors: rank 0 prints them
            _print_error(error)
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: exit silently
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _print_error(KimiMlxError(f"cannot write the output: {error.strerror}"))
        os._exit(EXIT_FAILED)  # without another attempt to flush stdout


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _print_error(error: KimiMlxError) -> None:
    from kimi_mlx.cli.output import print_error  # rich: not for `--version` and `--help`

    print_error(error)
