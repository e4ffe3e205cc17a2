"""Hosts whose login shells print, wait and hide commands, and hosts on which nothing can be saved."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_mlx.cluster.hosts.ssh import run_script
from tests.cluster import faults
from tests.cluster.faults import Fault, answer, rank_pid, run_without_faults, send, wait_until_gone
from tests.cluster.hosts import ROOT, Hosts
from tests.cluster.login_shells import BACKGROUND_JOBS, NOISY
from tests.cluster.test_doctor_over_ssh import HOSTS, run_doctor
from tests.cluster.test_launch_over_ssh import run

pytestmark = pytest.mark.slow

# one kind of job in every run; the others take 20 to 35 s each
JOBS = [
    pytest.param(text, id=name, marks=pytest.mark.sweep if number else ())
    for number, (name, text) in enumerate(BACKGROUND_JOBS.items())
]


@pytest.fixture(autouse=True)
def nothing_is_left(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the code of this folder, as the hosts do; afterwards no process may be left there."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_STATE_HOME", str(hosts.folder / "front/state"))
    yield
    hosts.heal()
    assert wait_until_gone(hosts, 10) == []


def shell(name: str) -> str:
    """Return the path of a shell; skip the test if it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.mark.parametrize(
    "name", [name if name == "zsh" else pytest.param(name, marks=pytest.mark.sweep) for name in NOISY]
)
def test_login_shell_does_not_disturb_the_doctor(hosts: Hosts, name: str) -> None:
    hosts.set_login_shell("mac-b", shell(name), NOISY[name])
    where = run_script("mac-b", "pwd; command -v dd", 20)
    assert where.stdout == f"{hosts.home('mac-b')}\n/usr/bin/dd\n", where
    assert (where.stderr, where.exit_code) == ("", 0)
    report = run_doctor(*HOSTS)
    assert report.code == 0, report.document
    assert report.document["hosts"]["mac-b"]["system"] == "Linux"
    assert report.document["self_test"]["timings"]


@pytest.mark.sweep
def test_banner_that_appears_during_an_answer_does_not_prevent_the_restart(hosts: Hosts, tmp_path: Path) -> None:
    def inflict(front: faults.Front) -> None:
        hosts.set_login_shell("mac-b", "/bin/bash", NOISY["bash"])
        send(hosts, "mac-b", signal.SIGKILL, rank_pid(hosts, "mac-b"))

    where = ("--hostfile", faults.write_hostfile(hosts, tmp_path / "two.json"))
    outcome = answer(hosts, where, [Fault("banner", inflict)])
    assert (outcome.code, outcome.text) == (0, run_without_faults()), outcome.errors
    assert outcome.left == []


@pytest.mark.parametrize("start_up", JOBS)
def test_background_job_does_not_disturb_the_doctor(hosts: Hosts, start_up: str) -> None:
    hosts.set_login_shell("mac-b", "/bin/bash", start_up)
    report = run_doctor(*HOSTS)
    assert report.code == 0, report.document
    assert report.document["self_test"]["timings"]


@pytest.mark.sweep
@pytest.mark.parametrize("start_up", JOBS)
def test_background_job_does_not_prevent_the_restart(hosts: Hosts, tmp_path: Path, start_up: str) -> None:
    def inflict(front: faults.Front) -> None:
        hosts.set_login_shell("mac-b", "/bin/bash", start_up)
        send(hosts, "mac-b", signal.SIGKILL, rank_pid(hosts, "mac-b"))

    where = ("--hostfile", faults.write_hostfile(hosts, tmp_path / "two.json"))
    outcome = answer(hosts, where, [Fault("background job", inflict)])
    assert (outcome.code, outcome.text) == (0, run_without_faults()), outcome.errors
    assert outcome.left == []


def chat(hosts: Hosts, tmp_path: Path) -> tuple[int, str, str]:
    """Run a short chat on the hosts; return exit code, stdout, and stderr as one line."""
    where = ("--hostfile", faults.write_hostfile(hosts, tmp_path / "two.json"))
    return run(*where, "chat", "kimi-mini", "-t", "0", "--no-thinking", "-p", "Hello", "--max-tokens", "4")


def test_full_and_read_only_folders_do_not_prevent_a_chat(hosts: Hosts, tmp_path: Path) -> None:
    expected = chat(hosts, tmp_path)
    assert expected[0] == 0, expected
    hosts.fill_temporary_folder("mac-a")
    hosts.make_read_only("mac-b", hosts.home("mac-b"))
    hosts.make_read_only("mac-b", hosts.folder / "mac-b" / "tmp")
    code, text, errors = chat(hosts, tmp_path)
    assert (code, text) == expected[:2], errors


def test_host_on_which_no_temporary_file_can_be_written(hosts: Hosts, tmp_path: Path) -> None:
    own = hosts.folder / "mac-b"
    hosts.run("mac-b", "mount", "--bind", str(own), str(own))  # stays writable: sshd writes its log there
    for folder in (own / "tmp", hosts.home("mac-b"), Path("/tmp"), Path("/var/tmp")):
        hosts.make_read_only("mac-b", folder)
    code, _, errors = chat(hosts, tmp_path)
    assert code == 1
    assert "`mac-b` cannot write temporary files: " in errors
    assert "--env TMPDIR=/path" in errors
