"""Stores of earlier versions: they load as they are, and are rewritten in place, whatever interrupts that."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.runtime.load import load_share
from kimi_mlx.store import rewrite, writer
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.download import StoreOptions
from kimi_mlx.store.experts import expert_sources
from kimi_mlx.store.journal import Journal
from kimi_mlx.store.manifest import Manifest, read_manifest
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.store.prepare import prepare_stores
from kimi_mlx.store.rewrite import rewrite_store
from kimi_mlx.store.store_folders import rank_folder
from kimi_mlx.store.stores import broken_files, load_store, open_manifest
from kimi_mlx.weights.expert_reader import ExpertReader
from kimi_mlx.weights.header import read_header
from tests.experts import read_expert
from tests.fakes import KIMI_MINI
from tests.stores import build_all, build_with_stacks, checksums, make_format_2, read_manifests
from tests.unit.store.test_vision_store import Silent


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of two ranks as an earlier version built them."""
    stores = tmp_path_factory.mktemp("earlier")
    build_with_stacks(KIMI_MINI, stores, 2)
    return stores


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildJob, list[Manifest]]:
    """Stores of two ranks as this version builds them."""
    return build_all(KIMI_MINI, tmp_path_factory.mktemp("fresh"), 2)


@pytest.fixture
def folder(earlier: Path, tmp_path: Path) -> Path:
    """Folder of a copy of the earlier stores."""
    stores = shutil.copytree(earlier, tmp_path / "stores")
    return next(stores.glob("*/*/hybrid-2-*"))


def load(folder: Path, rank: int) -> dict[str, mx.array]:
    model: Model = load_store(folder, open_manifest(folder, rank, 2, "hybrid"), load_config(folder), mx.float32)
    return dict(tree_flatten(model.parameters()))  # pyright: ignore[reportReturnType, reportArgumentType]


def check_loads(folder: Path, job: BuildJob) -> None:
    for rank in range(2):
        found, expected = load(folder, rank), load(job.folder, rank)
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def check_rewritten(folder: Path, manifests: list[Manifest]) -> None:
    for manifest in manifests:
        path = rank_folder(folder, manifest.rank)
        assert read_manifest(path) == manifest
        assert broken_files(folder, manifest) == []
        names = {file.name for file in path.iterdir()}
        assert names == {".lock", "manifest.json", "journal.jsonl", *(file.name for file in manifest.all_files)}


def test_a_store_with_stacks_loads_and_streams(folder: Path, fresh: tuple[BuildJob, list[Manifest]]) -> None:
    job, _ = fresh
    check_loads(folder, job)
    for rank in range(2):
        readers = [
            ExpertReader(expert_sources(path, open_manifest(path, rank, 2, "hybrid")), "F32")
            for path in (folder, job.folder)
        ]
        for layer in (1, 2, 3):
            assert readers[0].arrays(layer) == readers[1].arrays(layer)
            stacked, records = (read_expert(reader, layer, 5) for reader in readers)
            assert all(map(np.array_equal, stacked, records))


