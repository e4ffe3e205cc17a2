"""Services under launchd: the property list, and the commands of launchctl, with a small one in its place."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_mlx.errors import ServiceError
from kimi_mlx.services.launchd import LaunchAgents, parse_state
from kimi_mlx.services.service import Service

LAUNCHCTL = Path(__file__).with_name("launchctl.py")
KEYS = {
    *("Label", "ProgramArguments", "EnvironmentVariables", "WorkingDirectory", "RunAtLoad", "KeepAlive"),
    *("ThrottleInterval", "ExitTimeOut", "ProcessType", "LimitLoadToSessionType", "SoftResourceLimits", "Umask"),
    *("StandardOutPath", "StandardErrorPath"),
}
"""Keys that launchd.plist(5) documents, of which launchd ignores misspelled ones."""


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchAgents:
    """Return agents in a folder, with the small launchctl on the path."""
    programs, loaded = tmp_path / "bin", tmp_path / "loaded"
    programs.mkdir()
    loaded.mkdir()
    program = programs / "launchctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -ISE {LAUNCHCTL} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LAUNCHD", str(loaded))
    return LaunchAgents(tmp_path / "LaunchAgents")


def sleeper(folder: Path, name: str = "server", word: str = "30") -> Service:
    return Service(name, ("/bin/sleep", word), {"PATH": "/bin"}, folder / "log")


def test_property_list(tmp_path: Path) -> None:
    command = ("/a b/kimi-mlx", "serve", "kimi-mini", '--served-name=<&"%$\\ é')
    service = Service("k2", command, {"HF_HOME": "/x & y"}, tmp_path / "log")
    agents = LaunchAgents(tmp_path)
    text = agents.render(service)
    agent = plistlib.loads(text.encode())
    assert set(agent) == KEYS
    assert agent["Label"] == "kimi-mlx.k2"
    assert tuple(agent["ProgramArguments"]) == command
    assert agent["KeepAlive"] == {"SuccessfulExit": False, "Crashed": True}
    assert agent["RunAtLoad"] is True
    assert agent["ExitTimeOut"] > 600
    agents.path("k2").write_text(text)
    assert agents.read("k2") == service
    if (plutil := shutil.which("plutil")) is not None:
        subprocess.run([plutil, "-lint", agents.path("k2")], check=True)


@pytest.mark.slow
def test_life_of_a_service(agents: LaunchAgents, tmp_path: Path) -> None:
    agents.check()
    assert (agents.names(), agents.read("server"), agents.state("server").is_enabled) == ([], None, False)
    agents.install(sleeper(tmp_path))
    first = agents.state("server")
    assert (first.is_running, first.is_enabled, first.last_exit) == (True, True, None)
    assert agents.path("server").stat().st_mode & 0o777 == 0o600
    agents.install(sleeper(tmp_path, word="31"))
    second = agents.state("server")
    assert second.pid not in (None, first.pid)
    agents.start("server")
    assert agents.state("server").pid == second.pid
    agents.stop("server")
    assert not agents.state("server").is_running
    assert agents.names() == ["server"]
    agents.stop("server")
    agents.install(sleeper(tmp_path, "other"))
    agents.remove("server")
    assert agents.names() == ["other"]
    assert agents.state("other").is_running
    agents.remove("other")


def test_failed_commands_of_launchctl(agents: LaunchAgents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "LaunchAgents").mkdir()
    agents.path("x").write_text("<plist>")
    with pytest.raises(ServiceError, match="not a service of kimi-mlx"):
        agents.read("x")
    (tmp_path / "bin" / "launchctl").write_text("#!/bin/sh\necho 'Bootstrap failed: 5: Input' >&2\nexit 5\n")
    with pytest.raises(ServiceError, match="not logged in"):
        agents.check()
    with pytest.raises(ServiceError, match=r"exit code 5: Bootstrap failed: 5"):
        agents.install(sleeper(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceError, match="not on this machine"):
        agents.start("x")


def test_state_in_the_output_of_launchctl() -> None:
    text = "gui/501/x = {\n\tstate = spawn scheduled\n\truns = 4\n\tlast exit code = 1\n\t\tpid = 7\n}"
    state = parse_state(text, True)
    assert (state.is_running, state.last_exit, state.starts) == (False, "1", "4 starts")
    killed = parse_state("\tpid = 12\n\tlast terminating signal = Killed: 9\n", True)
    assert (killed.pid, killed.last_exit) == (12, "signal 9")
    assert parse_state("something new", False).last_exit is None
