"""Findings, networks and backend from invented facts."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Interface

import pytest

from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.doctor.run_checks import (
    DoctorRequest,
    check_cluster,
    check_hosts,
    clear_firewall_warnings,
    fill_in_hosts,
    parse_host_facts,
)
from kimi_mlx.cluster.hosts.facts import Facts, HeldStore
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import Host, Hostfile
from kimi_mlx.cluster.hosts.ssh import ScriptResult
from kimi_mlx.cluster.network.interfaces import Interface
from kimi_mlx.cluster.network.topology import (
    Topology,
    check_addresses,
    check_cables,
    check_topology,
    choose_backend,
    networks_of,
    rdma_of,
    read_topology,
)
from kimi_mlx.units import GB
from tests.unit.cluster.captures import capture
from tests.unit.cluster.doctor.test_host_checks import LINUX, MAC, OTHER

K2 = ModelNeed("kimi-k2", "mlx-community/Kimi-K2", 578 * GB, 576 * 10**6, 7168, 163840, 512, is_here=False)
MINI = ModelNeed("kimi-mini", None, 7 * 10**6, 10**6, 128, 1792, 512, is_here=True)
TWO = Hostfile((Host("mac-a"), Host("mac-b")))
STORE = HeldStore("mlx-community/Kimi-K2", "abc", "hybrid-2-a1b2c3", 0, "x", 100 * GB)


def request_for(need: ModelNeed = MINI, hostfile: Hostfile = TWO) -> DoctorRequest:
    return DoctorRequest(hostfile, need)


def states(findings: list[Finding], host: str = "mac-a") -> dict[str, str]:
    return {finding.check: finding.state for finding in findings if finding.host == host}


def answer(host: str) -> ScriptResult:
    return ScriptResult(host, 0, "", "", 2.0, 1000.0)


def test_memory_and_disk_needs_of_a_host() -> None:
    assert K2.memory_bytes(MAC, [0], 2) == round(289 * GB * 1.1) + 576 * 10**6
    assert K2.memory_bytes(replace(MAC, stores=(STORE,)), [0], 2) == round(100 * GB * 1.1) + 576 * 10**6
    assert K2.memory_bytes(replace(MAC, stores=(STORE,)), [1], 2) == K2.memory_bytes(MAC, [1], 2)
    assert K2.disk_bytes(replace(MAC, stores=(STORE,)), [0], 2) == 0
    assert K2.disk_bytes(MAC, [0], 2) == 289 * GB
    unknown = replace(K2, weights_bytes=None)
    assert unknown.memory_bytes(MAC, [0], 2) is unknown.disk_bytes(MAC, [0], 2) is None
    assert MINI.disk_bytes(MAC, [0], 2) == 0


def test_two_macs_without_problems() -> None:
    known, answers = {"mac-a": MAC, "mac-b": OTHER}, {"mac-a": answer("mac-a"), "mac-b": answer("mac-b")}
    findings = check_hosts(request_for(K2), known, answers)
    assert all(finding.state == "ok" for finding in findings)
    findings = check_cluster(request_for(K2), known, None, read_topology([MAC, OTHER]), "ring")
    assert {finding.check for finding in findings if finding.state != "ok"} == {"stores"}  # none yet


def test_k2_does_not_fit_on_one_mac_of_512_gb() -> None:
    alone = request_for(K2, Hostfile((Host("localhost"),)))
    mac = replace(MAC, host="localhost")
    found = states(check_hosts(alone, {"localhost": mac}, {"localhost": answer("localhost")}), "localhost")
    assert (found["memory"], found["wired limit"], found["disk"]) == ("problem", "problem", "ok")
    assert "clock" not in found
    model, _ = check_cluster(alone, {"localhost": mac}, None, read_topology([mac]), "ring")
    assert (model.state, model.remedy) == ("warning", "`kimi-mlx download kimi-k2`")
    model, fast_sync = check_cluster(replace(alone, need=MINI), {"localhost": mac}, None, read_topology([mac]), "ring")
    assert (model.state, model.message) == ("ok", "`kimi-mini` comes with kimi-mlx")
    assert (fast_sync.check, fast_sync.state) == ("fence", "ok")


def test_unknown_model_size_is_not_a_problem() -> None:
    need = replace(K2, weights_bytes=None)
    found = states(check_hosts(request_for(need), {"mac-a": MAC}, {"mac-a": answer("mac-a")}))
    assert {found["memory"], found["wired limit"], found["disk"]} == {"ok"}


def test_hosts_that_do_not_answer_are_problems() -> None:
    good = ScriptResult("mac-a", 0, "system=Darwin\n", "", 1.0)
    odd = ScriptResult("mac-b", 0, "", "", 1.0, has_started=False, greeting="hello\n")
    refused = ScriptResult("mac-c", 255, "", "ssh: connect to host mac-c port 22: Connection refused", 0.1)
    known, findings = parse_host_facts({each.host: each for each in (good, odd, refused)})
    assert [*known] == ["mac-a"]
    assert [finding.state for finding in findings] == ["ok", "problem", "problem"]
    assert "did not run our command (exit code 0)\n  hello" in findings[1].message


def test_front_must_have_the_same_kimi_mlx() -> None:
    assert MAC.python is not None
    old = replace(MAC, host="localhost", interpreters=(replace(MAC.python, code="old"),))
    known = {"mac-a": MAC, "mac-b": OTHER}
    findings = check_cluster(request_for(), known, old, read_topology([MAC, OTHER]), "ring")
    versions = [finding for finding in findings if finding.check == "versions"]
    assert [finding.host for finding in versions] == ["mac-a", "mac-b"]
    assert all("this machine has 0.1.0 (code old)" in finding.message for finding in versions)


def linux(host: str, hostname: str, *addresses: str) -> tuple[Facts, dict[str, tuple[Interface, ...]]]:
    interfaces = (Interface("thunderbolt0", "thunderbolt", tuple(map(IPv4Interface, addresses))),)
    return replace(LINUX, host=host, hostname=hostname), {host: interfaces}


def test_one_computer_under_two_names() -> None:
    (one, first), (two, second) = linux("mac-a", "studio", "10.0.0.1/24"), linux("10.0.0.1", "studio", "10.0.0.1/24")
    topology = Topology({**first, **second}, (), (), {})
    hostfile = Hostfile((Host("mac-a"), Host("10.0.0.1")))
    findings = check_cluster(request_for(MINI, hostfile), {"mac-a": one, "10.0.0.1": two}, None, topology, "ring")
    [same] = [finding for finding in findings if finding.check == "host"]
    assert (same.host, same.state, "same computer as `mac-a`" in same.message) == ("10.0.0.1", "problem", True)


def test_addresses_of_a_hostfile() -> None:
    interfaces = {"mac-a": (Interface("en5", "thunderbolt", (IPv4Interface("10.0.0.1/24"),)),)}
    [valid] = check_addresses(Host("mac-a", ("10.0.0.1",)), interfaces)
    [invalid] = check_addresses(Host("mac-a", ("10.0.0.2",)), interfaces)
    assert (valid.state, invalid.state) == ("ok", "problem")
    assert invalid.message == "10.0.0.2 is not an address of this host; it has 10.0.0.1"
    assert check_addresses(Host("mac-a", ("127.0.0.1",)), interfaces)[0].state == "ok"
    assert check_addresses(Host("mac-a"), interfaces) == []


def test_network_of_a_hostfile() -> None:
    topology = Topology(
        {
            "mac-a": (Interface("en5", "thunderbolt", (IPv4Interface("10.0.0.1/24"),)),),
            "mac-b": (Interface("en0", "wifi", (IPv4Interface("10.0.0.2/24"),)),),
        },
        (),
        (),
        {},
    )
    [network] = networks_of(Hostfile((Host("mac-a", ("10.0.0.1",)), Host("mac-b", ("10.0.0.2",)))), topology)
    assert (network.kind, network.interfaces) == ("wifi", ("en5", "en0"))
    assert networks_of(Hostfile((Host("mac-a", ("10.0.0.1",)), Host("mac-b"))), topology) == []


def rdma_mac(name: str) -> Facts:
    """A Mac with the captured ports of a studio or a macbook."""
    return replace(
        MAC,
        host=name,
        thunderbolt=capture(f"{name}-thunderbolt.json"),
        hardware_ports=capture(f"{name}-hardware-ports.txt"),
        ifconfig=capture(f"{name}-ifconfig.txt"),
        rdma_ports={f"rdma_en{number}": "PORT_ACTIVE" for number in range(1, 9)},
    )


def test_rdma_is_chosen_if_all_hosts_are_ready_and_no_bridge_is_on() -> None:
    hosts = [rdma_mac("studio"), rdma_mac("macbook")]
    topology = read_topology(hosts)
    assert topology.conflicts
    assert choose_backend(None, hosts, topology) == "ring"
    ready = replace(topology, conflicts={}, rdma=(((), ("rdma_en5",)), (("rdma_en1",), ())))
    assert choose_backend(None, hosts, ready) == "jaccl"
    assert choose_backend("ring", hosts, ready) == "ring"
    assert choose_backend(None, hosts[:1], ready) == "ring"
    assert choose_backend(None, [replace(hosts[0], rdma_status="disabled"), hosts[1]], ready) == "ring"
    hostfile = Hostfile((Host("studio"), Host("macbook")))
    assert rdma_of(hostfile, ready) == ready.rdma
    assert rdma_of(hostfile, topology) in ((), topology.rdma)
    findings = check_topology(hostfile, hosts, "jaccl", topology)
    assert {"bridge", "RDMA"} <= {finding.check for finding in findings}
    assert "problem" in {finding.state for finding in findings if finding.check == "bridge"}
    assert all(finding.state == "ok" for finding in check_topology(hostfile, hosts, "ring", topology))


def test_missing_devices_of_a_hostfile_are_problems() -> None:
    hosts = [rdma_mac("studio"), rdma_mac("macbook")]
    rdma = Hostfile((Host("studio", ("10.0.0.1",), ((), ("rdma_en19",))), Host("macbook", (), (("rdma_en1",), ()))))
    found = [f for f in check_topology(rdma, hosts, "jaccl", read_topology(hosts)) if f.check == "devices"]
    assert [finding.state for finding in found] == ["problem", "ok"]
    assert "rdma_en19 does not exist" in found[0].message


def test_cables_for_rdma() -> None:
    a, b = ("rdma_en1",), ("rdma_en2",)
    macs = [replace(MAC, host=f"mac-{letter}") for letter in "abcd"]
    ring = (((), (), a, b), ((), (), b, a), (b, a, (), ()), (a, b, (), ()))  # a-c, a-d, b-c, b-d
    finding = check_cables(macs, "jaccl-ring", ring)
    assert finding.state == "problem"
    assert finding.remedy == "list the hosts in the order of the cables: `--hosts mac-a,mac-c,mac-b,mac-d`"
    assert "between `mac-a` and `mac-b`" in check_cables(macs, "jaccl", ring).message
    assert check_cables(macs[:2], "jaccl", (((), a), (b, ()))).state == "ok"


def test_rdma_needs_a_mac() -> None:
    hosts = [replace(LINUX, host="mac-a"), replace(LINUX, host="mac-b")]
    found = check_topology(TWO, hosts, "jaccl", read_topology(hosts))
    assert {finding.check for finding in found if finding.state == "problem"} == {"RDMA", "cables"}


def test_remedies_name_the_hosts_and_firewall_warnings_are_cleared() -> None:
    problem = Finding("a", "python", "problem", "m", "`kimi-mlx launch --hosts ... --install`")
    two = Hostfile((Host("a"), Host("b")))
    [finding] = fill_in_hosts([problem], DoctorRequest(two, K2))
    assert finding.remedy == "`kimi-mlx launch --hosts a,b --install`"
    [finding] = fill_in_hosts([problem], DoctorRequest(two, K2, option="--hostfile two.json"))
    assert finding.remedy == "`kimi-mlx launch --hostfile two.json --install`"
    [firewall, other] = clear_firewall_warnings(
        [Finding("a", "firewall", "warning", "on", "x"), Finding("a", "x", "warning", "m", "r")]
    )
    assert (firewall.state, other.state) == ("ok", "warning")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_is_alone_ignores_the_number_of_ranks(name: str) -> None:
    assert request_for(hostfile=Hostfile((Host(name), Host(name)))).is_alone
    assert not request_for().is_alone
    assert request_for(hostfile=Hostfile((Host(name), Host(name)))).ranks == {name: [0, 1]}
