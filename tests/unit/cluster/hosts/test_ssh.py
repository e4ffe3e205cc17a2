"""Arguments of ssh, scripts on hosts, login shells, timeouts, and explanations of failures."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cluster.hosts.ssh import (
    ScriptResult,
    check_host,
    is_local,
    run_everywhere,
    run_script,
    script_on,
    ssh_command,
)
from kimi_mlx.cluster.hosts.ssh_errors import explain_ssh
from kimi_mlx.errors import SshError, UsageError
from tests.examples import examples

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
    """Put a program named `ssh` first on PATH."""
    program = folder / "ssh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


RUN_REMOTE = 'while [ "$1" != -- ]; do shift; done; shift; shift; exec sh -c "$1"'


@examples(50)
@given(st.lists(words, max_size=4))
def test_arguments_arrive_unchanged(arguments: list[str]) -> None:
    for shell in SHELLS[:1]:
        assert arrived(shell, arguments) == arguments


@pytest.mark.parametrize("shell", SHELLS)
def test_shell_syntax_in_arguments_is_not_executed(shell: str) -> None:
    assert arrived(shell, NASTY) == NASTY


def arrived(shell: str, arguments: list[str]) -> list[str]:
    """Return the arguments that a program gets from a host's login shell."""
    sent = ssh_command("mac-b", ["printf", "%s\\0", "first", *arguments])[-1]
    done = subprocess.run([shell, "-c", sent], capture_output=True, check=True)
    return [word.decode() for word in done.stdout.split(b"\0")[1:-1]]


