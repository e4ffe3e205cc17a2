"""`kimi-mlx download` over a ring: each process, started as by `mlx.launch`, is a host with its own folders."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.errors import RingError
from kimi_mlx.parallel.checked_group import CheckedGroup
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.store.manifest import Origin
from kimi_mlx.store.rewrite import rewrite_store
from tests.download.host import (
    HEADER_BYTES,
    IN_FLIGHT_BYTES,
    NAME,
    Checksums,
    DiskWatch,
    Expected,
    Host,
    checksums,
    disk_bytes,
    end,
    files_fetched,
    flip_a_byte,
    rank_folder,
    repository_bytes,
    succeed,
    wait_until,
)
from tests.hub import COMMIT, Hub
from tests.mlx_launch import loopback_hostfile, ring_variables
from tests.stores import build_with_stacks
from tests.vision_checkpoints import rewrite

pytestmark = pytest.mark.ranks

LOST = "another host has stopped or cannot be reached any more"


@dataclass
class Cluster:
    """Hosts that download together."""

    hosts: Sequence[Host]

    def start(self, *arguments: str, **variables: str) -> list[subprocess.Popen[str]]:
        hostfile = self.hosts[0].home.parent / "hostfile.json"
        hostfile.parent.mkdir(parents=True, exist_ok=True)
        hostfile.write_text(loopback_hostfile(len(self.hosts)))
        return [
            host.start("download", NAME, *arguments, **{**ring_variables(rank, str(hostfile)), **variables})
            for rank, host in enumerate(self.hosts)
        ]

    def run(self, *arguments: str, **variables: str) -> list[subprocess.CompletedProcess[str]]:
        return end_all(self.start(*arguments, **variables))

    def build(self, *arguments: str, **variables: str) -> str:
        """Run the command; return the output of host 0. The others print nothing."""
        done = self.run(*arguments, **variables)
        assert [process.returncode for process in done] == [0] * len(done), [process.stderr for process in done]
        assert [process.stdout + process.stderr for process in done[1:]] == [""] * (len(done) - 1)
        return done[0].stdout

    def checksums(self) -> Checksums:
        """Return the checksums of the one store on each host."""
        found: Checksums = {}
        for rank, host in enumerate(self.hosts):
            own = checksums(host.stores)
            assert list(own) == [rank]
            assert not [path for path in host.stores.rglob("*") if path.is_file() and "sources" in path.parts]
            found |= own
        return found


def end_all(processes: Sequence[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    try:
        return [end(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def errors(done: Sequence[subprocess.CompletedProcess[str]]) -> list[str]:
    """Return the lines that begin with `error:`; MLX prints other lines."""
    return [line for process in done for line in process.stderr.splitlines() if line.startswith("error: ")]


def error_of(done: Sequence[subprocess.CompletedProcess[str]]) -> str:
    """Return the error that rank 0 alone prints when all hosts fail."""
    assert not [process for process in done if process.returncode not in (1, 2) or "Traceback" in process.stderr]
    (error,) = errors(done)
    assert error in done[0].stderr
    return error


def cluster_of(hub: Hub, folder: Path, size: int) -> Cluster:
    return Cluster([Host(hub, folder / f"host-{rank}") for rank in range(size)])


@pytest.mark.slow
def test_two_hosts_plan_and_build_the_stores_of_one_host_and_a_second_run_sends_no_requests(
    hub: Hub, small: Path, expected_small: Expected, tmp_path: Path
) -> None:
    cluster = cluster_of(hub, tmp_path, 2)
    plan = json.loads(cluster.build("--dry-run", "--json"))
    assert hub.sent_bytes < 0.05 * repository_bytes(small)
    assert [item["rank"] for item in plan["ranks"]] == [0, 1]
    two_files = sum(sorted(file["size_bytes"] for file in plan["files"])[-2:])
    assert plan["disk_needed_bytes"] == plan["ranks"][0]["size_bytes"] + two_files
    hub.reset_counts()
    result = json.loads(cluster.build("--json"))
    assert result["state"] == "is fetched and verified"
    assert [item["rank"] for item in result["ranks"]] == [0]
    assert hub.sent_bytes <= HEADER_BYTES * repository_bytes(small)
    assert cluster.checksums() == expected_small(2)
    hub.reset_counts()
    assert cluster.build(HF_HUB_OFFLINE="1").strip() == result["folder"]
    assert hub.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.sweep), 3])
def test_each_file_is_fetched_by_one_host_and_no_disk_holds_more_than_the_store_and_two_files(
    large_hub: Hub, large: Path, expected_large: Expected, tmp_path: Path, size: int
) -> None:
    cluster = cluster_of(large_hub, tmp_path, size)
    large_hub.fail("slow", "/cdn/*", bytes_per_s=20_000_000)
    watches = [DiskWatch(host.stores) for host in cluster.hosts]
    for watch in watches:
        watch.__enter__()
    cluster.build()
    for watch in watches:
        watch.__exit__()
    assert cluster.checksums() == expected_large(size)
    sizes = {path.name: path.stat().st_size for path in large.glob("*.safetensors")}
    for name, count in sizes.items():
        assert large_hub.sent[f"{NAME}/{name}"] <= HEADER_BYTES * count
    assert large_hub.sent_bytes <= HEADER_BYTES * repository_bytes(large)
    two_files = sum(sorted(sizes.values())[-2:])
    for host, watch in zip(cluster.hosts, watches, strict=True):
        assert 0 < watch.peak_source_bytes <= two_files + 16384
        assert watch.peak_bytes <= disk_bytes(host.stores) + two_files + 65536


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "victim", "percent"),
    [(2, 0, 40), pytest.param(2, 1, 90, marks=pytest.mark.sweep), pytest.param(3, 1, 0, marks=pytest.mark.sweep)],
)
def test_a_killed_host_ends_all_and_the_next_run_resumes(
    large_hub: Hub, large: Path, expected_large: Expected, tmp_path: Path, size: int, victim: int, percent: int
) -> None:
    """Limit: 1.02 of the repository, the headers once more, and the kernels' buffers of each host's connection."""
    cluster, total = cluster_of(large_hub, tmp_path, size), repository_bytes(large)
    large_hub.fail("slow", "/cdn/*", bytes_per_s=15_000_000)
    processes = cluster.start()
    if percent:
        wait_until(lambda: large_hub.sent_bytes > percent * total / 100)
    else:
        wait_until(lambda: any("model-00002" in request for request in large_hub.requests))  # headers
    processes[victim].kill()
    done = end_all(processes)
    assert [process.returncode for process in done] == [
        -signal.SIGKILL if rank == victim else 1 for rank in range(size)
    ]
    assert errors(done) == [f"error: {LOST}"] * (size - 1)
    large_hub.clear_faults()
    cluster.build()
    assert cluster.checksums() == expected_large(size)
    assert large_hub.sent_bytes <= (HEADER_BYTES + 0.005) * total + size * IN_FLIGHT_BYTES


@pytest.mark.sweep
def test_repeated_kills_store_no_wrong_byte(
    large_hub: Hub, large: Path, expected_large: Expected, tmp_path: Path
) -> None:
    """For a lost peer MLX returns stale memory, which must never reach a file."""
    cluster, choose = cluster_of(large_hub, tmp_path, 3), random.Random(1)
    for _ in range(6):
        processes = cluster.start()
        large_hub.reset_counts()
        wait_until(lambda: any("resolve" in request for request in large_hub.requests))
        time.sleep(choose.uniform(0.1, 1.5))
        choose.choice(processes).kill()
        end_all(processes)
    cluster.build()
    assert cluster.checksums() == expected_large(3)


@pytest.mark.sweep
@pytest.mark.parametrize(("number", "code", "is_for_all"), [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)])
def test_a_signal_ends_a_download_quickly_and_the_next_run_resumes(
    large_hub: Hub, expected_large: Expected, tmp_path: Path, number: int, code: int, is_for_all: bool
) -> None:
    cluster = cluster_of(large_hub, tmp_path, 2)
    large_hub.fail("slow", "/cdn/*", bytes_per_s=3_000_000)
    processes = cluster.start()
    wait_until(lambda: large_hub.sent_bytes > 6_000_000)
    signalled_s = time.monotonic()
    for process in processes if is_for_all else processes[1:]:
        process.send_signal(number)
    assert processes[1].wait(15) == code
    done = end_all(processes)
    assert time.monotonic() - signalled_s < 15
    assert done[0].returncode in ((code, 1) if is_for_all else (1,))
    large_hub.clear_faults()
    cluster.build()
    assert cluster.checksums() == expected_large(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        [
            {"kind": "drop", "after_bytes": 2_000_000, "times": 12},
            {"kind": "corrupt", "after_bytes": 5_000_000, "times": 1},
        ],
        pytest.param([{"kind": "status", "status": 503, "times": 4}], marks=pytest.mark.sweep),
        pytest.param(
            [{"kind": "status", "status": 429, "headers": {"Retry-After": "1"}, "times": 4}], marks=pytest.mark.sweep
        ),
    ],
    ids=["drop and corrupt", "503", "429"],
)
def test_transient_faults_are_retried(
    large_hub: Hub, expected_large: Expected, tmp_path: Path, faults: list[dict[str, Any]]
) -> None:
    cluster = cluster_of(large_hub, tmp_path, 2)
    processes = cluster.start()
    wait_until(lambda: large_hub.sent_bytes > 2_000_000)  # all headers are read
    for fault in faults:
        large_hub.fail(**{"path": "/cdn/*", **fault})
    done = end_all(processes)
    assert [process.returncode for process in done] == [0, 0], errors(done)
    assert cluster.checksums() == expected_large(2)


@pytest.mark.sweep
def test_a_corrupt_file_ends_all_hosts_with_the_same_error(hub: Hub, expected_small: Expected, tmp_path: Path) -> None:
    cluster = cluster_of(hub, tmp_path, 3)
    hub.fail("corrupt", "/cdn/*00003*", after_bytes=500_000)
    done = cluster.run()
    assert [process.returncode for process in done] == [1, 1, 1]
    error = error_of(done)
    assert error.startswith("error: rank ")
    assert "`model-00003-of-00004.safetensors` of `owner/model` is corrupt" in error
    hub.clear_faults()
    cluster.build()
    assert cluster.checksums() == expected_small(3)


@pytest.mark.sweep
def test_an_error_of_the_hub_ends_all_hosts_with_the_same_error(large_hub: Hub, tmp_path: Path) -> None:
    cluster = cluster_of(large_hub, tmp_path, 2)

    def expect(message: str, *arguments: str, **variables: str) -> None:
        done = cluster.run(*arguments, **variables)
        assert re.search(message, error_of(done))

    expect(r"rank 0 \(`.*`\): `owner/model` does not have this revision", "--revision", "nope")
    expect(r"rank 0 \(`.*`\): .*HF_HUB_OFFLINE", HF_HUB_OFFLINE="1")
    expect(r"rank 0 \(`.*`\): .* cannot connect to ", HF_ENDPOINT="http://127.0.0.1:1")
    large_hub.token = "good"
    expect(r"rank 0 \(`.*`\): .* rejected your token", HF_TOKEN="bad")
    large_hub.token = None
    large_hub.gated.add(NAME)
    expect(r"rank 0 \(`.*`\): `owner/model` is gated")
    large_hub.gated.clear()
    folder = large_hub.folders.pop(NAME)
    expect(r"rank 0 \(`.*`\): repository `owner/model` does not exist")
    large_hub.folders[NAME] = folder
    large_hub.fail("missing", "*00004*")
    expect(r"rank 0 \(`.*`\): .* lists a file that it does not have")


@pytest.mark.slow
def test_hosts_with_different_files_are_refused(small: Path, tmp_path: Path) -> None:
    other = shutil.copytree(small, tmp_path / "other")
    for file in other.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-4096:] = bytes(4096)
        file.write_bytes(data)
    with Hub({NAME: small}) as hub:
        hosts = [Host(hub, tmp_path / name) for name in ("a", "b")]
        hostfile = tmp_path / "hostfile.json"
        hostfile.write_text(loopback_hostfile(2))
        processes = [
            host.start("download", str(folder), **ring_variables(rank, str(hostfile)))
            for rank, (host, folder) in enumerate(zip(hosts, (small, other), strict=True))
        ]
        assert "rank 1 has another version of kimi-mlx, or another checkpoint" in error_of(end_all(processes))
        assert not list(tmp_path.rglob("layer-*"))


@pytest.mark.sweep
def test_a_folder_in_use_on_one_host_is_an_error_on_all(large_hub: Hub, tmp_path: Path) -> None:
    large_hub.fail("slow", "/cdn/*", bytes_per_s=10_000_000)
    first = cluster_of(large_hub, tmp_path, 2)
    running = first.start()
    wait_until(lambda: large_hub.sent_bytes > 3_000_000)
    for process in running:
        process.send_signal(signal.SIGSTOP)  # so that it is still running when the second one starts
    second = Cluster([Host(large_hub, tmp_path / "other"), first.hosts[1]])
    assert re.search(r"rank 1 \(`.*`\): another process is building", error_of(second.run()))


@pytest.fixture
def tiny_disk(tmp_path: Path, large: Path) -> Iterator[Path]:
    """Mount a disk of 80 MB, 20 MB more than a host needs. This needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.sweep
