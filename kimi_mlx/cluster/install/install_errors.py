"""Messages and hints for failed installations."""

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
    """Why the installation failed on a host.

    Attributes:
        message: description of the failure, with the host's output.
        hint: command to type, or None.
    """

    message: str
    hint: str | None


_FAILURES = {
    "no folder": "cannot write its data folder",
    "no wheel": "cannot write the wheel",
    "no environment": "cannot create a virtual environment",
    "pip": "cannot install kimi-mlx",
    "no start": "kimi-mlx is installed, but does not start",
}
"""Failure reported by install.sh -> message; explain_failure has the other failures."""

_FULL = r"no space left|disk quota exceeded|os error 28"
_DENIED = r"permission denied|read-only file system|not a directory|operation not permitted"
_NO_NETWORK = (
    r"name resolution|name or service not known|nodename nor servname|failed to establish a new connection|"
    r"network is unreachable|connection refused|timed out|dns error|error sending request|failed to fetch"
)
_NO_SUCH = r"no matching distribution|no solution found|could not find a version"


def explain_failure(facts: Facts, failure: str, stderr: str) -> InstallProblem:
    """Describe a failure that install.sh reported.

    Args:
        facts: facts of the host.
        failure: name of the failure in install.sh.
        stderr: last lines of standard error of install.sh.
    """
    venv = f"{facts.data_folder}/venv"
    if failure == "not ours":
        return InstallProblem(f"`{venv}` exists, but kimi-mlx did not create it", "move or rename it on that host")
    if failure == "no Python":
        package = "brew install python" if facts.is_mac else "sudo apt install python3 python3-venv"
        return InstallProblem("it has neither uv nor Python 3.10 or newer", f"type on that host {UV}, or `{package}`")
    if failure.startswith("no venv"):
        minor = failure.rpartition(" ")[2]
        message = f"its Python {minor} cannot create virtual environments (`ensurepip` is missing), and it has no uv"
        package = "brew install python" if facts.is_mac else f"sudo apt install python{minor}-venv"
        return InstallProblem(message, f"type on that host `{package}`, or {UV}")
    return InstallProblem(f"{_FAILURES.get(failure, failure)}{_indented(stderr)}", _hint(facts, stderr))


def explain_exit(host: str, process: HostProcess, seconds: float) -> InstallProblem:
    """Describe an exit without a failure reported by install.sh: usually ssh itself or the login shell failed."""
    process.wait(1)
    if process.exit_code == SSH_FAILED or not process.has_started:
        result = ScriptResult(host, process.exit_code, "", process.output, seconds, has_started=process.has_started)
        error = explain_ssh(result)
        return InstallProblem(error.message, error.hint)
    return InstallProblem(f"the installation {process.describe_exit()}", "try again")


def explain_timeout(limit_s: float, step: str, stderr: str) -> InstallProblem:
    """Describe a host that did not finish in time."""
    message = f"not ready within {format_seconds(limit_s)}; it was {step}{_indented(stderr)}"
    return InstallProblem(message, "try again; packages that are already downloaded there are not downloaded again")


def install_error(problems: Mapping[str, InstallProblem]) -> InstallError:
    """Return one error for all hosts that failed."""
    hosts = ", ".join(f"`{host}`" for host in problems)
    if len(problems) == 1:
        (problem,) = problems.values()
        return InstallError(f"kimi-mlx was not installed on {hosts}: {problem.message}", problem.hint)
    lines = [f"`{host}`: {problem.message}" for host, problem in problems.items()]
    hints: dict[str, list[str]] = {}
    for host, problem in problems.items():
        if problem.hint is not None:
            hints.setdefault(problem.hint, []).append(host)
    hint = "; ".join(f"{', '.join(names)}: {text}" for text, names in hints.items())
    return InstallError(f"kimi-mlx was not installed on {hosts}\n" + "\n".join(lines), hint or None)


def _hint(facts: Facts, stderr: str) -> str:
    host, folder = shlex.quote(facts.host), shlex.quote(facts.data_folder or "")
    test = f"`ssh {host} curl -sSI https://www.python.org`"
    if re.search(_FULL, stderr, re.IGNORECASE):
        return f"free disk space there; `ssh {host} df -h` shows which disk is full"
    if re.search(_NO_NETWORK, stderr, re.IGNORECASE):
        return f"does it have internet access? {test}"
    if re.search(_DENIED, stderr, re.IGNORECASE):
        return f"check its owner: type on that host `ls -ld {folder}`"
    if re.search(_NO_SUCH, stderr, re.IGNORECASE):
        return f"does it have internet access ({test}), and a system as new as this machine's?"
    return f"read the lines above, or log in: `ssh {host}`"


def _indented(text: str) -> str:
    return "".join(f"\n  {line}" for line in text.splitlines() if line.strip())
