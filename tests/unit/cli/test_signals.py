"""A signal ends the command with its exit code, also when Python would lose the exception that it raises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import os, signal, sys, time, weakref
from kimi_mlx.cli import app
signal.signal(signal.SIGINT, signal.default_int_handler)
class Object:
    def __del__(self): send_in_del()
send_in_del = lambda: None
def kill(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.001)
def run(**options):
    BODY
    time.sleep(20)
app.get_command = lambda _: run
app.main()
"""
"""A command whose body is put in place of BODY. Without a signal it would end after 20 s."""

WEAK = "thing = type('T', (), {})(); ref = weakref.ref(thing, lambda _: kill(NUMBER)); del thing"
DEL = "global send_in_del; send_in_del = lambda: kill(NUMBER); Object()"
CAUGHT = """
    try:
        kill(FIRST)
    except BaseException:
        try:
            kill(SECOND)
        finally:
            kill(SECOND)
"""

IN_ENUM = """
import enum, os, signal
create = enum.EnumMeta._create_
def _create_(cls, *args, **options):
    if args and args[0] == "DeviceType":
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return create(cls, *args, **options)
enum.EnumMeta._create_ = _create_
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
"""MLX's extension calls this while it is imported."""


@pytest.mark.parametrize("body", [WEAK, DEL], ids=["weak reference", "__del__"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_callback_whose_exceptions_python_ignores_ends_the_command(
    body: str, number: signal.Signals
) -> None:
    code = START.replace("BODY", body.replace("NUMBER", str(int(number))))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGHUP), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)],
)
def test_the_first_signal_sets_the_exit_code(first: signal.Signals, second: signal.Signals) -> None:
    body = CAUGHT.replace("FIRST", str(int(first))).replace("SECOND", str(int(second)))
    done = subprocess.run(
        [sys.executable, "-c", START.replace("BODY", body)], capture_output=True, text=True, timeout=15
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + first, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP],
)
def test_a_signal_while_mlx_is_imported_ends_the_command(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(IN_ENUM)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}", "SIGNAL": str(int(number))}
    command = [sys.executable, "-m", "kimi_mlx", "chat", "kimi-mini", "-p", "hi"]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
