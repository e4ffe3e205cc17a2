"""What went wrong when kimi-mlx was brought to a host, and what to type then."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from kimi_mlx.cluster.channel.host_process import HostProcess
from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.ssh import SSH_FAILED, ScriptResult
from kimi_mlx.cluster.hosts.ssh_errors import explain_ssh
from kimi_mlx.errors import InstallError
from kimi_mlx.units import format_seconds

UV = "`curl -LsSf https://astral.sh/uv/install.sh | sh`"


@dataclass(frozen=True)
class InstallProblem:
    """Why a host has no kimi-mlx now.

    Args:
        message: what happened, in the host's own words too.
        hint: what to type.
    """

    message: str
    hint: str | None


_FAILURES = {
    "no folder": "its data folder cannot be written",
    "no wheel": "the wheel cannot be written",
    "no environment": "an environment could not be made",
    "pip": "kimi-mlx could not be installed",
    "no start": "kimi-mlx was installed, but does not start",
}
"""What install.sh says -> in words; what needs more words is in explain_failure."""

_FULL = r"no space left|disk quota exceeded|os error 28"
_DENIED = r"permission denied|read-only file system|not a directory|operation not permitted"
_NO_NETWORK = (
    r"name resolution|name or service not known|nodename nor servname|failed to establish a new connection|"
    r"network is unreachable|connection refused|timed out|dns error|error sending request|failed to fetch"
)
_NO_SUCH = r"no matching distribution|no solution found|could not find a version"


def explain_failure(facts: Facts, what: str, words: str) -> InstallProblem:
    """A failure that install.sh has told.

    Args:
        facts: of the host.
        what: as install.sh names it.
        words: the last lines of standard error there.
    """
    where = f"{facts.data_folder}/venv"
    if what == "not ours":
        return InstallProblem(f"`{where}` is there, but kimi-mlx has not made it", "move it away there")
    if what == "no Python":
        package = "brew install python" if facts.is_mac else "sudo apt install python3 python3-venv"
        return InstallProblem("it has neither uv nor Python 3.10 or newer", f"type there {UV}, or `{package}`")
    if what.startswith("no venv"):
        minor = what.rpartition(" ")[2]
        message = f"its Python {minor} cannot make environments (`ensurepip` is missing), and it has no uv"
        package = "brew install python" if facts.is_mac else f"sudo apt install python{minor}-venv"
        return InstallProblem(message, f"type there `{package}`, or {UV}")
    return InstallProblem(f"{_FAILURES.get(what, what)}{_indented(words)}", _hint(facts, words))


def explain_ending(host: str, process: HostProcess, seconds: float) -> InstallProblem:
    """The end of a host's client without a word of install.sh: mostly ssh's own failure."""
    process.wait(1)
    if process.exit_code == SSH_FAILED:
        error = explain_ssh(ScriptResult(host, SSH_FAILED, "", process.words, seconds))
        return InstallProblem(error.message, error.hint)
    return InstallProblem(f"the installation {process.describe_exit()}", "try again")


def explain_late(limit_s: float, step: str, words: str) -> InstallProblem:
    """A host that was not ready in time."""
    message = f"not ready within {format_seconds(limit_s)}; it was {step}{_indented(words)}"
    return InstallProblem(message, "try again: what has been downloaded there is not downloaded twice")


def install_error(problems: Mapping[str, InstallProblem]) -> InstallError:
    """One error for all hosts that failed."""
    hosts = ", ".join(f"`{host}`" for host in problems)
    if len(problems) == 1:
        (problem,) = problems.values()
        return InstallError(f"kimi-mlx was not installed on {hosts}: {problem.message}", problem.hint)
    lines = [f"`{host}`: {problem.message}" for host, problem in problems.items()]
    hints: dict[str, list[str]] = {}
    for host, problem in problems.items():
        if problem.hint is not None:
            hints.setdefault(problem.hint, []).append(host)
    hint = "; ".join(f"{', '.join(names)}: {each}" for each, names in hints.items())
    return InstallError(f"kimi-mlx was not installed on {hosts}\n" + "\n".join(lines), hint or None)


def _hint(facts: Facts, words: str) -> str:
    host, folder = shlex.quote(facts.host), shlex.quote(facts.data_folder or "")
    look = f"`ssh {host} curl -sSI https://www.python.org`"
    if re.search(_FULL, words, re.IGNORECASE):
        return f"make room there; what is full: `ssh {host} df -h`"
    if re.search(_NO_NETWORK, words, re.IGNORECASE):
        return f"has it a way to the internet? {look}"
    if re.search(_DENIED, words, re.IGNORECASE):
        return f"whose is it? Type there `ls -ld {folder}`"
    if re.search(_NO_SUCH, words, re.IGNORECASE):
        return f"has it a way to the internet ({look}), and a system as new as this machine's?"
    return f"read the lines above; by hand: `ssh {host}`"


def _indented(words: str) -> str:
    return "".join(f"\n  {line}" for line in words.splitlines() if line.strip())
