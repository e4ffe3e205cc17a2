"""`kimi-mlx launch`: which words are whose, and wrong usage, which is told before any host is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from kimi_mlx.cli import launch as module
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest
from tests.command import call

ASKED = 77
HOSTS = ("--hosts", "mac-a,mac-b")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The command and the request, instead of hosts that are asked."""
    found: list[Any] = []

    class Command(module._Command):
        def __init__(self, context: typer.Context, words: list[str]):
            super().__init__(context, words)
            found.append(self)

    def diagnose(request: DoctorRequest, is_install: bool) -> None:
        found.extend((request, is_install))
        raise typer.Exit(ASKED)

    monkeypatch.setattr(module, "_Command", Command)
    monkeypatch.setattr(module, "_diagnose", diagnose)
    return found


@pytest.mark.parametrize(
    ("words", "name", "model", "is_json"),
    [
        (["-p", "check"], "chat", "kimi-mini", False),
        (["kimi-k2", "-p", "hi"], "chat", "kimi-k2", False),
        (["chat", "-p", "hi"], "chat", "kimi-mini", False),
        (["chat", "kimi-k2", "-p", "bench", "--json"], "chat", "kimi-k2", True),
        (["-p", "hi"], "chat", "kimi-mini", False),
        (["--json", "-p", "hi", "kimi-k2"], "chat", "kimi-k2", True),
        (["bench", "kimi-k2", "--prompt-tokens", "8"], "bench", "kimi-k2", False),
        (["check", "--json"], "check", "kimi-mini", True),
        (["download", "moonlight", "--dry-run"], "download", "moonlight", False),
        (["chat", "check"], "chat", "check", False),
    ],
)
def test_which_words_are_the_commands(
    asked: list[Any], words: list[str], name: str, model: str, is_json: bool, tmp_path: Path
) -> None:
    if model == "check":
        done = call("launch", *HOSTS, *words)
        assert done.returncode == 2  # no such model
        assert "check" in done.stderr
        return
    done = call("launch", *HOSTS, "--env", "A=b=c", *words)
    assert done.returncode == ASKED, done.stderr
    command, request, is_install = asked
    assert (command.name, command.model, command.is_json) == (name, model, is_json)
    assert request.need.name == model
    assert request.is_quick == (name != "check")
    assert [host.ssh for host in request.hostfile.hosts] == ["mac-a", "mac-b"]
    assert request.hostfile.envs == ("A=b=c",)
    assert not is_install


@pytest.mark.parametrize("words", [["--fast-sync", "chat", "-p", "hi"], ["bench", "--fast-sync"]])
def test_the_fast_fence_may_be_asked_for_before_and_behind_the_command(asked: list[Any], words: list[str]) -> None:
    done = call("launch", *HOSTS, "--env", "MLX_METAL_FAST_SYNCH=0", *words)
    assert done.returncode == ASKED, done.stderr
    assert asked[1].hostfile.envs == ("MLX_METAL_FAST_SYNCH=1",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "launch needs hosts"),
        (["chat"], "launch needs hosts"),
        ([*HOSTS, "--hostfile", "two.json"], "--hosts and --hostfile exclude each other"),
        ([*HOSTS, "--install", "--python", "/usr/bin/python3"], "--install and --python exclude each other"),
        ([*HOSTS, "--python", "python3"], "is not an absolute path"),
        ([*HOSTS, "--env", "NAME"], "`--env` has 'NAME', which is not NAME=value"),
        ([*HOSTS, "--env", "1A=2"], "`--env` has '1A=2', which is not NAME=value"),
        ([*HOSTS, "--env", "=2"], "`--env` has '=2', which is not NAME=value"),
        ([*HOSTS, "--limit", "1"], "--limit"),
        ([*HOSTS, "--restarts", "-1"], "--restarts"),
        ([*HOSTS, "chat", "--ranks", "2"], "--ranks and hosts exclude each other"),
        ([*HOSTS, "bench", "--ranks", "2"], "--ranks and hosts exclude each other"),
        ([*HOSTS, "download", "kimi-k2", "--ranks", "2"], "--ranks and hosts exclude each other"),
        ([*HOSTS, "chat", "--no-such-option"], "--no-such-option"),
        ([*HOSTS, "--no-such-option"], "--no-such-option"),
        ([*HOSTS, "chat", "-p"], "-p"),
        ([*HOSTS, "bench", "--repeat", "0"], "--repeat"),
        ([*HOSTS, "chat", "no-such-model"], "no-such-model"),
    ],
)
def test_wrong_usage_is_told_before_any_host_is_asked(asked: list[Any], words: list[str], message: str) -> None:
    done = call("launch", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())
    assert not any(isinstance(each, DoctorRequest) for each in asked)


def test_it_does_not_start_under_another_launcher(asked: list[Any]) -> None:
    done = call("launch", *HOSTS, variables={"MLX_RANK": "0"})
    assert done.returncode == 2
    assert "started by `mlx.launch`" in done.stderr
    assert asked == []
