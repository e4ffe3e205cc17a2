"""`kimi-mlx service` with a real systemd of a user: install, requests, a crash, new options, uninstall."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.user_systemd import user_systemd, why_not

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """Run a user's systemd; return the environment of its clients."""
    # sockets need a short path
    with tempfile.TemporaryDirectory() as folder, user_systemd(Path(folder)) as found:
        yield found


@pytest.fixture
def port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def service(variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run `kimi-mlx service`."""
    return subprocess.run(
        [sys.executable, "-m", "kimi_mlx", "service", *words],
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
    )


def report(variables: dict[str, str], *words: str) -> dict:
    """Return the JSON document of a command that succeeds."""
    done = service(variables, *words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def models(port: int, key: str | None = None) -> list[str]:
    """Return the ids of the models of a server."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return [model["id"] for model in json.load(response)["data"]]


def test_life_of_a_service(variables: dict[str, str], port: int) -> None:
    tricky = '%h $HOME "x" é'
    first = report(variables, "install", "kimi-mini", "--port", str(port), "--served-name", tricky)
    assert (first["is_up"], first["is_enabled"], first["url"]) == (True, True, f"http://127.0.0.1:{port}")
    assert tricky in models(port)
    assert Path(first["path"]).stat().st_mode & 0o777 == 0o600

    os.kill(first["pid"], signal.SIGKILL)  # a crash
    deadline = time.monotonic() + PATIENCE_S
    while (restarted := json.loads(service(variables, "status", "--name=server", "--json").stdout))["is_up"] is False:
        assert time.monotonic() < deadline, restarted
        time.sleep(0.5)
    assert restarted["pid"] != first["pid"]
    assert restarted["starts"] == "1 restart after a failure"

    keys = Path(variables["HOME"], "keys")
    keys.write_text("a-key\n")
    keys.chmod(0o600)
    second = report(variables, "install", "kimi-mini", "--port", str(port), "--api-key-file", str(keys))
    assert second["pid"] != restarted["pid"]
    assert models(port, "a-key")
    assert "a-key" not in Path(second["path"]).read_text()
    assert "a-key" not in " ".join(second["command"])

    refused = service(variables, "install", "--name", "other", "--port", str(port))
    assert (refused.returncode, "in use" in refused.stderr) == (2, True)
    assert "is ready at" in service(variables, "logs", "-n", "20").stdout
    assert not report(variables, "stop")["is_running"]
    assert service(variables, "status").returncode == 1
    assert report(variables, "restart")["is_up"]
    assert report(variables, "uninstall")["removed"] == second["path"]
    assert not Path(second["path"]).exists()
    assert not Path(second["log"]).exists()
    with pytest.raises(OSError, match="refused"):
        models(port)
    assert service(variables, "uninstall").returncode == 1


@pytest.mark.ranks
def test_several_ranks(variables: dict[str, str], port: int) -> None:
    hostfile = ROOT / "hostfiles" / "two-local.json"
    started = report(variables, "install", "kimi-mini", "--hostfile", str(hostfile), "--port", str(port))
    assert (started["is_up"], started["hosts"]) == (True, str(hostfile))
    assert models(port)
    report(variables, "stop")
    assert "state     stopped" in service(variables, "status").stdout  # a stop is no failure
    assert "stopped" in service(variables, "logs", "-n", "1").stdout
    report(variables, "uninstall")


def test_a_server_that_fails(variables: dict[str, str], port: int) -> None:
    keys = Path(variables["HOME"], "keys-of-failing")
    keys.write_text("a-key\n")
    keys.chmod(0o600)
    assert report(variables, "install", "--name=failing", "--port", str(port), "--api-key-file", str(keys))["is_up"]
    keys.unlink()
    failed = service(variables, "restart", "--name=failing")
    assert failed.returncode == 1
    assert "ended with exit code 2" in failed.stderr
    assert "there is no such file" in failed.stderr
    assert "kimi-mlx service uninstall --name failing" in failed.stderr
    assert [each["name"] for each in json.loads(service(variables, "status", "--json").stdout)] == ["failing"]
    assert report(variables, "uninstall", "--name=failing")
