"""What ssh's texts mean, and what to type then.

Source: messages of OpenSSH 9.2 (seen), and of the 9.x that macOS ships (from its source).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from kimi_mlx.cluster.hosts.ssh import SSH_FAILED, ScriptResult
from kimi_mlx.errors import SshError

KEPT_LINES = 6
"""Of ssh's own words."""


@dataclass(frozen=True)
class _Cause:
    """A text of ssh, what happened then, and what to do.

    Args:
        pattern: sought in standard error, upper or lower case.
        what: behind `HOST`.
        remedy: from the host's name, quoted for a shell, and standard error.
    """

    pattern: str
    what: str
    remedy: Callable[[str, str], str]


def _new_key(host: str, text: str) -> str:
    names = re.findall(r"Host key for (\S+) has changed", text) or [host]
    files = re.findall(r"Offending .* key in (.+):\d+\s*$", text, re.MULTILINE)
    forget = f"ssh-keygen -R {shlex.quote(names[0])}" + (f" -f {shlex.quote(files[0])}" if files else "")
    return f"if it was reinstalled or replaced: `{forget}`, then `ssh {host}` once; if not, find out who answers there"


def _first_visit(host: str, _: str) -> str:
    return f"connect once by hand, compare the fingerprint and answer yes: `ssh {host}`"


def _own_key(host: str, _: str) -> str:
    return f"let your key in: `ssh-copy-id {host}` (without a key, first `ssh-keygen -t ed25519`)"


def _remote_login(_: str, __: str) -> str:
    return (
        "turn on Remote Login there: System Settings > General > Sharing, or type on that Mac "
        "`sudo systemsetup -setremotelogin on` (Linux: `sudo systemctl enable --now ssh`)"
    )


def _wake_up(host: str, _: str) -> str:
    return (
        f"is it on, awake and on this network? `ping {host}`; on a Mac also allow this terminal in "
        "System Settings > Privacy & Security > Local Network"
    )


def _spell(host: str, _: str) -> str:
    local = "" if host.endswith(".local") else f"`{host}.local`, "
    return f"check the name, or try {local}the address, or an entry `Host {host}` in ~/.ssh/config"


def _look_there(host: str, _: str) -> str:
    return f"see what happens with `ssh -v {host} true`"


def _mend_lines(_: str, __: str) -> str:
    return "mend the lines that ssh names"


# The first that is found counts: a changed key is also a failed verification.
_CAUSES = (
    _Cause(
        r"host identification has changed|host key for \S+ has changed", "has another host key than before", _new_key
    ),
    _Cause(r"host key is known for|host key verification failed", "is not known to ssh yet", _first_visit),
    _Cause(r"permission denied|too many authentication failures", "does not let us in", _own_key),
    _Cause(r"connection refused", "refuses connections: no SSH server is running there", _remote_login),
    _Cause(r"could not resolve hostname", "is a name that leads to no address", _spell),
    _Cause(r"timeout, server \S+ not responding|broken pipe", "has fallen silent during the work", _wake_up),
    _Cause(
        r"no route to host|network is unreachable|host is down|timed out|can't assign requested address",
        "cannot be reached",
        _wake_up,
    ),
    _Cause(r"bad configuration option|terminating, \d+ bad", "cannot be asked: ~/.ssh/config is broken", _mend_lines),
    _Cause(r"connection (closed|reset)|kex_exchange_identification", "hangs up before we are let in", _look_there),
)


def explain_ssh(answer: ScriptResult) -> SshError:
    """The error that an answer without success stands for: what happened, in ssh's own words too, and the remedy.

    Args:
        answer: whose exit code is not 0.
    """
    host, name = shlex.quote(answer.host), f"`{answer.host}`"
    if answer.exit_code == SSH_FAILED:
        for cause in _CAUSES:
            if re.search(cause.pattern, answer.stderr, re.IGNORECASE):
                return SshError(f"{name} {cause.what}{_words(answer)}", hint=cause.remedy(host, answer.stderr))
        return SshError(f"ssh to {name} failed{_words(answer)}", hint=_look_there(host, ""))
    if answer.exit_code is None:
        return SshError(f"{name} did not finish within {answer.seconds:.0f} s{_words(answer)}", hint=_wake_up(host, ""))
    if answer.exit_code == 127 and (command := _missing_command(answer.stderr)):
        return SshError(f"{name} has no `{command}`{_words(answer)}", hint=f"install `{command}` there")
    return SshError(f"a script failed on {name} with exit code {answer.exit_code}{_words(answer)}")


def _missing_command(text: str) -> str | None:
    """As zsh says it, or as bash and dash do."""
    found = re.search(r"command not found: (\S+)", text) or re.search(r"([^\s:]+): (?:command )?not found", text)
    return found[1] if found else None


def _words(answer: ScriptResult) -> str:
    """The last lines of standard error, but for decoration."""
    lines = [line.rstrip() for line in answer.stderr.splitlines()]
    kept = [line for line in lines if line.strip("@ ") and not line.startswith("@")][-KEPT_LINES:]
    return "".join(f"\n  {line}" for line in kept)