def test_a_full_disk_on_one_host_is_an_error_on_all_and_the_next_run_resumes(
    large_hub: Hub, expected_large: Expected, tmp_path: Path, tiny_disk: Path
) -> None:
    victim = 1
    hosts = [Host(large_hub, tmp_path / "a"), Host(large_hub, tmp_path / "b")]
    hosts[victim].home = tiny_disk / "host"
    cluster = Cluster(hosts)
    cluster.hosts[0].home.parent.mkdir(exist_ok=True)
    ballast = tiny_disk / "ballast"

    ballast.write_bytes(bytes(50_000_000))  # too little space at the start
    done = cluster.run()
    error = error_of(done)
    assert f"error: rank {victim} (" in error
    assert "more, but its disk has" in error
    ballast.unlink()

    large_hub.fail("slow", "/cdn/*", bytes_per_s=10_000_000)
    large_hub.reset_counts()
    processes = cluster.start()
    wait_until(lambda: large_hub.sent_bytes > 20_000_000)
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # fills the disk during the download
        while file.write(bytes(1 << 16)):
            pass
    done = end_all(processes)
    assert re.search(rf"error: rank {victim} \(`.*`\): the disk is full: `{tiny_disk}", error_of(done))
    ballast.unlink()
    large_hub.clear_faults()
    cluster.build()
    assert cluster.checksums() == expected_large(2)


