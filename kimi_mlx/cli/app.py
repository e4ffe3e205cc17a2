"""The command `kimi-mlx` and its one error boundary."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import traceback
from typing import Annotated

import typer
from typer.main import get_command

from kimi_mlx.cli.command_list import RootGroup
from kimi_mlx.cli.signals import EndSignals
from kimi_mlx.cli.standard_streams import OUTPUT, repair_standard_streams
from kimi_mlx.cli.start_status import START_LINE
from kimi_mlx.cli.terminal_state import TerminalState
from kimi_mlx.errors import KimiMlxError, RingError, UsageError
from kimi_mlx.settings import Settings

EXIT_FAILED, EXIT_USAGE = 1, 2

PYDANTIC_PREFIX = "Value error, "
"""What pydantic puts before the message of an option with a wrong value."""

app = typer.Typer(
    name="kimi-mlx",
    cls=RootGroup,
    help="Run Moonshot's Kimi models on one Mac or on several.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        from kimi_mlx.cli.version_report import version_text, versions

        typer.echo(json.dumps(versions(), indent=2) if _is_json() else version_text())
        raise typer.Exit


def _install_completion(shell: str | None) -> None:
    if shell is not None:
        from kimi_mlx.cli.shell_completion.scripts import find_shell, install_script

        for path in install_script(find_shell(shell)):
            typer.echo(f"written: {path}")
        typer.echo("open a new terminal to use it")
        raise typer.Exit


def _show_completion(shell: str | None) -> None:
    if shell is not None:
        from kimi_mlx.cli.shell_completion.scripts import SCRIPTS, find_shell

        typer.echo(SCRIPTS[find_shell(shell)], nl=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --version: print JSON.", hidden=True)] = False,
    install_completion: Annotated[
        str | None,
        typer.Option(
            "--install-completion",
            metavar="SHELL",
            callback=_install_completion,
            is_eager=True,
            help="Install completion for zsh, bash or fish. Default: your shell.",
            show_default=False,
        ),
    ] = None,
    show_completion: Annotated[
        str | None,
        typer.Option(
            "--show-completion",
            metavar="SHELL",
            callback=_show_completion,
            is_eager=True,
            help="Print the completion script of a shell.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run Moonshot's Kimi models on one Mac or on several."""


def main() -> None:
    """Run the command line and exit: 0 success, 1 failure, 2 wrong usage, 128 + N after signal N."""
    repair_standard_streams()
    START_LINE.watch()
    terminal = TerminalState()
    code = EXIT_FAILED
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else EXIT_FAILED
    except KeyboardInterrupt:  # before run() handles it
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, SystemExit):
            stream.flush()
    if code >= 128:
        terminal.restore()  # last, because threads may still draw
    os._exit(code)  # without MLX's own clean-up, which sometimes aborts the process


def run() -> None:
    """Run a command; print a known error instead of its traceback.

    Raises:
        SystemExit: the command failed, or was ended by a signal.
    """
    signals = EndSignals()
    try:
        code = get_command(app)(standalone_mode=False)  # Typer would print errors itself, and as text only
        sys.stdout.flush()
        if code:
            sys.exit(code)
    except KimiMlxError as error:
        if Settings.from_environment().show_traceback:
            raise
        if os.environ.get("MLX_RANK", "0") == "0" or isinstance(error, RingError):  # other errors: rank 0 prints them
            _print_error(error)
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)
    except typer.TyperException as error:
        error.message = error.message.removeprefix(PYDANTIC_PREFIX)
        if (known := _explain_words(error)) is not None:
            _print_error(known)
        elif _is_json():
            _print_error(UsageError(error.format_message(), hint=f"type `{_command_of(error)} --help` for the options"))
        else:
            error.show()  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # Abort: Ctrl-C or Ctrl-D at a question
        sys.exit(128 + (signals.first or signal.SIGINT))
    except OSError as error:
        if Settings.from_environment().show_traceback or (known := _explain(error)) is None:
            raise
        _print_error(known)
        sys.exit(EXIT_FAILED)


def _explain_words(error: typer.TyperException) -> UsageError | None:
    """Return the error for a prompt without `-p` after the model, as `ollama run` takes it; None for other errors."""
    words = re.fullmatch(r"Got unexpected extra argument(?:\(s\)|s)? \((.*)\)", error.format_message(), re.DOTALL)
    if words is None or _command_of(error) != "kimi-mlx chat":
        return None
    text = words[1]
    return UsageError(
        f"`{text}` is neither an option nor a model", hint=f"to send it as a prompt, type `-p {shlex.quote(text)}`"
    )


def _command_of(error: typer.TyperException) -> str:
    """Return the command that an error is about, such as `kimi-mlx chat`."""
    context = getattr(error, "ctx", None)
    names: list[str] = []
    while context is not None and context.parent is not None:
        names.insert(0, context.info_name)
        context = context.parent
    return " ".join(("kimi-mlx", *names))


def _explain(error: OSError) -> KimiMlxError | None:
    """Return the error for a full disk, or for a file or folder that cannot be used; None for any other error."""
    from kimi_mlx.files import is_disk_full
    from kimi_mlx.folders import variable_of

    if error.filename == OUTPUT:
        return KimiMlxError(f"cannot write the output: {error.strerror}")
    if error.filename is None:
        return KimiMlxError("the disk is full", hint="free some space") if is_disk_full(error) else None
    path = os.fsdecode(error.filename)
    variable = variable_of(path)
    remedy = "free some space" if is_disk_full(error) else "check its owner and permissions"
    other = "" if variable is None else f", or set {variable} to another folder"
    return KimiMlxError(f"cannot use `{path}`: {error.strerror}", hint=f"{remedy}{other}")


def _is_json() -> bool:
    """Return whether `--json` was given, even if the command line is wrong."""
    return "--json" in sys.argv[1:]


def _print_error(error: KimiMlxError) -> None:
    from kimi_mlx.cli.output import error_to_dict, print_error, print_json  # rich: not for `--version` and `--help`

    if _is_json():
        with contextlib.suppress(OSError):  # a full disk: print the error on stderr
            print_json(error_to_dict(error))
            return
    print_error(error)
