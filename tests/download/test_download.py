"""`kimi-mlx download` as a user runs it: real processes and the real hub client against tests/hub.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import FORMATS
from tests.download.host import (
    HEADER_BYTES,
    IN_FLIGHT_BYTES,
    NAME,
    DiskWatch,
    Expected,
    Host,
    built_from_folder,
    checksums,
    disk_bytes,
    end,
    fail,
    files_fetched,
    flip_a_byte,
    rank_folder,
    repository_bytes,
    succeed,
    wait_until,
    wait_until_sent,
)
from tests.fakes import KIMI_MINI
from tests.hub import COMMIT, Hub
from tests.vision_checkpoints import rewrite

KILL_AT_STEP = """
import os, signal, sys, tempfile
steps, last = 0, int(sys.argv.pop())
def counted(function):
    def call(*arguments, **options):
        global steps
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
from kimi_mlx.cli.app import run
for name in ("fsync", "replace", "pwrite", "ftruncate", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
try:
    run()
finally:
    print("steps:", steps, file=sys.stderr)
"""


class HubWithHistory(Hub):
    """A hub that also serves earlier commits."""

    def __init__(self, history: dict[str, Path]):
        """Serve the folder of each commit; the last one is `main`."""
        super().__init__({NAME: next(reversed(history.values()))})
        self.history = history
        self._requested = threading.local()
        self.folders = _PerRequest(lambda: history[self._commit()])
        self.commits = _PerRequest(self._commit)

    def record_request(self, request: str, is_authorized: bool) -> None:
        super().record_request(request, is_authorized)
        found = re.search(r"/(?:revision|resolve)/([0-9a-f]{40})", request)
        self._requested.commit = found[1] if found and found[1] in self.history else next(reversed(self.history))

    def _commit(self) -> str:
        return self._requested.commit


class _PerRequest(dict[str, Any]):
    """A mapping of the repository to the value for the current request."""

    def __init__(self, value: Callable[[], Any]):
        super().__init__({NAME: None})
        self._value = value

    def __getitem__(self, name: str) -> Any:
        return self._value()


@pytest.mark.slow
def test_one_download_builds_all_stores_and_a_second_run_sends_no_requests(
    host: Host, small: Path, expected_small: Expected
) -> None:
    folder = succeed(host.run("download", NAME, "--ranks", "2")).strip()
    assert checksums(Path(folder)) == expected_small(2)
    assert host.hub.sent_bytes <= HEADER_BYTES * repository_bytes(small)
    assert not [path for path in host.stores.rglob("*") if path.is_file() and "sources" in path.parts]
    host.hub.reset_counts()
    assert succeed(host.run("download", NAME, "--ranks", "2", HF_HUB_OFFLINE="1")).strip() == folder
    assert host.hub.requests == []


def test_a_dry_run_shows_sizes_and_fetches_only_metadata(host: Host, small: Path) -> None:
    result = json.loads(succeed(host.call("download", NAME, "--ranks", "2", "--dry-run", "--json")))
    assert host.hub.sent_bytes < 0.05 * repository_bytes(small)
    assert not list(host.stores.rglob("*"))
    weights = {path.name: path.stat().st_size for path in small.glob("*.safetensors")}
    assert {file["name"]: file["size_bytes"] for file in result["files"]} == weights
    held = sum(rank["size_bytes"] for rank in result["ranks"])
    assert sum(weights.values()) * 0.95 < held < sum(weights.values()) * 2  # attention is in both
    two_files = sum(sorted(weights.values())[-2:])
    assert result["disk_needed_bytes"] == held + two_files
    assert 0 < result["disk_free_bytes"] <= shutil.disk_usage(host.home).total


@pytest.mark.slow
def test_a_dry_run_is_a_table_in_both_units(host: Host, small: Path) -> None:
    shown = succeed(host.call("download", NAME, "--ranks", "2", "--dry-run"))
    result = json.loads(succeed(host.call("download", NAME, "--ranks", "2", "--dry-run", "--json")))
    total = sum(file["size_bytes"] for file in result["files"]) + result["small_bytes"]
    for name, size in {
        **{file["name"]: file["size_bytes"] for file in result["files"]},
        "all files": total,
        "still to download": total - result["small_bytes"],
        "rank 0": result["ranks"][0]["size_bytes"],
        "rank 1": result["ranks"][1]["size_bytes"],
        "disk needed": result["disk_needed_bytes"],
    }.items():
        assert re.search(rf"^{name} +{size / 1e9:.3f} +{size / 2**30:.3f}$", shown, re.MULTILINE), shown
    alone = json.loads(succeed(host.call("download", NAME, "--dry-run", "--json")))
    assert alone["disk_needed_bytes"] == sum(file["size_bytes"] for file in alone["files"])
    assert not list(host.cache.rglob("*.safetensors"))
    succeed(host.call("download", NAME, "--ranks", "2"))
    done = json.loads(succeed(host.call("download", NAME, "--ranks", "2", "--dry-run", "--json")))
    assert done["disk_needed_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--ranks", "2"], ["--ranks", "2", "--keep-source"], ["--verify"]])
def test_json_is_one_document_and_nothing_else(host: Host, mode: list[str]) -> None:
    for _ in range(2):
        done = host.call("download", NAME, *mode, "--json")
        result = json.loads(succeed(done))
        assert done.stderr == ""
        assert result["commit"] == COMMIT
        assert Path(result["folder"]).is_dir()
        assert [rank["rank"] for rank in result.get("ranks", [])] == ([0, 1] if "--ranks" in mode else [])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [*(pytest.param(ranks, marks=pytest.mark.sweep) for ranks in (1, 2)), 3])
def test_one_machine_fetches_each_byte_once_and_needs_two_files_of_extra_disk(
    large_host: Host, large: Path, expected_large: Expected, ranks: int
) -> None:
    hub = large_host.hub
    hub.fail("slow", "/cdn/*", bytes_per_s=40_000_000)
    with DiskWatch(large_host.stores) as watch:
        succeed(large_host.run("download", NAME, "--ranks", str(ranks)))
    assert checksums(large_host.stores) == expected_large(ranks)
    assert hub.sent_bytes <= HEADER_BYTES * repository_bytes(large)
    two_files = sum(sorted(path.stat().st_size for path in large.glob("*.safetensors"))[-2:])
    assert 0 < watch.peak_source_bytes <= two_files + 16384
    assert watch.peak_bytes <= disk_bytes(large_host.stores) + two_files + 65536


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "int4", "int4-k2.5"])
def test_stores_of_every_format_equal_those_built_from_a_folder(name: str, tmp_path: Path) -> None:
    with Hub({NAME: FORMATS / name}) as hub:
        host = Host(hub, tmp_path / "host")
        succeed(host.call("download", NAME, "--ranks", "2"))
        assert checksums(host.stores) == built_from_folder(FORMATS / name, tmp_path / "expected", 2)


@pytest.mark.slow
def test_kept_source_files_are_a_complete_checkpoint(host: Host, small: Path, expected_small: Expected) -> None:
    succeed(host.call("download", NAME, "--ranks", "2", "--keep-source"))
    assert checksums(host.stores) == expected_small(2)
    assert host.hub.sent_bytes <= HEADER_BYTES * repository_bytes(small)
    offline = succeed(host.run("download", NAME, HF_HUB_OFFLINE="1"))
    assert Path(offline.strip()).name == COMMIT
    host.hub.reset_counts()
    shutil.rmtree(host.stores)
    succeed(host.call("download", NAME, "--ranks", "2"))  # from the cache
    assert checksums(host.stores) == expected_small(2)
    assert not files_fetched(host.hub)


# kills


@pytest.fixture(scope="session")
def all_steps(small: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Number of disk operations of an uninterrupted build."""
    with Hub({NAME: small}) as hub:
        host = Host(hub, tmp_path_factory.mktemp("steps"))
        done = host.run("download", NAME, "--ranks", "2", "10000000", code=KILL_AT_STEP)
    return int(re.findall(r"steps: (\d+)", done.stderr)[-1])


@pytest.mark.sweep
@pytest.mark.parametrize("arguments", [[], ["--ranks", "2"]], ids=["checkpoint", "stores"])
def test_repeated_kills_fetch_few_bytes_twice(
    large_host: Host, large: Path, expected_large: Expected, arguments: list[str]
) -> None:
    """Bound: 1.02 of the repository, and for each kill the headers and what the kernel held."""
    hub, total = large_host.hub, repository_bytes(large)
    hub.fail("slow", "*", bytes_per_s=30_000_000)
    process = large_host.start("download", NAME, *arguments)
    wait_until(lambda: any("model-00002" in request for request in hub.requests))  # headers
    process.kill()
    end(process)
    kills = 1
    for percent in (5, 20, 45, 70, 95):
        process = large_host.start("download", NAME, *arguments)
        wait_until_sent(hub, percent * total // 100, process)
        process.kill()
        end(process)
        kills += 1
    hub.clear_faults()
    folder = succeed(large_host.run("download", NAME, *arguments)).strip()
    assert hub.sent_bytes <= HEADER_BYTES * total + kills * (0.005 * total + IN_FLIGHT_BYTES)
    if arguments:
        assert checksums(large_host.stores) == expected_large(2)
    else:
        for path in large.iterdir():
            assert (Path(folder) / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.55, -13, -1])
def test_a_build_resumes_after_a_kill_at_any_disk_operation(
    host: Host, expected_small: Expected, all_steps: int, part: float
) -> None:
    """`part`: fraction of all disk operations, or a negative number of operations before the end."""
    last = int(part * all_steps) if part > 0 else all_steps + int(part) + 1
    killed = host.run("download", NAME, "--ranks", "2", str(last), code=KILL_AT_STEP)
    assert killed.returncode == -signal.SIGKILL
    succeed(host.call("download", NAME, "--ranks", "2"))
    assert checksums(host.stores) == expected_small(2)
    assert not [path for path in host.stores.rglob("*") if path.is_file() and "sources" in path.parts]


@pytest.mark.sweep
def test_a_build_killed_every_500_disk_operations_completes(host: Host, expected_small: Expected) -> None:
    for _ in range(8):
        done = host.run("download", NAME, "--ranks", "2", "500", code=KILL_AT_STEP)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert checksums(host.stores) == expected_small(2)


@pytest.mark.sweep
@pytest.mark.parametrize("arguments", [[], ["--ranks", "2"]], ids=["checkpoint", "stores"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_download_quickly_and_the_next_run_resumes(
    large_host: Host, large: Path, arguments: list[str], number: int, code: int
) -> None:
    hub = large_host.hub
    hub.fail("slow", "/cdn/*", bytes_per_s=3_000_000)
    process = large_host.start("download", NAME, *arguments)
    wait_until(lambda: hub.sent_bytes > 4_000_000)
    signalled_s = time.monotonic()
    process.send_signal(number)
    done = end(process)
    assert time.monotonic() - signalled_s < 15
    assert done.returncode == code
    hub.clear_faults()
    succeed(large_host.run("download", NAME, *arguments))
    assert hub.sent_bytes <= HEADER_BYTES * repository_bytes(large) + 4 * IN_FLIGHT_BYTES


# concurrent downloads


@pytest.mark.slow
def test_a_second_build_of_the_same_stores_is_refused(large_host: Host, expected_large: Expected) -> None:
    large_host.hub.fail("slow", "/cdn/*", bytes_per_s=15_000_000)
    first = large_host.start("download", NAME, "--ranks", "2")
    wait_until(lambda: large_host.hub.sent_bytes > 10_000_000)
    first.send_signal(signal.SIGSTOP)  # so that it is still running when the second one starts
    fail(large_host.call("download", NAME, "--ranks", "2"), "another process is building")
    first.send_signal(signal.SIGCONT)
    large_host.hub.clear_faults()
    succeed(end(first))
    assert checksums(large_host.stores) == expected_large(2)


@pytest.mark.sweep
def test_concurrent_downloads_of_two_placements_and_a_checkpoint(
    host: Host, small: Path, expected_small: Expected
) -> None:
    host.hub.fail("slow", "/cdn/*", bytes_per_s=3_000_000)
    modes = [["--ranks", "1"], ["--ranks", "2"], [], []]
    for process in [host.start("download", NAME, *mode) for mode in modes]:
        succeed(end(process))
    for ranks in (1, 2):
        (folder,) = host.stores.glob(f"*/*/hybrid-{ranks}-*")
        assert checksums(folder) == expected_small(ranks)
    assert host.hub.sent_bytes <= 3 * HEADER_BYTES * repository_bytes(small)


# damage


def cut_short(folder: Path) -> None:
    os.truncate(folder / "layer-001.experts.safetensors", 1000)


def remove_file(folder: Path) -> None:
    (folder / "layer-001.experts.safetensors").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "files": [')


def break_manifest_and_flip_a_byte(folder: Path) -> None:
    break_manifest(folder)
    flip_a_byte(folder)


def unknown_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def break_journal(folder: Path) -> None:
    (folder / "journal.jsonl").write_text('{"source": ')


def remove_journal_and_file(folder: Path) -> None:
    (folder / "journal.jsonl").unlink()
    remove_file(folder)


LAYER_1 = {"model-00003-of-00004.safetensors"}
DAMAGES: list[tuple[Callable[[Path], None], str | None, set[str]]] = [
    (cut_short, "layer-001.experts.safetensors` has 1000 bytes, not ", LAYER_1),
    (flip_a_byte, "layer-001.experts.safetensors` has expert", LAYER_1),
    (remove_file, "layer-001.experts.safetensors` is missing", LAYER_1),
    (remove_manifest, "the store `.*` is not complete", set()),
    (break_manifest, "manifest.json` cannot be read", set()),
    (break_manifest_and_flip_a_byte, "manifest.json` cannot be read", LAYER_1),
    (unknown_format, "has format 99, this version reads 2", set()),
    (break_journal, None, set()),
    (remove_journal_and_file, "layer-001.experts.safetensors` is missing", LAYER_1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "message", "fetched"), DAMAGES, ids=[damage[0].__name__ for damage in DAMAGES])
def test_load_reports_damage_and_repair_fetches_only_the_needed_files(
    stored: Host,
    expected_small: Expected,
    damage: Callable[[Path], None],
    message: str | None,
    fetched: set[str],
) -> None:
    damage(rank_folder(stored, 1))
    if message is not None:
        fail(stored.call("chat", NAME, "--ranks", "2", "-p", "hi", "--max-tokens", "1"), message)
        assert stored.hub.requests == []
    result = json.loads(succeed(stored.call("download", NAME, "--ranks", "2", "--verify", "--json")))
    assert checksums(stored.stores) == expected_small(2)
    assert files_fetched(stored.hub) == fetched
    if damage is flip_a_byte:
        assert result["state"] == "is repaired (1 broken file)"
        assert result["broken"] == ["layer-001.experts.safetensors"]
    stored.hub.reset_counts()
    again = json.loads(succeed(stored.call("download", NAME, "--ranks", "2", "--verify", "--json")))
    assert again["state"] == "is verified"
    assert stored.hub.requests == []


@pytest.mark.slow
def test_a_store_of_another_format_is_built_again(stored: Host, expected_small: Expected) -> None:
    """The files have the right sizes, but journal and manifest are of another version."""
    folder = rank_folder(stored)
    unknown_format(folder)
    journal = (folder / "journal.jsonl").read_text().replace('"format": 3', '"format": 99')
    (folder / "journal.jsonl").write_text(journal)
    flip_a_byte(folder)
    succeed(stored.call("download", NAME, "--ranks", "2"))
    assert checksums(stored.stores) == expected_small(2)


@pytest.mark.slow
def test_a_store_of_another_number_of_ranks_is_refused_without_a_checkpoint(stored: Host) -> None:
    message = fail(stored.call("chat", NAME, "--ranks", "3", "-p", "hi"), "as a store for 2 ranks, not for 3")
    assert "--ranks 2" in message
    assert stored.hub.requests == []


@pytest.mark.slow
def test_an_incomplete_store_is_refused_and_nothing_is_fetched(large_host: Host) -> None:
    hub = large_host.hub
    hub.fail("slow", "/cdn/*", bytes_per_s=20_000_000)
    process = large_host.start("download", NAME, "--ranks", "2")
    wait_until(lambda: hub.sent_bytes > 10_000_000)
    process.kill()
    end(process)
    hub.reset_counts()
    fail(large_host.call("chat", NAME, "--ranks", "2", "-p", "hi"), "the store `.*` is not complete")
    assert hub.requests == []


@pytest.mark.slow
def test_verify_of_a_checkpoint_fetches_only_broken_files(host: Host, small: Path) -> None:
    folder = Path(succeed(host.call("download", NAME)).strip())
    broken = (folder / "model-00002-of-00004.safetensors").resolve()
    data = bytearray(broken.read_bytes())
    data[-5] ^= 1
    broken.write_bytes(data)
    host.hub.reset_counts()
    result = json.loads(succeed(host.call("download", NAME, "--verify", "--json")))
    assert result["broken"] == ["model-00002-of-00004.safetensors"]
    assert files_fetched(host.hub) == {"model-00002-of-00004.safetensors"}
    for path in small.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00004.safetensors"])
def test_a_truncated_file_of_a_checkpoint_is_fetched_again(host: Host, small: Path, name: str) -> None:
    folder = Path(succeed(host.call("download", NAME)).strip())
    os.truncate((folder / name).resolve(), 100)
    result = json.loads(succeed(host.call("download", NAME, "--json")))
    assert result["broken"] == [name]
    for path in small.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_checkpoint_on_this_machine_becomes_stores_offline(host: Host, expected_small: Expected) -> None:
    folder = Path(succeed(host.call("download", NAME)).strip())
    shutil.rmtree(folder.parent.parent / "refs")
    host.hub.reset_counts()
    succeed(host.run("download", NAME, "--ranks", "2", HF_HUB_OFFLINE="1"))
    assert checksums(host.stores) == expected_small(2)
    plan = succeed(host.run("download", NAME, "--ranks", "3", "--dry-run", "--json", HF_ENDPOINT="http://127.0.0.1:1"))
    assert [rank["rank"] for rank in json.loads(plan)["ranks"]] == [0, 1, 2]
    assert json.loads(succeed(host.run("download", NAME, "--verify", "--json", HF_HUB_OFFLINE="1")))["broken"] == []
    for revision in (COMMIT, COMMIT[:10]):
        assert succeed(host.run("download", NAME, "--revision", revision, HF_HUB_OFFLINE="1")).strip() == str(folder)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "v1").write_text(COMMIT)
    assert succeed(host.run("download", NAME, "--revision", "v1", HF_HUB_OFFLINE="1")).strip() == str(folder)
    assert host.hub.requests == []


# faults of the hub


@pytest.mark.sweep
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "drop", "after_bytes": 300_000, "times": 12},
        {"kind": "status", "status": 503, "times": 3},
        {"kind": "status", "status": 429, "headers": {"Retry-After": "1"}, "times": 3},
        {"kind": "corrupt", "after_bytes": 100_000, "path": "/cdn/*00003*", "times": 1},
    ],
    ids=["drop", "503", "429", "corrupt"],
)
def test_transient_faults_are_retried(host: Host, expected_small: Expected, fault: dict[str, Any]) -> None:
    process = host.start("download", NAME, "--ranks", "2")
    if fault["kind"] == "corrupt":  # after the requests for headers, which are too short to corrupt
        wait_until(lambda: sum("model-00003" in request and "/cdn/" in request for request in host.hub.requests) >= 2)
    host.hub.fail(**{"path": "/cdn/*", **fault})
    succeed(end(process))
    assert checksums(host.stores) == expected_small(2)


