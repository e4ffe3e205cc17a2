"""Arguments of ssh, input of scripts, timeouts, and explanations of failures."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_mlx.cluster.hosts.ssh import (
    ScriptResult,
    check_host,
    is_local,
    run_everywhere,
    run_script,
    script_command,
    ssh_command,
)
from kimi_mlx.cluster.hosts.ssh_errors import explain_ssh
from kimi_mlx.errors import SshError, UsageError

SHELLS = [shell for name in ("sh", "bash", "dash", "zsh", "fish") if (shell := shutil.which(name))]

NASTY = [
    "",
    " ",
    "-rf",
    "--",
    "it's",
    '"',
    "$(touch /tmp/injected)",
    "`id`",
    "a;b",
    "a\nb",
    "a\\",
    "\\'",
    "*",
    "~",
    "é\t",
]

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])


def put_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program that is taken for ssh."""
    program = folder / "ssh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


RUN_REMOTE = 'while [ "$1" != -- ]; do shift; done; shift; shift; exec sh -c "$1"'


@settings(max_examples=50)
@given(st.lists(words, max_size=4))
def test_what_arrives_is_what_was_sent(arguments: list[str]) -> None:
    for shell in SHELLS[:1]:
        assert arrived(shell, arguments) == arguments


@pytest.mark.parametrize("shell", SHELLS)
def test_nothing_is_injected(shell: str) -> None:
    assert arrived(shell, NASTY) == NASTY


def arrived(shell: str, arguments: list[str]) -> list[str]:
    """What a host's login shell hands to a program."""
    sent = ssh_command("mac-b", ["printf", "%s\\0", "first", *arguments])[-1]
    done = subprocess.run([shell, "-c", sent], capture_output=True, check=True)
    return [word.decode() for word in done.stdout.split(b"\0")[1:-1]]


def test_ssh_asks_nothing_and_does_not_wait_for_ever() -> None:
    command = ssh_command("me@mac-b", ["true"], options=["-o", "Port=23"])
    assert command[0] == "ssh"
    assert command[1:3] == ["-o", "Port=23"]
    assert {"BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "LogLevel=INFO"} < set(command)
    assert command[-4:] == ["-T", "--", "me@mac-b", "true"]


@pytest.mark.parametrize(
    "host", ["", "-oProxyCommand=x", "me@-x", "@a", "a b", "a\nb", "a;b", "$(x)", "a'b", 'a"b', "`x`"]
)
def test_names_that_ssh_could_take_for_something_else_are_refused(host: str) -> None:
    with pytest.raises(UsageError, match="not a valid host name"):
        ssh_command(host, ["true"])


@pytest.mark.parametrize("host", ["mac-b", "mac-b.local", "me@10.0.0.2", "fe80::1%en0", "mac_b", "ssh://me@mac-b:23"])
def test_usual_names_are_taken(host: str) -> None:
    assert check_host(host) == host


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]", socket.gethostname().upper()])
def test_this_machine_needs_no_ssh(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize(
    "host", ["mac-b", "192.0.2.1", "0.0.0.0", "224.0.0.1", "2001:db8::1", "nobody@localhost", "fe80::1%no"]
)
def test_other_machines_and_users_do(host: str) -> None:
    assert not is_local(host)


def test_a_script_runs_here_with_its_own_input() -> None:
    script = 'echo "$0" >/dev/null; printf "%s|" one "two  $(cat)"; echo oops >&2; exit 3\n# é\n'
    answer = run_script("localhost", script, 10, stdin_extra=b"input\n")
    assert (answer.exit_code, answer.stdout, answer.stderr) == (3, "one|two  input|", "oops\n")
    assert not answer.is_ok
    assert abs(time.time() - answer.started) < 10


def test_bytes_behind_a_script_arrive_whole(tmp_path: Path) -> None:
    data = os.urandom(200_000)
    answer = run_script("localhost", f"cat >'{tmp_path}/x'; read nothing || echo end", 10, stdin_extra=data)
    assert answer.stdout == "end\n"
    assert (tmp_path / "x").read_bytes() == data


def test_a_script_reaches_a_host_by_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ssh(tmp_path, monkeypatch, RUN_REMOTE)
    script = "x='it'\\''s \"$HOME\" `id`'; printf '%s' \"$x\"; cat"
    answer = run_script("mac-b", script, 10, stdin_extra=b"\n;extra")
    assert answer.stdout == 'it\'s "$HOME" `id`\n;extra'
    assert all("HOME" not in part for part in ssh_command("mac-b", script_command(script.encode())))


@pytest.mark.parametrize(
    "script",
    [
        "echo before; sleep 60",
        "echo before; sleep 60 & wait",
        "echo before; trap '' TERM; while :; do sleep 1; done",
        "echo before; setsid sleep 9 & wait",  # leaves the group and keeps the pipes open
    ],
)
def test_the_time_limit_holds(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.cluster.hosts.ssh.END_PATIENCE_S", 0.3)
    answer = run_script("localhost", script, 0.5)
    assert answer.exit_code is None
    assert answer.stdout == "before\n"
    assert answer.seconds < 8


def test_a_silent_ssh_and_what_it_started_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ssh(tmp_path, monkeypatch, f"sleep 60 & echo $! >'{tmp_path}/pid'; wait")
    answer = run_script("mac-b", "true", 0.5)
    assert answer.exit_code is None
    assert not is_running(int((tmp_path / "pid").read_text()))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_hosts_are_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "begun").mkdir()
    wait = f"cd '{tmp_path}/begun'; : >$$; until [ $(ls | wc -l) = 2 ]; do sleep 0.02; done"
    put_ssh(tmp_path, monkeypatch, f'while [ "$1" != -- ]; do shift; done; {wait}; echo "$2"')
    answers = run_everywhere(["mac-c", "mac-b", "mac-c", "localhost"], "echo here", 10)
    assert [(host, each.stdout) for host, each in answers.items()] == [
        ("mac-c", "mac-c\n"),
        ("mac-b", "mac-b\n"),
        ("localhost", "here\n"),
    ]


def test_a_name_that_is_none_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ssh(tmp_path, monkeypatch, f"echo $$ >'{tmp_path}/pid'; exec sleep 60")
    begin = time.monotonic()
    with pytest.raises(UsageError):
        run_everywhere(["mac-b", "-x"], "true", 60)
    assert time.monotonic() - begin < 30


def test_an_interrupt_ends_every_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ssh(tmp_path, monkeypatch, f"echo $$ >'{tmp_path}/pid'; kill -INT {os.getpid()}; exec sleep 60")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_everywhere(["mac-b"], "true", 60)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_without_ssh_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SshError, match="`ssh` is not installed"):
        run_script("mac-b", "true", 5)


CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Offending ED25519 key in /Users/me/known hosts:2
Host key for 10.77.209.12 has changed and you have requested strict checking.
Host key verification failed.
"""

UNKNOWN = """\
No ED25519 host key is known for 10.77.209.12 and you have requested strict checking.
Host key verification failed.
"""


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (CHANGED, "a different host key", "ssh-keygen -R 10.77.209.12 -f '/Users/me/known hosts'"),
        (UNKNOWN, "not known to ssh yet", "`ssh mac-b`"),
        ("me@mac-b: Permission denied (publickey,password).", "`mac-b` refuses the login", "ssh-copy-id mac-b"),
        ("ssh: connect to host mac-b port 22: Connection refused", "refuses", "sudo systemsetup -setremotelogin on"),
        ("ssh: connect to host mac-b port 22: Operation timed out", "cannot be reached", "ping mac-b"),
        ("ssh: connect to host mac-b port 22: No route to host", "cannot be reached", "Local Network"),
        ("ssh: connect to host mac-b port 22: Host is down", "cannot be reached", "ping mac-b"),
        ("Connection timed out during banner exchange", "cannot be reached", "ping mac-b"),
        (
            "ssh: Could not resolve hostname mac-b: nodename nor servname provided",
            "the name `mac-b` cannot be resolved",
            "mac-b.local",
        ),
        ("Timeout, server mac-b not responding.", "stopped responding", "ping mac-b"),
        (
            "kex_exchange_identification: Connection closed by remote host",
            "closes the connection before login",
            "ssh -v mac-b",
        ),
        ("/root/.ssh/config: line 1: Bad configuration option: nonsense", "config has an error", "fix the lines"),
        ("something new", "ssh to `mac-b` failed", "ssh -v mac-b"),
    ],
)
def test_what_ssh_says_becomes_what_to_type(words: str, message: str, hint: str) -> None:
    error = explain_ssh(ScriptResult("mac-b", 255, "", words, 1.0))
    assert message in error.message
    assert words.splitlines()[-1] in error.message
    assert error.hint is not None
    assert hint in error.hint


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ScriptResult("mac-b", None, "", "", 30.2), "did not finish within 30 s"),
        (ScriptResult("mac-b", 127, "", "sh: line 1: rdma_ctl: command not found", 1), "has no `rdma_ctl`"),
        (ScriptResult("mac-b", 127, "", "zsh:1: command not found: sh", 1), "has no `sh`"),
        (ScriptResult("mac-b", 127, "", "sh: 1: uv: not found", 1), "has no `uv`"),
        (ScriptResult("mac-b", 2, "", "broken\n", 1), "exit code 2\n  broken"),
    ],
)
def test_other_failures_are_told_too(answer: ScriptResult, message: str) -> None:
    assert message in explain_ssh(answer).message