def test_a_rewritten_store_equals_a_new_one(folder: Path, fresh: tuple[BuildJob, list[Manifest]]) -> None:
    job, manifests = fresh
    read = 0

    def count(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes

    sizes = rewrite.stacked_sizes(read_manifest(rank_folder(folder, 0)))
    assert rewrite_store(rank_folder(folder, 0), count) is None
    assert read == sum(sizes)
    check_loads(folder, job)  # one rank with records, one with stacks
    assert rewrite_store(rank_folder(folder, 1)) is None
    check_rewritten(folder, manifests)
    assert rewrite_store(rank_folder(folder, 1), count) is None
    assert read == sum(sizes)


class Interrupted(BaseException):
    """Raised to interrupt a rewrite."""


def interrupted(function: Callable[..., object], steps: Iterator[int], moment: int) -> Callable[..., object]:
    def call(*arguments: object, **options: object) -> object:
        if next(steps) == moment:
            raise Interrupted
        result = function(*arguments, **options)
        if next(steps) == moment:
            raise Interrupted
        return result

    return call


def interrupt(folder: Path, moment: int) -> bool:
    """Run a rewrite up to a moment; return whether it was interrupted. Files are not cleaned up, as after a kill."""
    steps = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_write_records", "_copy", "write_tags", "rename_durably"):
            patch.setattr(rewrite, name, interrupted(getattr(rewrite, name), steps, moment))
        patch.setattr(Manifest, "write", interrupted(Manifest.write, steps, moment))
        patch.setattr(Journal, "_append", interrupted(Journal._append, steps, moment))
        unlink = Path.unlink
        patch.setattr(
            Path, "unlink", interrupted(lambda path, missing_ok=False: unlink(path, missing_ok), steps, moment)
        )
        with contextlib.suppress(Interrupted):
            rewrite_store(folder)
            return False
    return True


@pytest.mark.slow
def test_a_rewrite_resumes_after_any_interruption(
    folder: Path, fresh: tuple[BuildJob, list[Manifest]], tmp_path: Path
) -> None:
    job, manifests = fresh
    expected = load(job.folder, 0)
    original = shutil.copytree(rank_folder(folder, 0), tmp_path / "original")
    moment = 1
    while True:
        shutil.rmtree(rank_folder(folder, 0))
        shutil.copytree(original, rank_folder(folder, 0))
        if not interrupt(rank_folder(folder, 0), moment):
            break
        found = load(folder, 0)
        assert all(mx.array_equal(found[name], expected[name]) for name in expected)
        assert rewrite_store(rank_folder(folder, 0)) is None
        check_rewritten(folder, manifests[:1])
        moment += 7
    assert moment > 50


REWRITE = """
import sys
from pathlib import Path
from kimi_mlx.store.rewrite import rewrite_store
print("ready", flush=True)
sys.stdin.readline()
rewrite_store(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_rewrite_resumes_after_a_kill(folder: Path, fresh: tuple[BuildJob, list[Manifest]]) -> None:
    path, expected = rank_folder(folder, 0), load(fresh[0].folder, 0)
    for milliseconds in (1, 4, 9, 15):
        command = [sys.executable, "-c", REWRITE, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(milliseconds / 1000)
            process.send_signal(signal.SIGKILL)
        found = load(folder, 0)
        assert all(mx.array_equal(found[name], expected[name]) for name in expected)
    assert rewrite_store(path) is None
    check_rewritten(folder, fresh[1][:1])


def test_a_damaged_file_is_not_rewritten(folder: Path) -> None:
    path = rank_folder(folder, 0) / "layer-002.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"layer-002\.safetensors` is damaged: its checksum is ") as raised:
        rewrite_store(rank_folder(folder, 0))
    assert "--verify" in (raised.value.hint or "")
    names = {file.name for file in rank_folder(folder, 0).glob("layer-*")}
    assert names == {
        "layer-000.safetensors",
        "layer-001.experts.safetensors",
        "layer-002.safetensors",
        "layer-003.safetensors",
    }


def prepare(stores: Path, **changes: bool) -> dict[str, object]:
    options = StoreOptions(KIMI_MINI, stores, 2)
    return prepare_stores(resolve_model_name(str(KIMI_MINI)), options, SingleGroup(), Silent(), **changes)


def test_the_download_command_rewrites(
    folder: Path, fresh: tuple[BuildJob, list[Manifest]], caplog: pytest.LogCaptureFixture
) -> None:
    stores = folder.parents[2]
    sizes = [size for rank in range(2) for size in rewrite.stacked_sizes(read_manifest(rank_folder(folder, rank)))]
    planned = prepare(stores, dry_run=True)
    assert planned["rewrite_bytes"] == sum(sizes)
    assert planned["fetch_bytes"] == 0
    assert max(sizes) <= planned["disk_needed_bytes"] <= 1.2 * max(sizes)  # pyright: ignore[reportOperatorIssue]
    assert prepare(stores)["state"] == "is on this machine and rewritten, with a record for each expert"
    check_rewritten(folder, fresh[1])
    assert prepare(stores)["state"] == "is on this machine"
    assert "rewrite_bytes" not in prepare(stores, dry_run=True)
    assert not caplog.records


def test_without_space_the_store_stays_as_it_is(
    folder: Path,
    fresh: tuple[BuildJob, list[Manifest]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(rewrite, "SPARE_BYTES", 1 << 62)
    assert prepare(folder.parents[2])["state"] == "is on this machine"
    assert "experts stay in stacks" in caplog.text
    assert "more, but its disk has" in caplog.text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    check_loads(folder, fresh[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB; only root can mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_a_disk_that_gets_full_or_is_read_only(
    folder: Path,
    small_disk: Path,
    fresh: tuple[BuildJob, list[Manifest]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, manifests = fresh
    stores = shutil.copytree(folder.parents[2], small_disk / "stores")
    copy = next(stores.glob("*/*/hybrid-2-*"))
    monkeypatch.setattr(rewrite, "SPARE_BYTES", 0)
    free = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 400_000))
    monkeypatch.setattr(rewrite, "check_space", lambda folder, needed: None)  # another process takes the space
    problem = rewrite_store(rank_folder(copy, 0))
    assert problem is not None
    assert "the disk is full" in problem.message
    assert not list(copy.rglob("*.part"))
    check_loads(copy, job)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    problem = rewrite_store(rank_folder(copy, 0))
    assert problem is not None
    assert "Read-only file system" in problem.message
    assert prepare(stores)["state"] == "is on this machine"
    check_loads(copy, job)
    reader = ExpertReader(expert_sources(copy, open_manifest(copy, 0, 2, "hybrid")), "F32")
    read_expert(reader, 1, 0)
    reader.close()
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert [rewrite_store(rank_folder(copy, rank)) for rank in range(2)] == [None, None]
    check_rewritten(copy, manifests)


def test_repair_of_an_earlier_store_rebuilds_only_the_broken_file(
    folder: Path, fresh: tuple[BuildJob, list[Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rank_folder(folder, 0) / "layer-002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("kimi_mlx.store.prepare.rewrite_store", lambda folder, progress: None)
    inode = (rank_folder(folder, 0) / "layer-001.safetensors").stat().st_ino
    assert prepare(folder.parents[2], verify=True)["broken"] == ["layer-002.safetensors"]
    names = sorted(file.name for file in rank_folder(folder, 0).glob("layer-*"))
    assert names[1:] == ["layer-001.safetensors", "layer-002.experts.safetensors", "layer-003.safetensors"]
    assert (rank_folder(folder, 0) / "layer-001.safetensors").stat().st_ino == inode
    check_loads(folder, fresh[0])
    monkeypatch.undo()
    prepare(folder.parents[2])
    check_rewritten(folder, fresh[1])


def test_a_build_that_an_earlier_version_began_is_finished(
    tmp_path: Path, fresh: tuple[BuildJob, list[Manifest]]
) -> None:
    job, manifests = fresh
    steps = itertools.count()

    def stop(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if next(steps) == 4:
                raise Interrupted
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted):
        patch.setattr(writer.RankWriter, "_finish", stop(writer.RankWriter._finish))
        build_with_stacks(KIMI_MINI, tmp_path, 2)
    (folder,) = tmp_path.glob("*/*/hybrid-2-*")
    for rank in range(2):
        make_format_2(rank_folder(folder, rank))
    assert list(folder.rglob("*.safetensors.part"))
    stacked = set(folder.rglob("layer-00[1-3].safetensors*"))
    assert stacked
    _, built = build_all(KIMI_MINI, tmp_path, 2)
    for rank in range(2):
        begun = {path.name.removesuffix(".part") for path in stacked if path.parent.name == f"rank-{rank}"}
        assert begun <= {file.name for file in built[rank].files}
    check_loads(folder, job)
    for rank in range(2):
        assert rewrite_store(rank_folder(folder, rank)) is None
    check_rewritten(folder, manifests)


def test_format_2_is_read_from_the_manifest(earlier: Path) -> None:
    """What an earlier version wrote: no records, and no field that it did not know."""
    path = next(earlier.glob("*/*/hybrid-2-*/rank-1/manifest.json"))
    value = json.loads(path.read_bytes())
    assert value["format"] == 2
    assert all("experts" not in file for file in value["files"])
    assert all(file.has_stacks == (number in (1, 2, 3)) for number, file in enumerate(read_manifest(path.parent).files))
    assert "mlp.experts" not in read_header(path.parent / "layer-001.safetensors")


def test_a_rewritten_store_is_loaded_by_the_same_command(folder: Path, fresh: tuple[BuildJob, list[Manifest]]) -> None:
    for rank in range(2):
        rewrite_store(rank_folder(folder, rank))
    with pytest.raises(WeightsError, match="is of rank 0 of 2"):
        load_share(folder, load_config(folder))
    assert checksums([read_manifest(rank_folder(folder, rank)) for rank in range(2)]) == checksums(
        read_manifests(fresh[0])
    )