@pytest.mark.sweep
@pytest.mark.parametrize("arguments", [[], ["--ranks", "2"]], ids=["checkpoint", "stores"])
def test_permanent_faults_are_reported(host: Host, arguments: list[str]) -> None:
    hub = host.hub
    fail(host.run("download", "owner/other", *arguments), "repository `owner/other` does not exist")
    fail(host.run("download", NAME, *arguments, "--revision", "nope"), "does not have this revision")
    fail(host.run("download", NAME, *arguments, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    fail(host.run("download", NAME, *arguments, HF_ENDPOINT="http://127.0.0.1:1"), "cannot connect to ")
    hub.token = "good"
    fail(host.run("download", NAME, *arguments, HF_TOKEN="bad"), "rejected your token")
    hub.token = None
    hub.gated.add(NAME)
    fail(host.run("download", NAME, *arguments), "is gated")
    hub.gated.clear()
    hub.fail("corrupt", "/cdn/*00003*", after_bytes=500_000)
    hub.fail("corrupt", "/cdn/*00002*", after_bytes=500_000)
    fail(host.run("download", NAME, *arguments), "is corrupt: expected checksum")
    hub.clear_faults()
    succeed(host.run("download", NAME, *arguments))


# revisions


@pytest.fixture
def history(small: Path, tmp_path: Path) -> Iterator[HubWithHistory]:
    newer = tmp_path / "newer"
    shutil.copytree(small, newer)
    (newer / "generation_config.json").write_text('{"temperature": 0.5}')
    hub = HubWithHistory({COMMIT: small, "b" * 40: newer})
    with hub:
        yield hub


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--ranks", "2"]], ids=["checkpoint", "stores"])
def test_a_local_model_stays_at_its_commit_until_main_is_requested(
    history: HubWithHistory, tmp_path: Path, arguments: list[str]
) -> None:
    host = Host(history, tmp_path / "host")

    def commit(*more: str) -> str:
        return json.loads(succeed(host.call("download", NAME, *arguments, *more, "--json")))["commit"]

    main = history.history.popitem()
    assert commit() == COMMIT
    history.history[main[0]] = main[1]
    assert commit() == COMMIT
    assert commit("--verify") == COMMIT
    history.reset_counts()
    assert commit("--revision", COMMIT) == COMMIT
    assert history.sent_bytes == 0
    assert commit("--revision", "main") == "b" * 40
    assert commit("--revision", COMMIT) == COMMIT


@pytest.mark.slow
def test_a_partial_store_resumes_at_its_commit(
    history: HubWithHistory, small: Path, tmp_path: Path, expected_small: Expected
) -> None:
    host = Host(history, tmp_path / "host")
    main = history.history.popitem()
    killed = host.run("download", NAME, "--ranks", "2", "150", code=KILL_AT_STEP)
    assert killed.returncode == -signal.SIGKILL
    history.history[main[0]] = main[1]
    result = json.loads(succeed(host.call("download", NAME, "--ranks", "2", "--json")))
    assert result["commit"] == COMMIT
    assert checksums(host.stores) == expected_small(2)


# use


@pytest.mark.slow
def test_chat_with_a_store_equals_chat_with_the_checkpoint(tmp_path: Path) -> None:
    with Hub({NAME: KIMI_MINI}) as hub:
        host = Host(hub, tmp_path / "host")
        succeed(host.call("download", NAME, "--ranks", "2"))
        hub.reset_counts()
        question = ["-p", "hi", "--temperature", "0", "--max-tokens", "24"]
        from_store = succeed(host.call("chat", NAME, "--ranks", "2", *question))
        assert hub.requests == []
        assert from_store == succeed(host.call("chat", "kimi-mini", *question))


# vision


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--ranks", "2"), ()], ids=["stores", "cache"])
def test_the_vision_tower_is_left_out_and_added_later(arguments: tuple[str, ...], tmp_path: Path) -> None:
    folder = rewrite(tmp_path / "k2.5", dict)
    for file in KIMI_MINI.glob("t*"):
        shutil.copy(file, folder)
    vision = {file.name: file.stat().st_size for file in folder.glob("*.safetensors") if file.name > "model-00003"}
    with Hub({NAME: folder}) as hub:
        host = Host(hub, tmp_path / "host")
        done = host.call("download", NAME, "--no-vision", *arguments)
        succeed(done)
        assert done.stderr.count("the vision tower") == 1
        assert "is left out: images will be refused" in done.stderr
        assert not {f"{NAME}/{name}" for name in vision} & hub.sent.keys()
        hub.reset_counts()
        assert "vision" not in host.call("download", NAME, "--no-vision", *arguments).stderr
        assert hub.requests == []
        added = host.call("download", NAME, *arguments)
        succeed(added)
        assert "vision" not in added.stderr
        weights = {path: count for path, count in hub.sent.items() if path.endswith(".safetensors")}
        for name, size in vision.items():
            assert weights.pop(f"{NAME}/{name}") >= size
        assert sum(weights.values()) < 40_000  # headers of the others
        hub.reset_counts()
        succeed(host.call("download", NAME, *arguments))
        assert hub.requests == []


@pytest.mark.slow
def test_a_vision_tower_in_files_with_other_weights_is_not_left_out_silently(tmp_path: Path) -> None:
    with Hub({NAME: KIMI_MINI.with_name("kimi-mini-vl")}) as hub:
        host = Host(hub, tmp_path / "host")
        done = host.call("download", NAME, "--no-vision")
        succeed(done)
        assert "the vision tower is in files with other weights" in done.stderr
        again = host.call("download", NAME)
        succeed(again)
        assert "vision" not in again.stderr
