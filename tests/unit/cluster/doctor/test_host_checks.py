"""The doctor's checks of hosts, clusters and links, given facts."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network

import pytest

from kimi_mlx.cluster.doctor.cluster_checks import check_kernels, check_macos, check_stores, check_versions
from kimi_mlx.cluster.doctor.host_checks import (
    check_chip,
    check_clock,
    check_complete,
    check_disk,
    check_fast_sync,
    check_firewall,
    check_memory,
    check_python,
    check_reachable,
    check_wired_limit,
    clock_offset,
)
from kimi_mlx.cluster.doctor.memory_need import HostNeed
from kimi_mlx.cluster.hosts.facts import Facts, HeldStore, Interpreter
from kimi_mlx.cluster.hosts.findings import Finding, has_problem
from kimi_mlx.cluster.hosts.ssh import ScriptResult
from kimi_mlx.cluster.network.choose import check_encryption, check_link
from kimi_mlx.cluster.network.interfaces import Kind
from kimi_mlx.cluster.network.links import BridgeConflict, LinkSpeed, Network
from kimi_mlx.cluster.network.rdma import check_bridge, check_rdma
from kimi_mlx.cluster.ring.jaccl_errors import JACCL_ERRORS, explain_jaccl
from kimi_mlx.units import GB, GIB

PYTHON = Interpreter(
    "/opt/py/bin/python", "3.12.4", "arm64", {"kimi-mlx": "0.1.0", "mlx": "0.32.2", "mlx-lm": "0.31.3"}, "abc"
)

MAC = Facts(
    "mac-a",
    is_complete=True,
    system="Darwin",
    machine="arm64",
    macos_version="26.5.1",
    macos_build="25F80",
    chip="Apple M3 Ultra",
    memory_bytes=512 * GIB,
    free_bytes=490 * GIB,
    wired_bytes=6 * GIB,
    wired_limit_mb=0,
    stores_folder="/Users/me/stores",
    disk_free_bytes=800 * GB,
    clock_start=1000.0,
    clock_end=1002.0,
    interpreters=(PYTHON,),
    rdma_status="enabled",
    rdma_ports={"rdma_en2": "PORT_DOWN", "rdma_en5": "PORT_ACTIVE"},
    firewall=0,
)
OTHER = replace(MAC, host="mac-b")
LINUX = Facts("box", is_complete=True, system="Linux", machine="x86_64", memory_bytes=24 * GIB, free_bytes=20 * GIB)


def test_only_problems_block_a_start() -> None:
    assert not has_problem([Finding("a", "b", "ok", "c"), Finding("a", "b", "warning", "c", "d")])
    assert has_problem([Finding("a", "b", "problem", "c", "d")])


def test_reachable() -> None:
    assert check_reachable(ScriptResult("mac-a", 0, "", "", 0.4)).message == "answered in 400 ms"
    finding = check_reachable(
        ScriptResult("mac-a", 255, "", "ssh: connect to host mac-a port 22: Connection refused", 0.1)
    )
    assert finding.state == "problem"
    assert "Connection refused" in finding.message
    assert "setremotelogin" in (finding.remedy or "")


def test_complete() -> None:
    assert check_complete(MAC).state == "ok"
    assert check_complete(replace(MAC, is_complete=False)).state == "warning"


def test_python() -> None:
    assert check_python(MAC).state == "ok"
    assert (
        "`/bin/x` does not run" in check_python(replace(MAC, interpreters=(), broken_interpreters=("/bin/x",))).message
    )
    bare = replace(PYTHON, packages={"mlx": "0.32.2"})
    finding = check_python(replace(MAC, interpreters=(bare,)))
    assert (finding.state, finding.message) == ("problem", "`/opt/py/bin/python` has no `kimi-mlx`")
    assert "--install" in (finding.remedy or "")
    rosetta = check_python(replace(MAC, interpreters=(replace(PYTHON, machine="x86_64"),)))
    assert (rosetta.state, "Rosetta" in rosetta.message) == ("problem", True)


def test_chip() -> None:
    assert check_chip(MAC).message == "Apple M3 Ultra, 512.0 GiB"
    assert check_chip(replace(MAC, machine="x86_64")).state == "ok"  # a shell under Rosetta
    assert check_chip(replace(MAC, machine="x86_64", chip="Intel(R) Core(TM) i7")).state == "problem"
    assert check_chip(LINUX).state == "ok"
    assert check_chip(LINUX).message.endswith("24.0 GiB (not a Mac: will run on the CPU)")


@pytest.mark.parametrize(
    ("facts", "need_gib", "state", "text"),
    [
        (MAC, 480, "ok", "needs 480.0 GiB; 490.0 GiB are free"),
        (MAC, 495, "problem", "needs 495.0 GiB; 490.0 GiB are free (6.0 GiB wired)"),
        (MAC, 505, "problem", "needs 505.0 GiB; this machine has 512.0 GiB, of which 504.0 GiB are usable"),
        (replace(MAC, free_bytes=80 * GIB, wired_bytes=420 * GIB), 300, "problem", "420.0 GiB wired"),
        (replace(MAC, free_bytes=None, wired_bytes=None), 300, "ok", "needs 300.0 GiB"),
        (replace(MAC, memory_bytes=None), 300, "warning", "unknown"),
        (LINUX, 10, "ok", "20.0 GiB are free"),
    ],
)
def test_memory(facts: Facts, need_gib: int, state: str, text: str) -> None:
    finding = check_memory(facts, HostNeed(need_gib * GIB))
    assert finding.state == state
    assert text in finding.message
    assert (finding.remedy is None) == (state == "ok")


@pytest.mark.parametrize(
    ("limit_mb", "need", "state", "remedy"),
    [
        (0, 384 * GIB, "ok", None),
        (0, 384 * GIB + 1, "problem", "`sudo sysctl iogpu.wired_limit_mb=394240`"),
        (None, 400 * GIB, "problem", "`sudo sysctl iogpu.wired_limit_mb=409600`"),
        (409600, 400 * GIB, "ok", None),
        (0, 504 * GIB, "problem", "`sudo sysctl iogpu.wired_limit_mb=516096`"),
        (0, 504 * GIB + 1, "problem", "kimi-mlx models"),
        (999999, 504 * GIB + 1, "ok", None),
    ],
)
def test_wired_limit_problem_gives_the_command(limit_mb: int | None, need: int, state: str, remedy: str | None) -> None:
    finding = check_wired_limit(replace(MAC, wired_limit_mb=limit_mb), HostNeed(need))
    assert finding.state == state
    assert (remedy or "") in (finding.remedy or "")
    assert (finding.remedy is None) == (remedy is None)


def test_wired_limit_applies_to_macs_only() -> None:
    assert check_wired_limit(LINUX, HostNeed(999 * GIB)).state == "ok"
    assert check_wired_limit(replace(MAC, memory_bytes=None), HostNeed(GIB)).state == "warning"


def test_disk() -> None:
    assert check_disk(MAC, 300 * GB).state == "ok"
    finding = check_disk(MAC, 900 * GB)
    assert finding.message == "needs 900.0 GB; 800.0 GB are free for `/Users/me/stores`"
    assert finding.state == "problem"
    assert check_disk(replace(MAC, disk_free_bytes=None), 1).state == "warning"


@pytest.mark.parametrize(
    ("started", "state", "text"),
    [
        (999.5, "ok", "within 500 ms"),  # requested at 999.5, answered at 1002.5; ran on the host from 1000 to 1002
        (900.0, "warning", "1 min 40 s ahead of"),
        (1100.0, "warning", "1 min 40 s behind"),
        (994.1, "ok", "of this machine's"),  # 5.4 s apart, of which 0.5 s may be the round trip
        (993.9, "warning", "5.60 s ahead of"),
    ],
)
def test_clock(started: float, state: str, text: str) -> None:
    finding = check_clock(MAC, ScriptResult("mac-a", 0, "", "", 3.0, started))
    assert finding.state == state
    assert text in finding.message


def test_half_of_the_round_trip_is_uncertain() -> None:
    assert clock_offset(MAC, ScriptResult("mac-a", 0, "", "", 6.0, 998.0)) == (0.0, 2.0)
    assert clock_offset(replace(MAC, clock_end=None), ScriptResult("mac-a", 0, "", "", 6.0, 998.0)) is None
    assert check_clock(replace(MAC, clock_start=None), ScriptResult("mac-a", 0, "", "", 6.0)).state == "warning"


def test_fast_sync_is_a_warning() -> None:
    assert check_fast_sync("mac-a, mac-b", is_on=False).state == "ok"
    on = check_fast_sync("mac-a, mac-b", is_on=True)
    assert (on.state, "restarted" in on.message, "--fast-sync" in (on.remedy or "")) == ("warning", True, True)


def test_firewall() -> None:
    assert check_firewall(MAC).state == "ok"
    on = check_firewall(replace(MAC, firewall=1))
    assert (on.state, "--unblockapp /opt/py/bin/python" in (on.remedy or "")) == ("warning", True)
    assert check_firewall(replace(MAC, firewall=2)).state == "problem"
    assert check_firewall(LINUX).state == "ok"


def test_link() -> None:
    cable = Network("thunderbolt", ("169.254.1.1", "169.254.1.2"), ("bridge0", "bridge0"))
    fast, slow = LinkSpeed(0.0003, 5e9), LinkSpeed(0.009, 5e7)
    assert check_link("mac-a, mac-b", cable, fast).state == "ok"
    assert check_link("mac-a, mac-b", cable, slow).state == "problem"
    assert check_link("mac-a, mac-b", replace(cable, kind="wifi"), fast, is_forced=True).state == "warning"


LAN, OTHER_LAN = IPv4Network("192.168.1.0/24"), IPv4Network("192.168.2.0/24")


@pytest.mark.parametrize(
    ("kind", "subnets", "state", "text"),
    [
        ("thunderbolt", (LAN, LAN), "ok", "stays on the cable"),
        ("ethernet", (LAN, LAN), "ok", "trust every device on 192.168.1.0/24"),
        ("wifi", (LAN, LAN), "warning", "is Wi-Fi: anyone who can read its traffic"),
        ("other", (LAN, LAN), "warning", "is a network of unknown kind"),
        ("ethernet", (LAN, OTHER_LAN), "warning", "is a routed network"),
        ("ethernet", (LAN, None), "warning", "is a routed network"),
    ],
)
def test_network_that_is_not_a_cable_is_a_warning(
    kind: Kind, subnets: tuple[IPv4Network | None, ...], state: str, text: str
) -> None:
    network = Network(kind, ("192.168.1.1", "192.168.1.2"), ("en0", "en0"))
    finding = check_encryption("mac-a, mac-b", network, subnets, "ring")
    assert (finding.check, finding.state, text in finding.message) == ("encryption", state, True), finding
    over_rdma = check_encryption("mac-a, mac-b", network, subnets, "jaccl")
    assert over_rdma.state == "ok"


def test_hosts_with_other_chips_or_builds_need_pipeline() -> None:
    assert check_kernels([MAC, OTHER]).message == "same chip and MLX build on all hosts"
    assert check_kernels([MAC, OTHER], "hybrid").state == "ok"
    older = replace(OTHER, chip="Apple M4 Max")
    assert check_kernels([MAC, older], "pipeline:3:1").state == "ok"
    finding = check_kernels([MAC, older], "hybrid:3:1")
    assert finding.state == "problem"
    assert finding.message.startswith(
        "`mac-a` has Apple M3 Ultra, `mac-b` has Apple M4 Max: with the strategy hybrid:3:1"
    )
    assert "--strategy pipeline" in (finding.remedy or "")
    macs = [
        replace(mac, interpreters=(replace(PYTHON, mlx_build=f"macosx_{version}_0_arm64"),))
        for mac, version in ((MAC, 26), (OTHER, 15))
    ]
    finding = check_kernels(macs, "tensor")
    assert (finding.state, "mlx 0.32.2 built for macosx_15_0_arm64" in finding.message) == ("problem", True)
    assert check_kernels([macs[0], OTHER], "tensor").state == "ok"  # one build is unknown


def test_versions_are_compared_with_the_first_host() -> None:
    python = replace(PYTHON, version="3.13.1", packages={**PYTHON.packages, "mlx": "0.32.4"}, code="abd")
    odd = replace(MAC, host="mac-c", interpreters=(python,))
    assert check_versions([MAC]) == []
    findings = check_versions([MAC, OTHER, odd, replace(MAC, host="mac-d", interpreters=())])
    assert [(each.host, each.state) for each in findings] == [("mac-b", "ok"), ("mac-c", "problem")]
    assert findings[1].message == (
        "Python 3.13 (`mac-a`: 3.12); mlx 0.32.4 (`mac-a`: 0.32.2); kimi-mlx's code abd (`mac-a`: abc)"
    )
    patch = replace(MAC, host="mac-b", interpreters=(replace(PYTHON, version="3.12.9"),))
    assert check_versions([MAC, patch])[0].state == "ok"


def test_macos_builds() -> None:
    old = replace(MAC, host="mac-b", macos_version="26.4.1", macos_build="25E250")
    assert check_macos([LINUX, MAC], is_rdma_used=True) == []
    assert check_macos([LINUX, MAC, OTHER], is_rdma_used=True)[0].state == "ok"
    assert check_macos([MAC, old], is_rdma_used=False)[0].state == "warning"
    finding = check_macos([MAC, old], is_rdma_used=True)[0]
    assert (finding.state, finding.message) == (
        "problem",
        "macOS 26.4.1 (25E250), but `mac-a` has 26.5.1 (25F80)",
    )


COMMIT, OLD_COMMIT = "0" * 40, "1" * 40


def held(rank: int, commit: str = COMMIT, placement: str = "hybrid-2-aaaaaa", repository: str = "o/n") -> HeldStore:
    return HeldStore(repository, commit, placement, rank, "")


def stores(a: list[HeldStore], b: list[HeldStore], expected: tuple[str, str] | None = None) -> list[tuple[str, str]]:
    hosts = [replace(MAC, stores=tuple(a)), replace(OTHER, stores=tuple(b))]
    findings = check_stores(hosts, "o/n", {"mac-a": [0], "mac-b": [1]}, expected)
    return [(each.state, each.message.partition(": ")[2]) for each in findings]


def test_stores_of_one_commit_and_placement() -> None:
    ok = ("ok", "complete")
    assert stores([held(0)], [held(1)]) == [ok, ok]
    assert stores([held(0), held(0, OLD_COMMIT)], [held(1, OLD_COMMIT)]) == [ok, ok]  # the old commit is complete
    assert stores([held(0)], [])[1] == ("problem", "the store of rank 1 is missing")
    assert stores([held(0)], [held(0)])[1] == ("problem", "the store of rank 1 is missing")
    assert stores([held(0), held(0, OLD_COMMIT)], [held(1, OLD_COMMIT)], expected=(COMMIT, "hybrid-2-aaaaaa")) == [
        ok,
        ("problem", "the store of rank 1 is missing; it has 111111111111, hybrid-2-aaaaaa"),
    ]
    assert stores([held(0)], [held(1, placement="hybrid-2-bbbbbb")])[0][0] == "problem"
    assert [state for state, _ in stores([held(0, repository="o/x")], [])] == ["warning", "warning"]


@pytest.mark.parametrize(
    ("change", "text", "remedy"),
    [
        ({"system": "Linux"}, "needs a Mac", "--backend ring"),
        ({"macos_version": "26.1"}, "macOS 26.1 has no RDMA", "update macOS"),
        ({"macos_version": "15.7.2"}, "has no RDMA", "update macOS"),
        ({"rdma_status": None}, "`rdma_ctl` is missing", "update macOS"),
        ({"rdma_status": "disabled"}, "`rdma_ctl status` says `disabled`", "`rdma_ctl enable` and restart"),
        ({"rdma_ports": {}}, "lists no device", "Thunderbolt 5"),
        ({"rdma_ports": None}, "lists no device", "Thunderbolt 5"),
        ({"rdma_ports": {"rdma_en2": "PORT_DOWN"}}, "no RDMA port is active", "Thunderbolt Bridge"),
    ],
)
def test_rdma_problem_gives_the_remedy(change: dict[str, object], text: str, remedy: str) -> None:
    facts = replace(MAC, **change)  # pyright: ignore[reportArgumentType]
    finding = check_rdma(facts, is_required=True)
    assert finding.state == "problem"
    assert text in finding.message
    assert remedy in (finding.remedy or "")
    assert check_rdma(facts, is_required=False) == Finding("mac-a", "RDMA", "ok", finding.message)


def test_rdma_ready() -> None:
    assert check_rdma(MAC, is_required=True).message == "RDMA is enabled; active: rdma_en5 of rdma_en2, rdma_en5"
    assert check_rdma(replace(MAC, rdma_ports={"rdma_en2": ""}, macos_version="27"), is_required=True).state == "ok"


def test_bridge_is_a_problem_for_rdma_only() -> None:
    conflict = BridgeConflict("mac-a", "bridge0", ("en5",))
    assert check_bridge("mac-a", None, is_rdma_used=True).state == "ok"
    assert check_bridge("mac-a", conflict, is_rdma_used=False).state == "ok"
    finding = check_bridge("mac-a", conflict, is_rdma_used=True)
    assert (finding.state, finding.message, finding.remedy) == ("problem", conflict.message, conflict.hint)


@pytest.mark.parametrize(
    ("text", "meaning", "remedy"),
    [
        ("[jaccl] Changing queue pair to RTR failed with errno 22", "errno 22", '"Thunderbolt Bridge" off'),
        ("[jaccl] Changing queue pair to RTR failed with errno 16", "still holds", "pgrep -fl kimi_mlx"),
        ("[jaccl] Changing queue pair to RTR failed with errno 96", "errno 96", '"Thunderbolt Bridge" off'),
        ("[jaccl] Changing queue pair to RTR failed with errno 60", "other end", "ibv_devinfo"),
        ("[jaccl] Changing queue pair to INIT failed with errno 2", "is not there", "ibv_devices"),
        ("[jaccl] Creating the queue pair failed with 'Resource busy (16)'.", "no queue pair left", "pgrep"),
        ("RuntimeError: [jaccl] Couldn't connect (error: 60)", "rank 0 does not answer", "first error"),
        ("RuntimeError: [jaccl] Recv failed with errno=2", "link was lost", "cable"),
        ("RuntimeError: [jaccl] Recv failed with errno=60", "errno 60", "ibv_devinfo"),
        ("[jaccl] Send failed with error code 12", "link was lost", "cables"),
        ("[jaccl] Couldn't allocate protection domain", "used up", "restart that Mac"),
        ("[jaccl] Could not find device rdma_en4 (6 available)", "is not there", "again, without"),
        ("[jaccl] No IPv4-mapped GID for this device. Thunderbolt RDMA ports", "no IPv4 address", "169.254"),
        ("[jaccl] The devices do not form a valid mesh.", "do not fit the cables", "jaccl-ring"),
    ],
)
def test_errors_of_jaccl(text: str, meaning: str, remedy: str) -> None:
    explained = explain_jaccl(f"Traceback (most recent call last):\n  x\n{text}\n") or ""
    assert meaning in explained.partition(": ")[0] + explained
    assert remedy in explained


def test_other_errors_are_not_explained() -> None:
    assert explain_jaccl("[ring] Couldn't connect (error: 60)") is None
    assert explain_jaccl("[jaccl] Something new with errno 222") is None
    assert all(error.meaning and error.remedy for error in JACCL_ERRORS)


def test_hosts_are_suggested_only_if_they_help() -> None:
    small = replace(LINUX, memory_bytes=32 * GIB)
    assert "add a host" in (check_memory(small, HostNeed(100 * GIB), 100 * GIB).remedy or "")
    assert "even 8 hosts like this one are too small" in (
        check_memory(small, HostNeed(500 * GIB), 500 * GIB).remedy or ""
    )
    streamed = HostNeed(500 * GIB, experts_bytes=476 * GIB, staging_bytes=2 * GIB)
    assert "with experts on the SSD" in (check_memory(small, streamed, 500 * GIB).remedy or "")
    tiny = replace(LINUX, memory_bytes=11 * GIB)
    assert "even 8 hosts" in (check_memory(tiny, streamed, 500 * GIB).remedy or "")
    assert "even 8 hosts" in (
        check_wired_limit(replace(MAC, memory_bytes=32 * GIB), HostNeed(99 * GIB), GIB * 999).remedy or ""
    )
