"""Run `kimi-mlx` in this process, which saves the second that a new process needs for imports.

For tests of a command's behaviour and output. Tests of signals and exits use real processes.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout

import pytest

from kimi_mlx.cli.app import run


def call(
    *arguments: str, stdin: str | None = None, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as the command line does, with errors converted to exit codes.

    Args:
        arguments: command-line arguments.
        stdin: text for standard input; None for /dev/null.
        variables: environment variables to set.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryFile("w+") if stdin is not None else open(os.devnull) as source,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        if stdin is not None:
            source.write(stdin)
            source.seek(0)
        patch.setattr(sys, "stdin", source)
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setattr(sys, "argv", ["kimi-mlx", *arguments])
        for name, value in (variables or {}).items():
            patch.setenv(name, value)
        code: int | str | None = 0
        try:
            run()
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert code is None or isinstance(code, int)
    outputs = [stream.buffer.getvalue().decode() for stream in (out, err)]  # pyright: ignore[reportAttributeAccessIssue]
    return subprocess.CompletedProcess(arguments, code or 0, *outputs)
