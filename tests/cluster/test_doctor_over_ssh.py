"""`kimi-mlx doctor` on two hosts over ssh: without faults, and its message for each fault. No leftovers remain."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.cluster.hosts.hostfile import read_hostfile
from kimi_mlx.cluster.network import links
from kimi_mlx.version import __version__
from tests import processes
from tests.cluster import faults, short_waits
from tests.cluster.hosts import ROOT, Hosts
from tests.cluster.short_waits import PAIR_LIMIT_S, shorten_waits
from tests.command import call

pytestmark = pytest.mark.slow

HOSTS = ("--hosts", "mac-a,mac-b")

SHORT_STEPS = f"""
from kimi_mlx.cluster.doctor import doctor
from kimi_mlx.cluster.doctor import self_test
self_test.STEP_LIMIT_S = 4.0
doctor.DEAD_LINK_LIMIT_S = 1.5
{short_waits.MAIN}
"""


@dataclass(frozen=True)
class Report:
    """Exit code and document of `kimi-mlx doctor --json`."""

    code: int
    document: dict[str, Any]

    def problem(self, check: str) -> dict[str, str]:
        """Return the only problem; it must be of this check."""
        assert self.code == 1, self.document
        problems = [each for each in self.document["findings"] if each["state"] == "problem"]
        assert [each["check"] for each in problems] == [check], problems
        return problems[0]


def start(*arguments: str, code: str = short_waits.MAIN) -> subprocess.Popen[str]:
    return processes.start([sys.executable, "-c", code, "doctor", *arguments, "--json"], text=True)


def finish(process: subprocess.Popen[str]) -> Report:
    out, err = process.communicate(timeout=180)
    assert "Traceback" not in err, err
    return Report(process.returncode, json.loads(out) if out else {"error": err})


def run_doctor(*arguments: str, needs_speed: bool = False) -> Report:
    """Run the command in this process with shorter waits.

    Args:
        arguments: arguments of `kimi-mlx doctor`.
        needs_speed: whether to refuse slow networks; on a busy machine any network may measure as slow.
    """
    with pytest.MonkeyPatch.context() as patch:
        shorten_waits(patch.setattr)
        if not needs_speed:
            patch.setattr(links, "RATE_LIMIT_BYTES_PER_S", 0)
            patch.setattr(links, "ROUND_TRIP_LIMIT_S", 1000.0)
        done = call("doctor", *arguments, "--json")
    document = json.loads(done.stdout) if done.stdout else {"error": done.stderr}
    return Report(done.returncode, document)


@pytest.fixture(autouse=True)
def same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the code of this folder, as the hosts do."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(autouse=True)
def nothing_is_left(hosts: Hosts) -> Iterator[None]:
    yield
    wait(lambda: not any(hosts.left(name) for name in hosts.names), 10, lambda: str(list(map(hosts.left, hosts.names))))


def wait(is_done: Callable[[], bool], limit_s: float, what: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + limit_s
    while not is_done():
        assert time.monotonic() < end, what()
        time.sleep(0.05)


def write(folder: Path, *addresses: str) -> str:
    """Write a hostfile of mac-a and mac-b; return its path."""
    path = folder / "two.json"
    hosts = [{"ssh": name, "ips": [ip]} for name, ip in zip(("mac-a", "mac-b"), addresses, strict=True)]
    path.write_text(json.dumps(hosts))
    return str(path)


def good(hosts: Hosts, folder: Path) -> str:
    return write(folder, *map(hosts.address, hosts.names))


def test_no_problems_and_the_addresses_are_saved(hosts: Hosts, tmp_path: Path) -> None:
    file = tmp_path / "two.json"
    report = finish(start(*HOSTS, "--save", str(file), code=faults.MAIN))  # with the default limits
    assert report.code == 0, report.document
    assert report.document["ok"]
    assert not [each for each in report.document["findings"] if each["state"] != "ok"]
    kind = report.document["network"]["kind"]  # a busy machine may find its virtual Ethernet much faster
    assert sorted(each["kind"] for each in report.document["links"]) == ["ethernet", "thunderbolt"]
    assert all(each["measured"]["bytes_per_s"] > 1e6 for each in report.document["links"])
    assert len(report.document["self_test"]["timings"]) == 18
    saved = read_hostfile(file)
    wire = {"thunderbolt": "tb", "ethernet": "lan"}[kind]
    assert [(host.ssh, host.ips) for host in saved.hosts] == [(n, (hosts.address(n, wire),)) for n in hosts.names]
    again = run_doctor("--hostfile", str(file), "--quick")
    assert (again.code, again.document["self_test"]) == (0, None)


@pytest.mark.parametrize(
    ("fault", "message", "remedy"),
    [
        ("stop_sshd", "refuses connections", "sudo systemsetup -setremotelogin on"),
        # every run of all tests has these two with `launch`
        pytest.param("change_host_key", "a different host key", "ssh-keygen -R", marks=pytest.mark.sweep),
        pytest.param("power_off", "cannot be reached", "check that it is on, awake", marks=pytest.mark.sweep),
    ],
)
def test_host_unreachable_by_ssh(
    hosts: Hosts, fault: str, message: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_OPTIONS", "-oConnectTimeout=3")
    getattr(hosts, fault)("mac-b")
    report = run_doctor(*HOSTS)
    problem = report.problem("reachable")
    assert problem["host"] == "mac-b"
    assert message in problem["message"]
    assert remedy in problem["remedy"]
    assert report.document["hosts"]["mac-a"]["hostname"] == "mac-a"


def test_python_is_missing(hosts: Hosts) -> None:
    report = run_doctor(*HOSTS, "--python", "/no/such/python")
    problems = [each for each in report.document["findings"] if each["state"] == "problem"]
    assert {(each["host"], each["message"]) for each in problems} == {
        (name, "`/no/such/python` does not exist") for name in hosts.names
    }
    assert report.code == 1


def test_other_version_on_one_host(hosts: Hosts) -> None:
    folder = hosts.packages("mac-b") / "kimi_mlx-0.0.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kimi-mlx\nVersion: 0.0.9\n")
    problem = run_doctor(*HOSTS).problem("versions")
    assert problem["message"] == f"kimi-mlx 0.0.9 (`mac-a`: {__version__})"
    assert "`kimi-mlx launch --hosts mac-a,mac-b --install`" in problem["remedy"]


def test_address_of_another_host(hosts: Hosts, tmp_path: Path) -> None:
    problem = run_doctor("--hostfile", write(tmp_path, hosts.address("mac-a"), "10.99.0.7")).problem("addresses")
    assert problem["host"] == "mac-b"
    assert f"it has {hosts.address('mac-b', 'lan')}, {hosts.address('mac-b')}" in problem["message"]
    assert "`kimi-mlx doctor --hosts mac-a,mac-b --save FILE`" in problem["remedy"]


def test_host_is_named_twice(hosts: Hosts) -> None:
    report = run_doctor("--hosts", "mac-a,mac-a")
    assert (report.code, "has `mac-a` twice" in report.document["error"]) == (2, True)
    problem = run_doctor("--hosts", f"mac-a,{hosts.address('mac-a', 'lan')}").problem("host")
    assert "same computer as `mac-a`" in problem["message"]


@pytest.mark.sweep
def test_cable_is_pulled_out(hosts: Hosts, tmp_path: Path) -> None:
    hosts.cut("mac-b", "tb")
    report = run_doctor("--hostfile", good(hosts, tmp_path))
    problem = report.problem("link")
    assert f"`mac-a` to `mac-b` at {hosts.address('mac-b')}: " in problem["message"]
    other = run_doctor(*HOSTS, "--quick")
    assert (other.code, other.document["network"]["kind"]) == (0, "ethernet")


def test_firewall(hosts: Hosts, tmp_path: Path) -> None:
    hosts.drop_answers("mac-b")
    report = run_doctor("--hostfile", good(hosts, tmp_path))
    problem = report.problem("link")
    assert f"`mac-a` to `mac-b` at {hosts.address('mac-b')}: no answer within {PAIR_LIMIT_S:g} s" in problem["message"]
    assert "firewall" in problem["remedy"]


def test_slow_network_is_refused_unless_forced(hosts: Hosts, tmp_path: Path) -> None:
    for name in hosts.names:
        for link in ("tb", "lan"):
            hosts.slow_down(name, link, "200mbit")
    file = tmp_path / "slow.json"
    problem = run_doctor(*HOSTS, "--save", str(file), needs_speed=True).problem("link")
    assert re.search(r"rate is 0\.[12]\d Gbit/s, the minimum is 1", problem["message"])
    assert "`--force-link`" in problem["remedy"]
    assert not file.exists()
    forced = run_doctor(*HOSTS, "--force-link", "--save", str(file), needs_speed=True)
    assert forced.code == 0
    assert [each["check"] for each in forced.document["findings"] if each["state"] == "warning"] == ["link"]
    assert len(read_hostfile(file).hosts) == 2


def put_store(hosts: Hosts, name: str, rank: int, commit: str) -> None:
    place = hosts.home(name) / ".local/share/kimi-mlx/stores/owner--model" / commit / f"hybrid-2-a1b2c3/rank-{rank}"
    place.mkdir(parents=True)
    origin = {"repository": "owner/model", "commit": commit}
    (place / "manifest.json").write_text(json.dumps({"format": 1, "origin": origin}, indent=1))


def test_missing_store_and_store_of_another_commit(hosts: Hosts, tmp_path: Path) -> None:
    arguments = ("owner/model", "--hostfile", good(hosts, tmp_path), "--quick")
    put_store(hosts, "mac-a", 0, "a" * 12)
    problem = run_doctor(*arguments).problem("stores")
    assert problem["host"] == "mac-b"
    assert "the store of rank 1 is missing" in problem["message"]
    put_store(hosts, "mac-b", 1, "b" * 12)
    problem = run_doctor(*arguments).problem("stores")
    assert problem["host"] in hosts.names
    assert "is missing; it has " in problem["message"]


def started(hosts: Hosts, mark: str) -> bool:
    return all(any(mark in line for line in hosts.left(name)) for name in hosts.names)


def wait_until_they_exchange(hosts: Hosts) -> None:
    """Wait until the self-test runs and its ranks are connected."""
    wait(lambda: started(hosts, "rank.self_test import"), 120)
    wait(lambda: all(map(hosts.is_connected, hosts.names)), 60)
    time.sleep(0.5)


@pytest.mark.sweep
def test_cable_is_pulled_out_during_the_self_test(hosts: Hosts, tmp_path: Path) -> None:
    # payloads of Kimi K2's size, so that it takes a while
    process = start("--hostfile", good(hosts, tmp_path), "kimi-k2", code=SHORT_STEPS)
    wait_until_they_exchange(hosts)
    hosts.cut("mac-b", "tb")
    report = finish(process)
    assert report.code == 1
    [problem] = [each for each in report.document["findings"] if each["check"] == "self-test"]
    assert problem["state"] == "problem"
    phases = ("though all ranks are alive", "could not connect to the other ranks", "did not finish the link test")
    assert any(phase in problem["message"] for phase in phases)
    assert f"`mac-a` to `mac-b` at {hosts.address('mac-b')}: no answer" in problem["message"]


def test_rank_is_killed(hosts: Hosts, tmp_path: Path) -> None:
    process = start("--hostfile", good(hosts, tmp_path), "kimi-k2")
    wait_until_they_exchange(hosts)
    hosts.run("mac-b", "pkill", "-KILL", "-f", "rank.self_test import")
    report = finish(process)
    [problem] = [each for each in report.document["findings"] if each["check"] == "self-test"]
    assert problem["state"] == "problem"
    assert re.fullmatch(r"rank 1 of 2 \(`mac-b`, process \d+\) was ended by SIGKILL", problem["message"])


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("mark", "number"),
    [
        ("--limit", signal.SIGINT),
        ("rank.self_test import", signal.SIGKILL),
        pytest.param("--limit", signal.SIGKILL, marks=pytest.mark.sweep),
        pytest.param("rank.self_test import", signal.SIGINT, marks=pytest.mark.sweep),
    ],
)
def test_no_process_is_left_after_the_doctor(hosts: Hosts, mark: str, number: signal.Signals, tmp_path: Path) -> None:
    process = start("--hostfile", good(hosts, tmp_path))
    wait(lambda: started(hosts, mark), 120)
    begin = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    assert time.monotonic() - begin < 15