@pytest.mark.sweep
def test_repair_on_one_host_fetches_only_the_needed_files(hub: Hub, expected_small: Expected, tmp_path: Path) -> None:
    cluster = cluster_of(hub, tmp_path, 2)
    cluster.build()
    hub.reset_counts()
    flip_a_byte(rank_folder(cluster.hosts[1], 1))
    cluster.build("--verify")
    assert cluster.checksums() == expected_small(2)
    assert files_fetched(hub) == {"model-00003-of-00004.safetensors"}
    (rank_folder(cluster.hosts[1], 1) / "manifest.json").write_text("{")
    shutil.rmtree(cluster.hosts[0].stores)
    cluster.build()
    assert cluster.checksums() == expected_small(2)


@pytest.mark.slow
def test_stores_of_an_earlier_version_are_rewritten_on_each_host(
    hub: Hub, small: Path, expected_small: Expected, tmp_path: Path
) -> None:
    """One host has already been rewritten; the hub is not asked for anything."""
    cluster = cluster_of(hub, tmp_path, 2)
    for rank, host in enumerate(cluster.hosts):
        folder = build_with_stacks(small, host.stores, 2, origin=Origin(NAME, COMMIT)).folder
        shutil.rmtree(folder / f"rank-{1 - rank}")
    rewrite_store(rank_folder(cluster.hosts[1], 1))
    result = json.loads(cluster.build("--json", HF_HUB_OFFLINE="1"))
    assert result["state"] == "is on this machine and rewritten, with a record for each expert"
    assert cluster.checksums() == expected_small(2)
    assert hub.requests == []