def test_ssh_does_not_prompt_and_has_timeouts() -> None:
    command = ssh_command("me@mac-b", ["true"], options=["-o", "Port=23"])
    assert command[0] == "ssh"
    assert command[1:3] == ["-o", "Port=23"]
    assert {"BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "LogLevel=INFO"} < set(command)
    assert command[-4:] == ["-T", "--", "me@mac-b", "true"]


@pytest.mark.parametrize(
    "host", ["", "-oProxyCommand=x", "me@-x", "@a", "a b", "a\nb", "a;b", "$(x)", "a'b", 'a"b', "`x`"]
)
def test_unsafe_host_names_are_refused(host: str) -> None:
    with pytest.raises(UsageError, match="not a valid host name"):
        ssh_command(host, ["true"])


@pytest.mark.parametrize("host", ["mac-b", "mac-b.local", "me@10.0.0.2", "fe80::1%en0", "mac_b", "ssh://me@mac-b:23"])
def test_usual_host_names_are_accepted(host: str) -> None:
    assert check_host(host) == host


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]", socket.gethostname().upper()])
def test_names_of_this_machine_are_local(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize(
    "host", ["mac-b", "192.0.2.1", "0.0.0.0", "224.0.0.1", "2001:db8::1", "nobody@localhost", "fe80::1%no"]
)
def test_other_machines_and_users_are_not_local(host: str) -> None:
    assert not is_local(host)


def test_local_script_reads_its_own_input() -> None:
    script = 'echo "$0" >/dev/null; printf "%s|" one "two  $(cat)"; echo oops >&2; exit 3\n# é\n'
    answer = run_script("localhost", script, 10, stdin_extra=b"input\n")
    assert (answer.exit_code, answer.stdout, answer.stderr) == (3, "one|two  input|", "oops\n")
    assert not answer.is_ok
    assert abs(time.time() - answer.started_at) < 10


def test_binary_input_arrives_unchanged(tmp_path: Path) -> None:
    data = os.urandom(200_000)
    answer = run_script("localhost", f"cat >'{tmp_path}/x'; read nothing || echo end", 10, stdin_extra=data)
    assert answer.stdout == "end\n"
    assert (tmp_path / "x").read_bytes() == data


def test_script_is_sent_on_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ssh(tmp_path, monkeypatch, RUN_REMOTE)
    script = "x='it'\\''s \"$HOME\" `id`'; printf '%s' \"$x\"; cat"
    answer = run_script("mac-b", script, 10, stdin_extra=b"\n;extra")
    assert answer.stdout == 'it\'s "$HOME" `id`\n;extra'
    assert all("HOME" not in part for part in script_on("mac-b", script).command)


@pytest.mark.parametrize(
    "script",
    [
        "echo before; sleep 60",
        "echo before; sleep 60 & wait",
        "echo before; trap '' TERM; while :; do sleep 1; done",
        "echo before; setsid sleep 9 & wait",  # leaves the group and keeps the pipes open
    ],
)
def test_script_is_stopped_at_the_timeout(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.cluster.hosts.ssh.END_PATIENCE_S", 0.3)
    answer = run_script("localhost", script, 0.5)
    assert answer.exit_code is None
    assert answer.stdout == "before\n"
    assert answer.seconds < 8


def test_silent_ssh_and_its_children_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_hosts_run_a_script_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "begun").mkdir()
    wait = f"cd '{tmp_path}/begun'; : >$$; until [ $(ls | wc -l) = 2 ]; do sleep 0.02; done"
    put_ssh(tmp_path, monkeypatch, f"({wait}); {RUN_REMOTE.replace('shift; shift;', 'shift; export NAME=$1; shift;')}")
    waiting: list[Sequence[str]] = []
    answers = run_everywhere(["mac-c", "mac-b", "mac-c", "localhost"], 'echo "${NAME-here}"', 10, waiting.append)
    assert len(waiting) == 3
    assert waiting[-1] == []
    assert [(host, each.stdout) for host, each in answers.items()] == [
        ("mac-c", "mac-c\n"),
        ("mac-b", "mac-b\n"),
        ("localhost", "here\n"),
    ]


def test_invalid_host_name_stops_all_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ssh(tmp_path, monkeypatch, f"echo $$ >'{tmp_path}/pid'; exec sleep 60")
    begin = time.monotonic()
    with pytest.raises(UsageError):
        run_everywhere(["mac-b", "-x"], "true", 60)
    assert time.monotonic() - begin < 30


def test_interrupt_stops_every_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ssh(tmp_path, monkeypatch, f"echo $$ >'{tmp_path}/pid'; kill -INT {os.getpid()}; exec sleep 60")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_everywhere(["mac-b"], "true", 60)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_interrupt_of_a_start_stops_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class InterruptedPool(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            super().submit(*args, **kwargs)
            while not (pid.exists() and pid.read_text()):
                time.sleep(0.01)
            raise KeyboardInterrupt

    pid = tmp_path / "pid"
    put_ssh(tmp_path, monkeypatch, f"echo $$ >'{pid}'; exec sleep 60")
    monkeypatch.setattr("kimi_mlx.cluster.hosts.ssh.ThreadPoolExecutor", InterruptedPool)
    with pytest.raises(KeyboardInterrupt):
        run_everywhere(["mac-b"], "true", 60)
    assert not is_running(int(pid.read_text()))


def test_missing_ssh_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SshError, match="`ssh` is not installed"):
        run_script("mac-b", "true", 5)


SHELL_START = {
    "prints": r"printf 'Welcome \033[1mhome\033[0m'; printf '\n{\"kind\": \"alive\"}' >&2",
    "prints JSON": """printf '{"kind": "error"}\\nsystem=Darwin\\n{"kind": "end"}'""",
    "has a function": "dd() { echo wrong; }; cd() { echo wrong; }; cat() { echo wrong; }; export -f dd cd cat",
    "has an alias": "shopt -s expand_aliases; alias sh='echo wrong' eval='echo wrong'",
    "changes folder": "cd /usr",
    "has another PATH": "PATH=/nowhere",
    "prints at its end": "trap 'echo bye' EXIT",
    "waits": "sleep 0.3",
    "leaves a job": "sleep 60 &",
    "leaves a job with a copy of the output": "exec 3>&1; sleep 60 >/dev/null 2>&1 &",
    "ignores signals": "trap '' TERM HUP INT",
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("start", SHELL_START.values(), ids=SHELL_START.keys())
def test_login_shell_cannot_change_the_output(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "start").write_text(start + "\n")
    put_ssh(tmp_path, monkeypatch, f'{RUN_REMOTE.replace("exec sh -c", "exec bash -c")[:-4]}". {tmp_path}/start; $1"')
    monkeypatch.setenv("HOME", str(tmp_path))
    answer = run_script("mac-b", "pwd; cat; echo error >&2", 10, stdin_extra=b"input")
    assert answer.is_ok, answer
    assert answer.stdout == f"{tmp_path}\ninput"
    assert answer.stderr == "error\n"


def test_exit_code_arrives_although_a_job_keeps_the_output_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_ssh(tmp_path, monkeypatch, f"sleep 60 & {RUN_REMOTE}")
    result = run_script("mac-b", "echo out; echo error >&2; exit 3", 30)
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "error\n")
    assert result.seconds < 20


@pytest.mark.parametrize(
    ("start", "exit_code"),
    [("exit 0", 0), ("exit 3", 3), ("exec sh", 97), ("exec sh -s", 97), ("read line", 97), ("cat >/dev/null", 97)],
)
def test_login_shell_that_does_not_run_the_script_is_an_error(
    start: str, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_ssh(tmp_path, monkeypatch, f"echo hello; {start}; {RUN_REMOTE}")
    result = run_script("mac-b", f"touch {tmp_path}/run", 10, stdin_extra=b"touch wrong\n" * 100)
    assert (result.is_ok, result.has_started, result.exit_code) == (False, False, exit_code)
    error = explain_ssh(result)
    assert error.message.startswith("the login shell of `mac-b` did not run our command")
    assert error.message.endswith("\n  hello")
    assert "ssh mac-b /bin/sh -c true" in (error.hint or "")
    assert not (tmp_path / "run").exists()


CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Offending ED25519 key in /Users/me/known hosts:2
Host key for 10.77.209.12 has changed and you have requested strict checking.
Host key verification failed.
"""

UNPROTECTED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
Permissions 0644 for '/Users/me/key' are too open.
It is required that your private key files are NOT accessible by others.
This private key will be ignored.
Load key "/Users/me/key": bad permissions
me@mac-b: Permission denied (publickey).
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
        ("/root/.ssh/config: line 1: Bad configuration option: nonsense", "configuration has an error", "fix the"),
        ("/root/.ssh/config line 3: missing argument.", "configuration has an error", "ssh -G mac-b"),
        ("Bad owner or permissions on /root/.ssh/config", "other users may change", "chmod go-rwx /root/.ssh/config"),
        (UNPROTECTED, "other users may change or read", "chmod go-rwx /Users/me/key"),
        (
            'Load key "/Users/me/key": error in libcrypto\nme@mac-b: Permission denied (publickey).',
            "a key file cannot be read",
            "ssh-keygen -y -f /Users/me/key",
        ),
        (
            "no such identity: /Users/me/my key: No such file or directory\nme@mac-b: Permission denied (publickey).",
            "a key file cannot be read",
            "ssh-keygen -y -f '/Users/me/my key'",
        ),
        (
            'sign_and_send_pubkey: signing failed for ED25519 "/k" from agent: agent refused operation\n'
            "me@mac-b: Permission denied (publickey).",
            "the key is locked",
            "`ssh-add`",
        ),
        ("Received disconnect from ::1 port 22:2: Too many authentication failures", "too many keys", "IdentitiesOnly"),
        (
            "/bin/sh: line 1: nc: command not found\nkex_exchange_identification: Connection closed by remote host",
            "the jump host or proxy command for `mac-b` failed",
            "ProxyCommand",
        ),
        (
            "ssh: connect to host jump port 22: Connection refused\nConnection closed by UNKNOWN port 65535",
            "the jump host or proxy command for `mac-b` failed",
            "ssh -G mac-b",
        ),
        (
            "unix_listener: cannot bind to path /nonexistent/x.dYWdOs7F2J5bYlML: No such file or directory",
            "cannot create its control socket",
            "ControlPath",
        ),
        ("bind 10.255.255.1: Cannot assign requested address\nssh: connect to host x: failure", "configuration", "fix"),
        (
            "channel 0: open failed: connect failed: Connection refused\nstdio forwarding failed",
            "the jump host or proxy command for `mac-b` failed",
            "ProxyJump",
        ),
        (
            "Unable to negotiate with ::1 port 22: no matching host key type found. Their offer: ssh-rsa",
            "no algorithm in common",
            "update the older",
        ),
        ("something new", "ssh to `mac-b` failed", "ssh -v mac-b"),
    ],
)
def test_ssh_failure_is_explained_with_a_remedy(words: str, message: str, hint: str) -> None:
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
        (
            ScriptResult("mac-b", 1, "", "", 1, has_started=False, greeting="This account is not available.\n"),
            "the login shell of `mac-b` did not run our command (exit code 1)\n  This account is not available.",
        ),
        (ScriptResult("mac-b", None, "", "", 30, has_started=False), "did not start our command within 30 s"),
    ],
)
def test_failure_of_a_script_is_explained(answer: ScriptResult, message: str) -> None:
    assert message in explain_ssh(answer).message
