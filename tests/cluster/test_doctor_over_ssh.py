"""The doctor on two hosts over real ssh: well, and with each fault its message, within its limit, and nothing left."""

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
from kimi_mlx.version import __version__
from tests import processes
from tests.cluster import faults, impatience
from tests.cluster.hosts import ROOT, Hosts
from tests.cluster.impatience import PAIR_LIMIT_S, be_impatient
from tests.command import call

pytestmark = pytest.mark.slow

HOSTS = ("--hosts", "mac-a,mac-b")

SHORT_STEPS = f"""
from kimi_mlx.cluster.doctor import doctor
from kimi_mlx.cluster.doctor import self_test
self_test.STEP_LIMIT_S = 4.0
doctor.DEAD_LINK_LIMIT_S = 1.5
{impatience.MAIN}
"""


@dataclass(frozen=True)
class Visit:
    """What the doctor said."""

    code: int
    document: dict[str, Any]

    def trouble(self, check: str) -> dict[str, str]:
        """The one trouble there is, of this check."""
        assert self.code == 1, self.document
        found = [each for each in self.document["findings"] if each["state"] == "problem"]
        assert [each["check"] for each in found] == [check], found
        return found[0]


def start(*arguments: str, code: str = impatience.MAIN) -> subprocess.Popen[str]:
    return processes.start([sys.executable, "-c", code, "doctor", *arguments, "--json"], text=True)


def finish(process: subprocess.Popen[str]) -> Visit:
    out, err = process.communicate(timeout=180)
    assert "Traceback" not in err, err
    return Visit(process.returncode, json.loads(out) if out else {"error": err})


def visit(*arguments: str) -> Visit:
    """Without a process of its own, and with less patience for links than the command has."""
    with pytest.MonkeyPatch.context() as patch:
        be_impatient(patch.setattr)
        done = call("doctor", *arguments, "--json")
    document = json.loads(done.stdout) if done.stdout else {"error": done.stderr}
    return Visit(done.returncode, document)


