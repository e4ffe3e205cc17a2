"""The doctor on two hosts over real ssh: well, and with each fault its message, within its limit, and nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.cluster.hostfile import read_hostfile
from tests.cluster.hosts import ROOT, Hosts

pytestmark = pytest.mark.slow

HOSTS = ("--hosts", "mac-a,mac-b")


@dataclass(frozen=True)
class Visit:
    """What the doctor said."""

    code: int
    document: dict[str, Any]
    seconds: float

    def trouble(self, check: str) -> dict[str, str]:
        """The one trouble there is, of this check."""
        assert self.code == 1, self.document
        found = [each for each in self.document["findings"] if each["state"] == "trouble"]
        assert [each["check"] for each in found] == [check], found
        return found[0]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kimi_mlx", "doctor", *arguments, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], begin: float) -> Visit:
    out, err = process.communicate(timeout=90)
    assert "Traceback" not in err, err
    return Visit(process.returncode, json.loads(out) if out else {"error": err}, time.monotonic() - begin)


def visit(*arguments: str) -> Visit:
    begin = time.monotonic()
    return finish(start(*arguments), begin)


@pytest.fixture(autouse=True)
def nothing_is_left(hosts: Hosts) -> Iterator[None]:
    yield
    wait(lambda: not any(hosts.left(name) for name in hosts.names), 3, lambda: str(list(map(hosts.left, hosts.names))))


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
    found = visit(*HOSTS, "--save", str(file))
    assert found.code == 0, found.document
    assert found.document["ok"]
    assert not [each for each in found.document["findings"] if each["state"] != "ok"]
    assert found.document["network"]["kind"] == "thunderbolt"
    kinds = [each["kind"] for each in found.document["links"]]
    assert kinds == ["thunderbolt", "ethernet"]
    assert all(each["measured"]["bytes_per_s"] > 1e6 for each in found.document["links"])
    assert len(found.document["self_test"]["timings"]) == 18
    saved = read_hostfile(file)
    assert [(host.ssh, host.ips) for host in saved.hosts] == [(n, (hosts.address(n),)) for n in hosts.names]
    again = visit("--hostfile", str(file), "--quick")
    assert (again.code, again.document["self_test"]) == (0, None)


@pytest.mark.parametrize(
    ("fault", "message", "remedy", "limit_s"),
    [
        ("stop_sshd", "refuses connections", "sudo systemsetup -setremotelogin on", 10),
        ("change_host_key", "another host key", "ssh-keygen -R", 10),
        ("power_off", "cannot be reached", "is it on, awake", 15),
    ],
)
def test_a_host_that_ssh_does_not_reach(hosts: Hosts, fault: str, message: str, remedy: str, limit_s: float) -> None:
    getattr(hosts, fault)("mac-b")
    found = visit(*HOSTS)
    trouble = found.trouble("reachable")
    assert trouble["host"] == "mac-b"
    assert message in trouble["message"]
    assert remedy in trouble["remedy"]
    assert found.seconds < limit_s
    assert found.document["hosts"]["mac-a"]["hostname"] == "mac-a"


def test_a_python_that_is_not_there(hosts: Hosts) -> None:
    found = visit(*HOSTS, "--python", "/no/such/python")
    troubles = [each for each in found.document["findings"] if each["state"] == "trouble"]
    assert {(each["host"], each["message"]) for each in troubles} == {
        (name, "there is no `/no/such/python`") for name in hosts.names
    }
    assert found.code == 1


def test_another_version_on_one_host(hosts: Hosts) -> None:
    folder = hosts.packages("mac-b") / "kimi_mlx-0.0.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kimi-mlx\nVersion: 0.0.9\n")
    trouble = visit(*HOSTS).trouble("versions")
    assert trouble["message"] == "kimi-mlx 0.0.9 (`mac-a`: 0.1.0)"
    assert "`kimi-mlx launch --hosts mac-a,mac-b --install`" in trouble["remedy"]


def test_an_address_that_is_not_of_the_host(hosts: Hosts, tmp_path: Path) -> None:
    trouble = visit("--hostfile", write(tmp_path, hosts.address("mac-a"), "10.99.0.7")).trouble("addresses")
    assert trouble["host"] == "mac-b"
    assert f"it has {hosts.address('mac-b', 'lan')}, {hosts.address('mac-b')}" in trouble["message"]
    assert "`kimi-mlx doctor --hosts mac-a,mac-b --save FILE`" in trouble["remedy"]


def test_a_host_that_is_named_twice(hosts: Hosts) -> None:
    found = visit("--hosts", "mac-a,mac-a")
    assert (found.code, "has `mac-a` twice" in found.document["error"]) == (1, True)
    trouble = visit("--hosts", f"mac-a,{hosts.address('mac-a', 'lan')}").trouble("host")
    assert "same computer as `mac-a`" in trouble["message"]


def test_a_cable_that_is_out(hosts: Hosts, tmp_path: Path) -> None:
    hosts.cut("mac-b", "tb")
    found = visit("--hostfile", good(hosts, tmp_path))
    trouble = found.trouble("link")
    assert f"`mac-a` to `mac-b` at {hosts.address('mac-b')}: " in trouble["message"]
    assert found.seconds < 20
    other = visit(*HOSTS, "--quick")
    assert (other.code, other.document["network"]["kind"]) == (0, "ethernet")


def test_a_firewall(hosts: Hosts, tmp_path: Path) -> None:
    hosts.drop_answers("mac-b")
    found = visit("--hostfile", good(hosts, tmp_path))
    trouble = found.trouble("link")
    assert f"`mac-a` to `mac-b` at {hosts.address('mac-b')}: no answer within 6 s" in trouble["message"]
    assert "firewall" in trouble["remedy"]
    assert found.seconds < 20


def test_a_slow_network_is_refused_unless_forced(hosts: Hosts, tmp_path: Path) -> None:
    for name in hosts.names:
        for link in ("tb", "lan"):
            hosts.slow_down(name, link, "50mbit")
    file = tmp_path / "slow.json"
    trouble = visit(*HOSTS, "--save", str(file)).trouble("link")
    assert "0.05 Gbit/s, 1 is the least" in trouble["message"]
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


def test_a_store_that_is_missing_and_one_of_another_commit(hosts: Hosts) -> None:
    put_store(hosts, "mac-a", 0, "a" * 12)
    trouble = visit("owner/model", *HOSTS, "--quick").trouble("stores")
    assert trouble["host"] == "mac-b"
    assert "the store of rank 1 is missing" in trouble["message"]
    put_store(hosts, "mac-b", 1, "b" * 12)
    trouble = visit("owner/model", *HOSTS, "--quick").trouble("stores")
    assert trouble["host"] in hosts.names
    assert "is missing; it has " in trouble["message"]


def started(hosts: Hosts, mark: str) -> bool:
    return all(any(mark in line for line in hosts.left(name)) for name in hosts.names)


def test_a_cable_that_is_pulled_during_the_self_test(hosts: Hosts, tmp_path: Path) -> None:
    begin = time.monotonic()
    process = start("--hostfile", good(hosts, tmp_path), "kimi-k2")  # of its size, so that it takes a while
    wait(lambda: started(hosts, "runtime.self_test import"), 40)
    time.sleep(3)
    hosts.cut("mac-b", "tb")
    cut = time.monotonic()
    found = finish(process, begin)
    assert time.monotonic() - cut < 40
    assert found.code == 1
    [trouble] = [each for each in found.document["findings"] if each["check"] == "self-test"]
    assert trouble["state"] == "trouble"
    assert "`mac-a`, `mac-b` came no further within" in trouble["message"]
    assert f"`mac-a` to `mac-b` at {hosts.address('mac-b')}: no answer" in trouble["message"]


def test_a_rank_that_is_killed(hosts: Hosts, tmp_path: Path) -> None:
    process = start("--hostfile", good(hosts, tmp_path), "kimi-k2")
    begin = time.monotonic()
    wait(lambda: started(hosts, "runtime.self_test import"), 40)
    time.sleep(3)
    hosts.run("mac-b", "pkill", "-KILL", "-f", "runtime.self_test import")
    found = finish(process, begin)
    [trouble] = [each for each in found.document["findings"] if each["check"] == "self-test"]
    assert trouble["state"] == "trouble"
    assert trouble["message"] == "`mac-b` exited with code 137; its last lines:\n  ended by SIGKILL"


@pytest.mark.parametrize("mark", ["--limit", "runtime.self_test import"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_doctor(hosts: Hosts, mark: str, number: signal.Signals) -> None:
    process = start(*HOSTS)
    wait(lambda: started(hosts, mark), 40)
    begin = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    wait(lambda: not any(hosts.left(name) for name in hosts.names), 3)
    assert time.monotonic() - begin < 6
