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

from kimi_mlx.cli.bench import bench
from kimi_mlx.cli.chat import chat
from kimi_mlx.cli.check import check
from kimi_mlx.cli.convert import convert
from kimi_mlx.cli.doctor import doctor
from kimi_mlx.cli.download import download
from kimi_mlx.cli.launch import launch
from kimi_mlx.cli.models import models
from kimi_mlx.cli.output import print_error
from kimi_mlx.cli.plan import plan
from kimi_mlx.cli.serve import serve
from kimi_mlx.errors import KimiMlxError, RingError, UsageError
from kimi_mlx.settings import Settings
from kimi_mlx.version import __version__

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="kimi-mlx",
    help="Kimi on the Macs you own, as easy as a chat with one machine.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"kimi-mlx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Kimi on the Macs you own, as easy as a chat with one machine."""


def examples(*lines: str) -> str:
    """The end of a command's help; the form feeds keep Click from wrapping the lines."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


app.command(
    epilog=examples(
        "kimi-mlx chat                          talk to kimi-mini",
        'kimi-mlx chat kimi-mini -p "Hello"     one answer, alone on stdout',
        'git diff | kimi-mlx chat -p "Review this"    a pipe and a prompt',
        "kimi-mlx chat ./Kimi-K2-4bit --ranks 2",
    )
)(chat)
app.command(
    epilog=examples(
        "kimi-mlx serve kimi-mini",
        "kimi-mlx serve kimi-k2 --ranks 2 --port 8000 --served-name gpt-4o",
        "kimi-mlx serve --host 0.0.0.0 --api-key-file keys      for other machines, too",
        "kimi-mlx launch --hosts mac-a,mac-b serve kimi-k2",
    )
)(serve)
app.command(
    epilog=examples(
        "kimi-mlx download kimi-k2 --dry-run              what it would fetch, and whether the disk is large enough",
        "kimi-mlx download moonlight                      into the hub's cache, as it is",
        "kimi-mlx download kimi-k2 --ranks 2              one store a rank; start with `chat kimi-k2 --ranks 2`",
        "kimi-mlx download kimi-k2 --ranks 2 --verify     check all files, fetch again what is broken",
        "mlx.launch --hostfile two.json -- kimi-mlx download kimi-k2    each host fetches and keeps its part",
    )
)(download)
app.command(epilog=examples("kimi-mlx models", "kimi-mlx models kimi-k2.5", "kimi-mlx models --json"))(models)
app.command(
    epilog=examples(
        "kimi-mlx plan kimi-k2 --machines m3-ultra-512x2       memory, predicted speed, the choice and why",
        "kimi-mlx plan kimi-k2.5 --machines m3-ultra-512x2 --cost --subscription 200",
        "kimi-mlx plan kimi-k2 --hostfile two.json --link measured",
        "kimi-mlx plan --backtest                              the method against published figures",
    )
)(plan)
app.command(
    epilog=examples(
        "kimi-mlx bench",
        "kimi-mlx bench kimi-mini --prompt-tokens 128,512 --repeat 5 --json",
        "kimi-mlx bench --synthetic wide --ranks 2 --link-delay-ms 4 --against mlx-lm",
        "kimi-mlx bench kimi-k2 --prompt-tokens 128,8192 --depth 0,8192 --concurrency 1,4 --output r.json --plot r.png",
    )
)(bench)
app.command(
    epilog=examples(
        "kimi-mlx convert moonshotai/Kimi-K2-Thinking ./thinking-mlx --dry-run",
        "kimi-mlx convert kimi-k2.6 ./k2.6-mlx           INT4 without loss",
        "kimi-mlx convert ./Kimi-K2 ./k2-3bit --expert-bits 3",
    )
)(convert)
app.command(
    # what follows COMMAND is its own
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples(
        "kimi-mlx launch --hosts mac-a,mac-b --install              bring kimi-mlx to both, then chat",
        "kimi-mlx launch --hosts mac-a,mac-b download kimi-k2       each host fetches its part, once in all",
        'kimi-mlx launch --hosts mac-a,mac-b chat kimi-k2 -p "Hi"',
        "kimi-mlx launch --hosts mac-a,mac-b chat kimi-k2 --strategy pipeline:3:1    three layers of four on mac-a",
        "kimi-mlx launch --hosts mac-a,mac-b serve kimi-k2          for programs",
        "kimi-mlx launch --hosts mac-a,mac-b --save two.json check kimi-k2",
        "kimi-mlx launch --hostfile two.json bench kimi-k2 --prompt-tokens 128,1024",
    ),
)(launch)
app.command(hidden=True)(check)
app.command(
    epilog=examples(
        "kimi-mlx doctor                        this machine",
        "kimi-mlx doctor kimi-k2 --hosts mac-a,mac-b --save two.json",
        "kimi-mlx doctor --hostfile two.json --quick --json",
    )
)(doctor)


def main() -> None:
    """Run the command line; exit codes are 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
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
    os._exit(code)  # MLX aborts a process now and then that ends in order, for the sake of its own threads


def run() -> None:
    """Run a command inside the one error boundary."""
    # SIGTERM and SIGHUP end ranks in order, as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        app()
    except KimiMlxError as error:
        if Settings.from_environment().show_traceback:
            raise
        if os.environ.get("MLX_RANK", "0") == "0" or isinstance(error, RingError):  # else the leader says it
            print_error(error)
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: end without a word
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print_error(KimiMlxError(f"the output cannot be written: {error.strerror}"))
        os._exit(EXIT_FAILED)  # without another attempt to write what is left


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