@pytest.fixture(autouse=True)
def same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hosts run, too."""
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
    """A hostfile of mac-a and mac-b."""
    path = folder / "two.json"
    hosts = [{"ssh": name, "ips": [ip]} for name, ip in zip(("mac-a", "mac-b"), addresses, strict=True)]
    path.write_text(json.dumps(hosts))
    return str(path)


def good(hosts: Hosts, folder: Path) -> str:
    return write(folder, *map(hosts.address, hosts.names))


def test_all_is_well_and_the_thunderbolt_addresses_are_saved(hosts: Hosts, tmp_path: Path) -> None:
    file = tmp_path / "two.json"
    found = finish(start(*HOSTS, "--save", str(file), code=faults.MAIN))  # with the limits that users have
    assert found.code == 0, found.document
    assert found.document["ok"]
    assert not [each for each in found.document["findings"] if each["state"] != "ok"]
    kind = found.document["network"]["kind"]  # a busy machine may find its virtual Ethernet much faster
    assert sorted(each["kind"] for each in found.document["links"]) == ["ethernet", "thunderbolt"]
    assert all(each["measured"]["bytes_per_s"] > 1e6 for each in found.document["links"])
    assert len(found.document["self_test"]["timings"]) == 18
    saved = read_hostfile(file)
    wire = {"thunderbolt": "tb", "ethernet": "lan"}[kind]
    assert [(host.ssh, host.ips) for host in saved.hosts] == [(n, (hosts.address(n, wire),)) for n in hosts.names]
    again = visit("--hostfile", str(file), "--quick")
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
def test_a_host_that_ssh_does_not_reach(
    hosts: Hosts, fault: str, message: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_OPTIONS", "-oConnectTimeout=3")
    getattr(hosts, fault)("mac-b")
    found = visit(*HOSTS)
    trouble = found.trouble("reachable")
    assert trouble["host"] == "mac-b"
    assert message in trouble["message"]
    assert remedy in trouble["remedy"]
    assert found.document["hosts"]["mac-a"]["hostname"] == "mac-a"


def test_a_python_that_is_not_there(hosts: Hosts) -> None:
    found = visit(*HOSTS, "--python", "/no/such/python")
    troubles = [each for each in found.document["findings"] if each["state"] == "problem"]
    assert {(each["host"], each["message"]) for each in troubles} == {
        (name, "`/no/such/python` does not exist") for name in hosts.names
    }
    assert found.code == 1


def test_another_version_on_one_host(hosts: Hosts) -> None:
    folder = hosts.packages("mac-b") / "kimi_mlx-0.0.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kimi-mlx\nVersion: 0.0.9\n")
    trouble = visit(*HOSTS).trouble("versions")
    assert trouble["message"] == f"kimi-mlx 0.0.9 (`mac-a`: {__version__})"
    assert "`kimi-mlx launch --hosts mac-a,mac-b --install`" in trouble["remedy"]


def test_an_address_that_is_not_of_the_host(hosts: Hosts, tmp_path: Path) -> None:
    trouble = visit("--hostfile", write(tmp_path, hosts.address("mac-a"), "10.99.0.7")).trouble("addresses")
    assert trouble["host"] == "mac-b"
    assert f"it has {hosts.address('mac-b', 'lan')}, {hosts.address('mac-b')}" in trouble["message"]
    assert "`kimi-mlx doctor --hosts mac-a,mac-b --save FILE`" in trouble["remedy"]


def test_a_host_that_is_named_twice(hosts: Hosts) -> None:
    found = visit("--hosts", "mac-a,mac-a")
    assert (found.code, "has `mac-a` twice" in found.document["error"]) == (2, True)
    trouble = visit("--hosts", f"mac-a,{hosts.address('mac-a', 'lan')}").trouble("host")
    assert "same computer as `mac-a`" in trouble["message"]


@pytest.mark.sweep
def test_a_cable_that_is_out(hosts: Hosts, tmp_path: Path) -> None:
    hosts.cut("mac-b", "tb")
    found = visit("--hostfile", good(hosts, tmp_path))
    trouble = found.trouble("link")
    assert f"`mac-a` to `mac-b` at {hosts.address('mac-b')}: " in trouble["message"]
    other = visit(*HOSTS, "--quick")
    assert (other.code, other.document["network"]["kind"]) == (0, "ethernet")


def test_a_firewall(hosts: Hosts, tmp_path: Path) -> None:
    hosts.drop_answers("mac-b")
    found = visit("--hostfile", good(hosts, tmp_path))
    trouble = found.trouble("link")
    assert f"`mac-a` to `mac-b` at {hosts.address('mac-b')}: no answer within {PAIR_LIMIT_S:g} s" in trouble["message"]
    assert "firewall" in trouble["remedy"]


def test_a_slow_network_is_refused_unless_forced(hosts: Hosts, tmp_path: Path) -> None:
    for name in hosts.names:
        for link in ("tb", "lan"):
            hosts.slow_down(name, link, "200mbit")
    file = tmp_path / "slow.json"
    trouble = visit(*HOSTS, "--save", str(file)).trouble("link")
    assert re.search(r"carries 0\.[12]\d Gbit/s, 1 is the least", trouble["message"])
    assert "`--force-link`" in trouble["remedy"]
    assert not file.exists()
    forced = visit(*HOSTS, "--force-link", "--save", str(file))
    assert forced.code == 0
    assert [each["check"] for each in forced.document["findings"] if each["state"] == "warning"] == ["link"]
    assert len(read_hostfile(file).hosts) == 2


def put_store(hosts: Hosts, name: str, rank: int, commit: str) -> None:
    place = hosts.home(name) / ".local/share/kimi-mlx/stores/owner--model" / commit / f"hybrid-2-a1b2c3/rank-{rank}"
    place.mkdir(parents=True)
    origin = {"repository": "owner/model", "commit": commit}
    (place / "manifest.json").write_text(json.dumps({"format": 1, "origin": origin}, indent=1))


def test_a_store_that_is_missing_and_one_of_another_commit(hosts: Hosts, tmp_path: Path) -> None:
    asked = ("owner/model", "--hostfile", good(hosts, tmp_path), "--quick")
    put_store(hosts, "mac-a", 0, "a" * 12)
    trouble = visit(*asked).trouble("stores")
    assert trouble["host"] == "mac-b"
    assert "the store of rank 1 is missing" in trouble["message"]
    put_store(hosts, "mac-b", 1, "b" * 12)
    trouble = visit(*asked).trouble("stores")
    assert trouble["host"] in hosts.names
    assert "is missing; it has " in trouble["message"]


def started(hosts: Hosts, mark: str) -> bool:
    return all(any(mark in line for line in hosts.left(name)) for name in hosts.names)


def wait_until_they_exchange(hosts: Hosts) -> None:
    """The self-test has begun, and its ranks are joined."""
    wait(lambda: started(hosts, "rank.self_test import"), 120)
    wait(lambda: all(map(hosts.is_joined, hosts.names)), 60)
    time.sleep(0.5)


@pytest.mark.sweep
def test_a_cable_that_is_pulled_during_the_self_test(hosts: Hosts, tmp_path: Path) -> None:
    # of Kimi K2's size, so that it takes a while
    process = start("--hostfile", good(hosts, tmp_path), "kimi-k2", code=SHORT_STEPS)
    wait_until_they_exchange(hosts)
    hosts.cut("mac-b", "tb")
    found = finish(process)
    assert found.code == 1
    [trouble] = [each for each in found.document["findings"] if each["check"] == "self-test"]
    assert trouble["state"] == "problem"
    assert (
        "though all ranks are alive" in trouble["message"]
        or "could not connect to the other ranks" in trouble["message"]
    )
    assert f"`mac-a` to `mac-b` at {hosts.address('mac-b')}: no answer" in trouble["message"]


def test_a_rank_that_is_killed(hosts: Hosts, tmp_path: Path) -> None:
    process = start("--hostfile", good(hosts, tmp_path), "kimi-k2")
    wait_until_they_exchange(hosts)
    hosts.run("mac-b", "pkill", "-KILL", "-f", "rank.self_test import")
    found = finish(process)
    [trouble] = [each for each in found.document["findings"] if each["check"] == "self-test"]
    assert trouble["state"] == "problem"
    assert re.fullmatch(r"rank 1 of 2 \(`mac-b`, process \d+\) was ended by SIGKILL", trouble["message"])


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
def test_nothing_outlives_the_doctor(hosts: Hosts, mark: str, number: signal.Signals, tmp_path: Path) -> None:
    process = start("--hostfile", good(hosts, tmp_path))
    wait(lambda: started(hosts, mark), 120)
    begin = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    assert time.monotonic() - begin < 15
