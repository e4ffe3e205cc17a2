"""Facts about hosts: of this machine, and of a Mac whose commands are replaced by published output."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.cluster.hosts import probes
from kimi_mlx.cluster.hosts.facts import Facts, HeldStore, facts_script, parse_facts
from kimi_mlx.cluster.hosts.ssh import run_script
from kimi_mlx.version import __version__
from tests.unit.cluster import captured

SHELLS = sorted({os.path.realpath(shell) for name in ("sh", "bash", "dash") if (shell := shutil.which(name))})


def put(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def run_facts(shell: str, script: str, environment: dict[str, str]) -> Facts:
    done = subprocess.run([shell], input=script, text=True, capture_output=True, env=environment, check=True)
    return parse_facts("mac-b", done.stdout)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "it's a home"
    folder.mkdir()
    return folder


@pytest.fixture
def mac(tmp_path: Path, home: Path) -> dict[str, str]:
    """Return an environment in which the commands of a Mac are replaced by scripts."""
    folder = tmp_path / "bin"
    for name, script in captured.COMMANDS.items():
        put(folder, name, script)
    for name, output in captured.OUTPUTS.items():
        put(folder, name, f"cat <<'END_OF_OUTPUT'\n{output}END_OF_OUTPUT")
    return {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(home)}


@pytest.mark.parametrize("shell", SHELLS)
def test_mac(shell: str, mac: dict[str, str], home: Path) -> None:
    facts = run_facts(shell, facts_script(is_search=False), mac)
    assert facts.is_complete
    assert facts.is_mac
    assert (facts.hostname, facts.machine, facts.chip) == ("mac-b.local", "arm64", "Apple M3 Ultra")
    assert (facts.macos_version, facts.macos_build) == ("26.5.1", "25F80")
    assert (facts.memory_bytes, facts.wired_limit_mb) == (512 << 30, 0)
    assert facts.free_bytes == (4518 + 141843 + 630) * 16384
    assert facts.wired_bytes == 159117 * 16384
    assert facts.process_bytes == captured.PROCESS_BYTES
    assert facts.disk_free_bytes == 987654321 * 1024
    assert facts.data_folder == f"{home}/Library/Application Support/kimi-mlx"
    assert facts.stores_folder == f"{facts.data_folder}/stores"
    assert (facts.clock_start, facts.clock_end) == (1795330360.25, 1795330360.25)
    assert facts.rdma_status == "enabled"
    assert facts.rdma_ports == {"rdma_en2": "PORT_DOWN", "rdma_en3": "", "rdma_en5": "PORT_ACTIVE"}
    assert facts.ifconfig == captured.IFCONFIG
    assert facts.hardware_ports == captured.HARDWARE_PORTS
    assert json.loads(facts.thunderbolt or "") == json.loads(captured.THUNDERBOLT)
    assert facts.ip_addr is None


@pytest.mark.parametrize("shell", SHELLS)
def test_hanging_command_only_loses_its_own_fact(shell: str, mac: dict[str, str]) -> None:
    put(Path(mac["PATH"].split(":")[0]), "vm_stat", "exec sleep 60")
    script = facts_script(is_search=False).replace("limit 5 vm_stat", "limit 1 vm_stat")
    begin = time.monotonic()
    facts = run_facts(shell, script, mac)
    assert time.monotonic() - begin < 30
    assert facts.is_complete
    assert facts.free_bytes is None
    assert facts.chip == "Apple M3 Ultra"


@pytest.mark.skipif(sys.platform != "linux", reason="the output of a Mac is tested above")
def test_this_machine() -> None:
    answer = run_script("localhost", facts_script([sys.executable]), 40)
    facts = parse_facts("localhost", answer.stdout)
    assert facts.is_complete
    assert facts.system == "Linux"
    assert facts.hostname == os.uname().nodename
    assert facts.memory_bytes == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.01)
    assert facts.free_bytes is not None
    assert facts.memory_bytes is not None
    assert 0 < facts.free_bytes < facts.memory_bytes
    assert facts.disk_free_bytes
    assert facts.clock_start is not None
    assert answer.started_at - 1 < facts.clock_start < answer.started_at + answer.seconds + 1
    assert facts.python is not None
    assert (facts.python.path, facts.python.minor) == (sys.executable, f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert facts.python.packages["kimi-mlx"] == __version__
    assert facts.python.code
    assert "linux" in (facts.python.mlx_build or "")
    assert json.loads(facts.ip_addr or "[]")


@pytest.mark.parametrize("shell", [*SHELLS[:1], *(pytest.param(shell, marks=pytest.mark.slow) for shell in SHELLS[1:])])
def test_order_of_interpreters(shell: str, tmp_path: Path, home: Path) -> None:
    usual = put(tmp_path / "a 'b'; $(c)", "python", f'exec {shlex.quote(sys.executable)} "$@"')
    broken = put(tmp_path, "broken", "exit 1")
    venv = put(home / ".local/share/kimi-mlx/venv/bin", "python", f'exec {shlex.quote(sys.executable)} "$@"')
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home)}
    script = facts_script([str(tmp_path / "missing"), str(broken), str(usual), str(usual), str(tmp_path)])
    facts = run_facts(shell, script, environment)
    assert facts.broken_interpreters == (str(broken),)
    assert [python.path for python in facts.interpreters[:2]] == [str(usual), str(venv)]
    assert facts.python == facts.interpreters[0]


@pytest.mark.parametrize("shell", SHELLS)
def test_stores(shell: str, tmp_path: Path, home: Path) -> None:
    stores = tmp_path / "all stores"
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = stores / "moonshotai--Kimi-K2.5" / commit[:12] / "hybrid-2-a1b2c3"
    origin = {"repository": "moonshotai/Kimi-K2.5", "commit": commit}
    for rank in (0, 1):
        (folder / f"rank-{rank}").mkdir(parents=True)
    (folder / "rank-1/manifest.json").write_text(json.dumps({"format": 1, "origin": origin, "rank": 1}, indent=1))
    broken = stores / "a--b--c" / "abc" / "hybrid-1-000000" / "rank-0"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "KIMI_MLX_STORES": str(stores)}
    facts = run_facts(shell, facts_script(is_search=False), environment)
    assert facts.stores_folder == str(stores)
    assert all((store.size_bytes or 0) % 1024 == 0 for store in facts.stores)
    assert facts.stores[1].size_bytes
    assert tuple(replace(store, size_bytes=None) for store in facts.stores) == (
        HeldStore("a/b--c", "abc", "hybrid-1-000000", 0, "a--b--c/abc/hybrid-1-000000/rank-0"),
        HeldStore("moonshotai/Kimi-K2.5", commit, "hybrid-2-a1b2c3", 1, str((folder / "rank-1").relative_to(stores))),
    )


@pytest.mark.parametrize(
    ("environment", "stores"),
    [
        ({}, "HOME/.local/share/kimi-mlx/stores"),
        ({"XDG_DATA_HOME": "/data"}, "/data/kimi-mlx/stores"),
        ({"XDG_DATA_HOME": "relative"}, "HOME/.local/share/kimi-mlx/stores"),
        ({"KIMI_MLX_STORES": "~/s t"}, "HOME/s t"),
        ({"KIMI_MLX_STORES": ""}, "HOME/.local/share/kimi-mlx/stores"),
    ],
)
def test_folders_match_kimi_mlx_folders(environment: dict[str, str], stores: str, home: Path) -> None:
    here = {"PATH": "/usr/bin:/bin", "HOME": str(home), **environment}
    facts = run_facts("sh", facts_script(is_search=False), here)
    assert facts.stores_folder == stores.replace("HOME", str(home))
    code = "from kimi_mlx.folders import stores_folder; print(stores_folder())"
    ours = subprocess.run([sys.executable, "-c", code], env={**here, "PYTHONPATH": os.getcwd()}, capture_output=True)
    if sys.platform == "linux":
        assert ours.stdout.decode().strip() == facts.stores_folder


def test_partial_output_gives_partial_facts() -> None:
    assert parse_facts("mac-b", "hostname=mac-b\nodd\n") == Facts("mac-b", is_complete=False, hostname="mac-b")


def test_invalid_values_become_none() -> None:
    lines = [
        "memory_bytes=",
        "wired_limit_mb=-1",
        "disk=df: no such file",
        "clock=N",
        "interpreter={",
        "interpreter=[]",
    ]
    lines += ["store=a/b", "firewall=?", "vm_stat=Pages free: 1.", "asked_port=x", "interpreter={}", "odd"]
    assert parse_facts("mac-b", "\n".join(lines)) == Facts("mac-b", is_complete=False)


@pytest.mark.parametrize(
    ("line", "free"),
    [
        ("/dev/disk3s5  100 40 60 40% /System/Volumes/Data", 60),
        ("map auto home 0 0 0 100% /System/Volumes/Data/home dir", 0),
        ("/dev/vda 264212084 41614356 64776556 40% /", 64776556),
        ("tmpfs 10 12 -2 - /x", 0),
    ],
)
def test_free_disk_space(line: str, free: int) -> None:
    assert probes.disk_free(line) == free * 1024


@pytest.mark.parametrize(
    ("text", "state"),
    [("Firewall is enabled. (State = 1) \n", 1), ("Firewall is disabled. (State = 0)", 0), ("", None)],
)
def test_firewall(text: str, state: int | None) -> None:
    assert probes.firewall(text) == state
