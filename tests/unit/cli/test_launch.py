"""`kimi-mlx launch`: arguments of launch and its command; wrong usage, which fails before a host is contacted."""

from __future__ import annotations

import subprocess
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
import typer

from kimi_mlx.cli import launch_checks, launched_command
from kimi_mlx.cli.check import first_difference
from kimi_mlx.cli.open_model import LaunchContext
from kimi_mlx.cluster.doctor.cluster_checks import check_kernels
from kimi_mlx.cluster.doctor.doctor import Diagnosis
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest
from kimi_mlx.cluster.doctor.wired_memory import check_wired_memory
from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import Host, Hostfile
from kimi_mlx.cluster.network.choose import check_encryption
from kimi_mlx.cluster.network.links import Network
from kimi_mlx.history.store import open_history
from kimi_mlx.units import GIB
from tests.command import call
from tests.unit.cluster.doctor.test_host_checks import MAC, OTHER

REACHED = 77
HOSTFILE = Hostfile((Host("mac-a", ("10.0.0.1",)), Host("mac-b", ("10.0.0.2",))), "ring")
HOSTS = ("--hosts", "mac-a,mac-b")


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the command and the request instead of contacting hosts."""
    reached: list[Any] = []

    class Command(launched_command.LaunchedCommand):
        def __init__(self, context: typer.Context, words: list[str]):
            super().__init__(context, words)
            reached.append(self)

    def diagnose(request: DoctorRequest, is_install: bool) -> None:
        reached.extend((request, is_install))
        raise typer.Exit(REACHED)

    monkeypatch.setattr(launched_command, "LaunchedCommand", Command)
    monkeypatch.setattr(launch_checks, "run_diagnosis", diagnose)
    return reached


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
def test_arguments_of_the_command(
    reached: list[Any], words: list[str], name: str, model: str, is_json: bool, tmp_path: Path
) -> None:
    if model == "check":
        done = call("launch", *HOSTS, *words)
        assert done.returncode == 2  # no such model
        assert "check" in done.stderr
        return
    done = call("launch", *HOSTS, "--env", "A=b=c", *words)
    assert done.returncode == REACHED, done.stderr
    command, request, is_install = reached
    assert (command.name, command.model, command.is_json) == (name, model, is_json)
    assert request.need.name == model
    assert request.is_quick == (name != "check")
    assert [host.ssh for host in request.hostfile.hosts] == ["mac-a", "mac-b"]
    assert request.hostfile.envs == ("A=b=c",)
    assert not is_install


def test_a_continued_conversation_brings_its_model(
    reached: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert "there are no conversations yet" in call("launch", *HOSTS, "chat", "-p", "hi", "-c").stderr
    with closing(open_history()) as store:
        store.create("kimi-k2")
    for words, model in ((["-c"], "kimi-k2"), (["moonlight", "-c"], "moonlight"), ([], "kimi-mini")):
        reached.clear()
        assert call("launch", *HOSTS, "chat", "-p", "hi", *words).returncode == REACHED
        assert reached[0].model == model


@pytest.mark.parametrize("words", [["--fast-sync", "chat", "-p", "hi"], ["bench", "--fast-sync"]])
def test_fast_sync_is_accepted_before_and_after_the_command(reached: list[Any], words: list[str]) -> None:
    done = call("launch", *HOSTS, "--env", "MLX_METAL_FAST_SYNCH=0", *words)
    assert done.returncode == REACHED, done.stderr
    assert reached[1].hostfile.envs == ("MLX_METAL_FAST_SYNCH=1",)


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
        ([*HOSTS, "--no-such-option"], "launch has no option `--no-such-option`"),
        (["--host", "mac-a,mac-b"], "launch has no option `--host` hint: did you mean `--hosts`?"),
        ([*HOSTS, "chat", "-p"], "-p"),
        ([*HOSTS, "chat", "-p", "hi", "--image", "no-such.png"], "there is no file `no-such.png`"),
        ([*HOSTS, "chat", "-p", "hi", "--video", "/tmp"], "`/tmp` is a folder"),
        ([*HOSTS, "chat", "-p", "hi", "--file", "no-such.txt"], "there is no file `no-such.txt`"),
        ([*HOSTS, "chat", "-p", "hi", "--system-file", "no-such.txt"], "there is no file `no-such.txt`"),
        ([*HOSTS, "chat", "-p", "hi", "--schema", "age number"], "unknown type `number`"),
        ([*HOSTS, "bench", "--repeat", "0"], "--repeat"),
        ([*HOSTS, "chat", "no-such-model"], "no-such-model"),
        (["chat", "kimi-k2", "--hosts", "a,b"], "`--hosts` is an option of `launch`, and must come before `chat`"),
        (["serve", "--hostfile=two.json"], "hint: type `kimi-mlx launch --hostfile ... serve ...`"),
        ([*HOSTS, "list"], "hint: type `kimi-mlx models`"),
        ([*HOSTS, "pull", "kimi-k2"], "hint: type `kimi-mlx download MODEL`"),
        ([*HOSTS, "chta", "kimi-k2"], "hint: did you mean `chat`?"),
        ([*HOSTS, "convert", "a", "b"], "hint: type `kimi-mlx convert` without launch"),
    ],
)
def test_wrong_usage_fails_before_a_host_is_contacted(reached: list[Any], words: list[str], message: str) -> None:
    done = call("launch", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())
    assert not any(isinstance(item, DoctorRequest) for item in reached)


def launch_with(
    finding: Finding, monkeypatch: pytest.MonkeyPatch, *words: str, other: Facts = OTHER
) -> subprocess.CompletedProcess[str]:
    """Run launch with a diagnosis that has a finding; the command itself exits with REACHED."""

    class Command(launched_command.LaunchedCommand):
        def run(self, launched: LaunchContext) -> None:
            raise typer.Exit(REACHED)

    diagnosis = Diagnosis(("mac-a", "mac-b"), {"mac-a": MAC, "mac-b": other}, (finding,), hostfile=HOSTFILE)
    monkeypatch.setattr(launched_command, "LaunchedCommand", Command)
    monkeypatch.setattr(launch_checks, "run_diagnosis", lambda request, is_install: diagnosis)
    return call("launch", *HOSTS, *words)


def test_lost_wired_memory_prevents_loading_but_not_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = check_wired_memory(replace(MAC, wired_bytes=414 * GIB, process_bytes=8 * GIB))
    refused = launch_with(finding, monkeypatch, "chat", "-p", "hi")
    assert refused.returncode == 1
    assert "restart this Mac" in refused.stderr
    assert "1 problem found. Fix it and run the launch again." in refused.stderr
    assert launch_with(finding, monkeypatch, "--force", "chat", "-p", "hi").returncode == REACHED
    assert launch_with(finding, monkeypatch, "download", "kimi-k2").returncode == REACHED


def test_hosts_with_other_chips_do_not_run_hybrid(monkeypatch: pytest.MonkeyPatch) -> None:
    unequal = replace(OTHER, chip="Apple M4 Max")
    finding = check_kernels([MAC, unequal])
    assert (
        launch_with(finding, monkeypatch, "chat", "-p", "hi", other=unequal).returncode == REACHED
    )  # pipeline is chosen
    refused = launch_with(finding, monkeypatch, "chat", "-p", "hi", "--strategy", "hybrid", other=unequal)
    assert refused.returncode == 1
    assert "leave `--strategy` out" in " ".join(refused.stderr.split())


def test_wifi_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network("wifi", ("10.0.0.1", "10.0.0.2"), ("en0", "en0"))
    finding = check_encryption("mac-a, mac-b", network, [IPv4Network("10.0.0.0/24")], "ring")
    done = launch_with(finding, monkeypatch, "chat", "-p", "hi")
    assert done.returncode == REACHED
    assert "is Wi-Fi: anyone who can read its traffic can recover prompts and answers" in " ".join(done.stderr.split())


def test_it_does_not_start_under_another_launcher(reached: list[Any]) -> None:
    done = call("launch", *HOSTS, variables={"MLX_RANK": "0"})
    assert done.returncode == 2
    assert "started by `mlx.launch`" in done.stderr
    assert reached == []


@pytest.mark.parametrize(("second", "index"), [([1, 2, 4], 2), ([1, 2], 2), ([1, 2, 3, 4], 3), ([], 0)])
def test_the_first_difference_of_two_answers(second: list[int], index: int) -> None:
    assert first_difference([1, 2, 3], second) == index
