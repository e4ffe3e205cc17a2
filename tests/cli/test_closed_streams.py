"""Standard streams that are closed, full, or without a reader: every command ends quietly, with the right code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.cli.command_list import command_names
from tests.fakes import KIMI_MINI
from tests.processes import start

BROKEN_PIPE = 128 + signal.SIGPIPE
COMMANDS = {  # code of an ordinary run, and whether it prints results on stdout
    "--help": (0, True),
    "--version": (0, True),
    "models": (0, True),
    "models no-such-model --json": (2, True),
    "models no-such-model": (2, False),
    "models --no-such-option": (2, False),
    "plan kimi-k2 --machines m3-ultra-512": (0, True),
    "doctor --quick": (0, True),
    "chat -p hi --no-thinking --max-tokens 8": (0, True),
    "chat -p hi --no-thinking --max-tokens 8 --json": (0, True),
    "download kimi-mini": (0, True),
    f"convert {KIMI_MINI} /no/such/folder --bits 4 --dry-run": (0, True),
    "rm moonlight --yes": (1, False),
    "bench --prompt-tokens 8 --generation-tokens 4 --repeat 1 --warmup 0": (0, True),
    "config": (0, True),
    "history show no-such-conversation": (1, False),
    "service status": (1, False),
    "status http://127.0.0.1:1": (1, False),
    "importance": (2, False),
    "compare": (2, False),
    "launch": (2, False),
    "check": (2, False),
    "serve --host 0.0.0.0": (2, False),
}
QUICK = ("--version",)
SAMPLE = [  # the rest is left to the sweep
    command
    if command in QUICK
    else pytest.param(
        command,
        marks=pytest.mark.slow
        if command.startswith(("chat", "models no-such-model --json", "plan", "rm"))
        else pytest.mark.sweep,
    )
    for command in COMMANDS
]


@pytest.fixture(autouse=True)
def empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def broken_pipe() -> Iterator[int]:
    """The writing end of a pipe without a reader."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def run(
    command: str, redirection: str = "", stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    line = ["sh", "-c", f"exec {sys.executable} -m kimi_mlx {command} {redirection}"]
    return subprocess.run(line, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True, timeout=120)


def test_every_command_is_tried() -> None:
    assert set(command_names()) == {command.split()[0] for command in COMMANDS} - {"--help", "--version"}


def closings() -> list[Any]:
    """Return commands with streams to close; one stream of most commands is left to the sweep."""
    found = []
    for command in COMMANDS:
        mark = pytest.mark.slow if command.startswith(("chat", "models", "plan", "rm", "serve")) else pytest.mark.sweep
        found.append(pytest.param(command, ">&- 2>&-", marks=() if command in QUICK else mark))
        mark = pytest.mark.slow if command.startswith("chat -p hi --no-thinking --max-tokens 8 ") else pytest.mark.sweep
        found += [pytest.param(command, closed, marks=mark) for closed in (">&-", "2>&-", "<&-")]
    return found


@pytest.mark.parametrize(("command", "closed"), closings())
def test_closed_streams_change_nothing(command: str, closed: str) -> None:
    done = run(command, closed)
    assert done.returncode == COMMANDS[command][0]
    assert "Traceback" not in f"{done.stdout}{done.stderr}"


@pytest.mark.parametrize("command", SAMPLE)
def test_a_lost_reader_of_stdout_ends_quietly(command: str, broken_pipe: int) -> None:
    code, has_results = COMMANDS[command]
    done = run(command, stdout=broken_pipe)
    assert done.returncode == (BROKEN_PIPE if has_results else code)
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr
    both = run(command, stdout=broken_pipe, stderr=broken_pipe)
    assert both.returncode == done.returncode


@pytest.mark.parametrize("command", SAMPLE)
def test_a_lost_reader_of_stderr_changes_nothing(command: str, broken_pipe: int) -> None:
    code, has_results = COMMANDS[command]
    done = run(command, stderr=broken_pipe)
    assert done.returncode == code
    assert bool(done.stdout) == has_results


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full device")
@pytest.mark.parametrize("command", SAMPLE)
def test_a_full_disk_is_an_error(command: str) -> None:
    code, has_results = COMMANDS[command]
    done = run(command, ">/dev/full")
    assert done.returncode == (code or 1 if has_results else code)
    assert "Traceback" not in done.stderr
    assert not has_results or "cannot write the output: No space left" in done.stderr or code


@pytest.mark.slow
def test_a_server_survives_the_end_of_its_log() -> None:
    server = start([sys.executable, "-m", "kimi_mlx", "serve", "--port", "0"], text=True)
    assert server.stderr is not None
    url = server.stderr.readline().split()[4]
    server.stderr.close()
    for _ in range(3):
        with urllib.request.urlopen(f"{url}/models", timeout=10) as answer:
            assert answer.status == 200
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_nohup_protects_a_server() -> None:
    server = start(["sh", "-c", f"trap '' HUP; exec {sys.executable} -m kimi_mlx serve --port 0"], text=True)
    assert server.stderr is not None
    url = server.stderr.readline().split()[4]
    server.send_signal(signal.SIGHUP)
    with urllib.request.urlopen(f"{url}/models", timeout=10) as answer:
        assert answer.status == 200
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 128 + signal.SIGTERM