@pytest.mark.slow
def test_a_host_with_the_checkpoint_shares_it(hub: Hub, expected_small: Expected, tmp_path: Path) -> None:
    cluster = cluster_of(hub, tmp_path, 2)
    succeed(cluster.hosts[1].call("download", NAME))
    hub.reset_counts()
    cluster.build()
    assert cluster.checksums() == expected_small(2)
    assert not files_fetched(hub)


class PrescribedGroup:
    """A group of two in which the other rank's data are prescribed."""

    rank, size = 0, 2

    def __init__(self, *answers: str):
        self._answers = itertools.cycle(answers)

    def gather(self, x: mx.array) -> mx.array:
        row = np.array(x)
        other = {"same": row, "stale": np.roll(row, 1), "memory": np.zeros_like(row)}[next(self._answers)]
        return mx.array(np.stack([row, other]))

    def sum(self, x: mx.array) -> mx.array:
        return self.gather(x).sum(axis=0)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "bool"])
def test_a_checked_gather_returns_the_sent_data(dtype: str) -> None:
    x = np.arange(12).reshape(3, 4).astype(dtype)
    for group in (CheckedGroup(PrescribedGroup("same")), CheckedGroup(SingleGroup())):
        rows = np.array(group.gather(mx.array(x)))
        assert rows.dtype == x.dtype
        assert (rows == np.stack([x] * group.size)).all()


@pytest.mark.parametrize("answer", ["stale", "memory"])
def test_a_checked_gather_detects_other_data(answer: str) -> None:
    group = CheckedGroup(PrescribedGroup("same", answer))
    x = mx.array(np.arange(5, dtype=np.int32))
    group.gather(x)
    with pytest.raises(RingError, match=LOST):
        group.gather(x)


@pytest.mark.sweep
def test_the_tower_is_added_to_the_store_of_rank_0(tmp_path: Path) -> None:
    folder = rewrite(tmp_path / "k2.5", dict)
    vision = {file.name: file.stat().st_size for file in folder.glob("*.safetensors") if file.name > "model-00003"}
    with Hub({NAME: folder}) as hub:
        cluster = cluster_of(hub, tmp_path / "later", 2)
        cluster.build("--no-vision")
        assert not {f"{NAME}/{name}" for name in vision} & hub.sent.keys()
        hub.reset_counts()
        cluster.build()
        for name, size in vision.items():
            assert size <= hub.sent[f"{NAME}/{name}"] < size + 10_000
        assert hub.sent_bytes < sum(vision.values()) + 80_000
        at_once = cluster_of(hub, tmp_path / "at once", 2)
        at_once.build()
    assert cluster.checksums() == at_once.checksums()
    assert ["vision.safetensors" in names for _, names in sorted(cluster.checksums().items())] == [True, False]
