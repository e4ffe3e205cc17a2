"""Shard stores: they hold each rank's share exactly, resume after any interruption, and damage is detected."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from kimi_mlx.bench.workloads import synthetic_config, write_synthetic
from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.parallel.placement import STRATEGIES
from kimi_mlx.runtime.load import load_share
from kimi_mlx.store import journal, writer
from kimi_mlx.store.assign import assign_files
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.disk import check_space
from kimi_mlx.store.download import StoreOptions, build, find_built_stores, open_build_job
from kimi_mlx.store.folder_source import FolderSource
from kimi_mlx.store.journal import Journal
from kimi_mlx.store.locate import find_local_model
from kimi_mlx.store.manifest import read_manifest
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.store.store_folders import rank_folder
from kimi_mlx.store.stores import broken_files, find_stores, load_store, open_manifest
from kimi_mlx.store.transfers import split_into_chunks
from kimi_mlx.store.writer import RankWriter
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.expert_plan import RECORD_ALIGNMENT
from kimi_mlx.weights.plan import as_shape3
from tests.checkpoints import FORMATS, load_golden, quantize_checkpoint, write_checkpoint
from tests.examples import examples
from tests.fakes import KIMI_MINI, FixedGather
from tests.stores import build_all, checksums


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts and experts with different quantization, so that some are not fused."""
    folder, golden = tmp_path_factory.mktemp("overrides"), load_golden("k2")
    own = {
        "model.layers.1.mlp.shared_experts.gate_proj": {"bits": 8, "group_size": 32},
        "model.layers.1.self_attn.kv_a_proj_with_mqa": {"bits": 8, "group_size": 64},
        "lm_head": False,
    }
    source = write_checkpoint(folder / "float", golden.config, golden.seed)
    return quantize_checkpoint(source, folder / "quantized", bits=4, group_size=32, overrides=own)


@pytest.mark.parametrize(
    ("name", "ranks", "strategy"),
    [
        ("mini", 2, "hybrid"),
        ("mini", 3, "pipeline:1:2:1"),
        ("mini", 3, "expert:2:1:1"),
        ("overrides", 3, "hybrid"),
        ("overrides", 2, "expert:3:1"),
        ("overrides", 2, "tensor"),
        ("bf16", 3, "hybrid"),
        ("bf16", 2, "tensor:3:1"),
        ("int4", 2, "hybrid"),
        ("int4", 2, "expert"),
        ("int4-k2.5", 1, "hybrid"),
        ("int4-k2.5", 2, "pipeline"),
    ],
)
def test_a_store_equals_the_share_loaded_from_the_checkpoint(
    name: str, ranks: int, strategy: str, overrides: Path, tmp_path: Path
) -> None:
    source = {"mini": KIMI_MINI, "overrides": overrides}.get(name, FORMATS / name)
    job, _ = build_all(source, tmp_path, ranks, strategy)
    config = load_config(source)
    for rank, share in enumerate(job.placement.shares):
        stored = dict(tree_flatten(load_stored(job, rank).parameters()))
        loaded = dict(tree_flatten(load_model(source, config, mx.float32, share).parameters()))
        assert stored.keys() == loaded.keys()
        assert all(
            stored[key].dtype == loaded[key].dtype and mx.array_equal(stored[key], loaded[key]) for key in loaded
        )


def load_stored(job: BuildJob, rank: int) -> Model:
    manifest = open_manifest(job.folder, rank, job.placement.world_size, job.placement.strategy)
    return load_store(job.folder, manifest, load_config(job.folder), mx.float32)


def test_fp8_is_stored_in_the_compute_type(tmp_path: Path) -> None:
    source = FORMATS / "fp8"
    job, manifests = build_all(source, tmp_path, 2)
    dtypes = {
        a.dtype for f in manifests[0].files for parts in f.entries.values() for w in parts for a in w.arrays.values()
    }
    assert dtypes == {"BF16", "F32"}  # F32: only the bias of the router
    stored = dict(tree_flatten(load_stored(job, 0).parameters()))
    loaded = dict(
        tree_flatten(load_model(source, load_config(source), mx.float32, job.placement.shares[0]).parameters())
    )
    for name, exact in loaded.items():
        rounded = exact if name.endswith("e_score_correction_bias") else exact.astype(mx.bfloat16).astype(mx.float32)
        assert mx.array_equal(stored[name], rounded), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["mini", "overrides", "fp8", "int4"])
def test_every_array_is_covered_exactly_once(name: str, strategy: str, overrides: Path, tmp_path: Path) -> None:
    source = {"mini": KIMI_MINI, "overrides": overrides}.get(name, FORMATS / name)
    job = open_build_job(StoreOptions(source, tmp_path, 2, strategy), SingleGroup())
    for file in range(job.num_layers + 1):
        for rank in range(2):
            for array_name, array in job.plan(rank, file).arrays():
                covered = np.zeros(as_shape3(array.shape), np.uint8)
                for copy in array.copies:
                    members, rows, columns = copy.shape
                    assert columns == covered.shape[2]
                    covered[copy.member : copy.member + members, copy.row : copy.row + rows] += 1
                assert (covered == 1).all(), array_name


@pytest.mark.parametrize("strategy", ["pipeline", "pipeline:1:2"])
def test_a_pipeline_store_has_only_its_layers_and_needs_only_their_files(strategy: str, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    write_synthetic(source, synthetic_config("deep", num_hidden_layers=4))  # one file per layer, and one for the top
    job, manifests = build_all(source, tmp_path / "stores", 2, strategy)
    for rank, (share, manifest) in enumerate(zip(job.placement.shares, manifests, strict=True)):
        layers = range(share.layers.start, share.layers.stop)
        stored = [number for number, file in enumerate(manifest.files) if file.entries]
        assert stored == [*layers, *([job.num_layers] if rank == 0 else [])]
        sources = {job.files[number] for files in job.sources_of_file(rank) for number in files}
        assert len(sources) == len(stored)
        sizes = {path.name: path.stat().st_size for path in rank_folder(job.folder, rank).glob("*.safetensors")}
        held_bytes = sum(job.source.contents.sizes[name] for name in sources)
        padding = sum(
            file.experts.num_experts * RECORD_ALIGNMENT for file in manifest.files if file.experts is not None
        )
        assert 0.99 * held_bytes <= sum(sizes.values()) <= 1.01 * held_bytes + 2 * padding
        assert broken_files(job.folder, manifest) == []


def test_repair_in_a_pipeline_fetches_only_the_files_of_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "checkpoint"
    write_synthetic(source, synthetic_config("deep", num_hidden_layers=4))
    options = StoreOptions(source, tmp_path / "stores", 2, "pipeline:1:3")
    job, before = build_all(source, tmp_path / "stores", 2, "pipeline:1:3")
    broken = rank_folder(job.folder, 1) / "layer-002.experts.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"\xff")
    assert [broken_files(job.folder, manifest) for manifest in before] == [[], [broken.name]]
    fetched = watch_fetches(monkeypatch)
    repaired = build(options, open_build_job(options, SingleGroup()), SingleGroup(), discard={1: [broken.name]})
    assert checksums(repaired) == checksums(before)
    assert fetched == [job.files[number] for number in sorted(job.sources_of_file(1)[2])]
    assert len(fetched) == 1


class Interrupted(BaseException):
    """Raised to interrupt a build."""


@pytest.fixture(scope="module")
def uninterrupted(overrides: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Checksums of an uninterrupted build."""
    return checksums(build_all(overrides, tmp_path_factory.mktemp("uninterrupted"), 2)[1])


@pytest.mark.slow
@settings(examples(10), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moments=st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_a_build_resumes_after_any_interruption(
    moments: list[int],
    overrides: Path,
    uninterrupted: list[list[str]],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores = tmp_path_factory.mktemp("stores")
    for moment in moments:
        steps = itertools.count(1)
        with monkeypatch.context() as patch, contextlib.suppress(Interrupted):
            for name in ("write", "commit", "complete", "_create", "_finish"):
                patch.setattr(RankWriter, name, interrupted(getattr(RankWriter, name), steps, moment))
            patch.setattr(Journal, "_append", interrupted(Journal._append, steps, moment))
            for module in (journal, writer):
                patch.setattr(module, "rename_durably", interrupted(module.rename_durably, steps, moment))
            build_all(overrides, stores, 2)
    _, resumed = build_all(overrides, stores, 2)
    assert checksums(resumed) == uninterrupted


def interrupted(method: Callable[..., object], steps: Iterator[int], moment: int) -> Callable[..., object]:
    """Return the method with an interruption at one step."""

    def call(*arguments: object) -> object:
        if next(steps) == moment:
            raise Interrupted
        return method(*arguments)

    return call


def watch_fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    fetched: list[str] = []
    fetch = FolderSource.fetch

    def watched(self: FolderSource, file: str, progress: Callable[[int], None], stop: threading.Event) -> Path:
        fetched.append(file)
        return fetch(self, file, progress, stop)

    monkeypatch.setattr(FolderSource, "fetch", watched)
    return fetched


def test_repair_rebuilds_only_broken_files(overrides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, before = build_all(overrides, tmp_path, 2)
    top = rank_folder(job.folder, 1) / "top.safetensors"
    data = bytearray(top.read_bytes())
    data[-1] ^= 1
    top.write_bytes(data)
    assert [broken_files(job.folder, manifest) for manifest in before] == [[], ["top.safetensors"]]
    fetched = watch_fetches(monkeypatch)
    inode = (rank_folder(job.folder, 1) / "layer-000.safetensors").stat().st_ino
    again = open_build_job(StoreOptions(overrides, tmp_path, 2), SingleGroup())
    repaired = build(StoreOptions(overrides, tmp_path, 2), again, SingleGroup(), discard={1: ["top.safetensors"]})
    assert checksums(repaired) == checksums(before)
    assert {again.files[number] for number in again.sources_of_file(1)[again.num_layers]} == set(fetched)
    assert (rank_folder(job.folder, 1) / "layer-000.safetensors").stat().st_ino == inode


def test_a_complete_store_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = build_all(KIMI_MINI, tmp_path, 2)
    fetched = watch_fetches(monkeypatch)
    _, after = build_all(KIMI_MINI, tmp_path, 2)
    assert after == before
    assert fetched == []


def damage_size(folder: Path) -> str:
    file = folder / "layer-001.experts.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return r"layer-001\.experts\.safetensors` has \d+ bytes, not \d+"


def damage_missing(folder: Path) -> str:
    (folder / "top.safetensors").unlink()
    return r"top\.safetensors` is missing"


def damage_header(folder: Path) -> str:
    file = folder / "layer-000.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    return r"layer-000\.safetensors` cannot be read"


def damage_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("{")
    return r"manifest\.json` cannot be read"


def damage_format(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    return "has format 1, this version reads 2 to 3"


def damage_shape(folder: Path) -> str:
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    manifest["files"][0]["entries"]["self_attn.o_proj"][0]["arrays"]["weight"]["shape"][0] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "does not have the `self_attn.o_proj` that its manifest lists"


@pytest.mark.parametrize(
    "damage", [damage_size, damage_missing, damage_header, damage_manifest, damage_format, damage_shape]
)
def test_load_reports_damage(damage: Callable[[Path], str], tmp_path: Path) -> None:
    job, _ = build_all(KIMI_MINI, tmp_path, 1)
    message = damage(rank_folder(job.folder, 0))
    with pytest.raises(WeightsError, match=message) as raised:
        load_share(job.folder, load_config(job.folder))
    assert "download" in (raised.value.hint or "")


def test_another_placement_is_refused(tmp_path: Path) -> None:
    job, _ = build_all(KIMI_MINI, tmp_path, 2, "expert:2:1")
    for strategy in ("expert", "hybrid", "expert:1:2"):
        with pytest.raises(WeightsError, match=rf"in the placement `expert:2:1`, not of rank 0 of 2 in `{strategy}`"):
            open_manifest(job.folder, 0, 2, strategy)


@pytest.mark.parametrize("strategy", ["expert:1:1", "expert:6:6", "pipeline:4:2", "hybrid:1:1"])
def test_equivalent_spellings_of_a_strategy_find_the_store(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path))
    job, _ = build_all(KIMI_MINI, tmp_path, 2, strategy)
    target = resolve_model_name(str(KIMI_MINI))
    assert find_local_model(target, 2, strategy) == job.folder
    assert find_local_model(target, 2, job.placement.strategy) == job.folder
    found = find_built_stores(StoreOptions(KIMI_MINI, tmp_path, 2, strategy), SingleGroup())
    assert found is not None
    assert found.folder == job.folder


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    job, _ = build_all(KIMI_MINI, tmp_path, 2)
    with pytest.raises(WeightsError, match=r"is of rank 0 of 2 .* not of rank 0 of 1"):
        load_share(job.folder, load_config(job.folder))


def test_ranks_with_different_revisions_refuse_to_start(tmp_path: Path) -> None:
    job, _ = build_all(KIMI_MINI, tmp_path, 2)
    other = FixedGather(rank=0, size=2, others=[np.zeros(32, np.uint8)])
    with pytest.raises(WeightsError, match="rank 1 has another revision or placement"):
        load_share(job.folder, load_config(job.folder), group=other)


def test_two_builds_at_once(tmp_path: Path) -> None:
    options = StoreOptions(KIMI_MINI, tmp_path, 1)
    job = open_build_job(options, SingleGroup())
    other = RankWriter(
        rank_folder(job.folder, 0),
        job.source.contents.origin,
        job.placement,
        0,
        job.num_layers,
        None,
        lambda n: job.plan(0, n),
        job.sources_of_file(0),
    )
    with other, pytest.raises(WeightsError, match="another process is building"):
        build(options, job, SingleGroup())
    build(options, job, SingleGroup())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError, match=r"needs .* more, but its disk has"):
        check_space(tmp_path, 2**62)
    monkeypatch.setattr("kimi_mlx.store.rounds.check_space", lambda folder, needed: check_space(folder, 2**62))
    with pytest.raises(WeightsError, match=r"needs .* more"):
        build_all(KIMI_MINI, tmp_path, 2)
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_stores_are_found_by_repository(tmp_path: Path) -> None:
    job, manifests = build_all(KIMI_MINI, tmp_path, 2)
    (store,) = find_stores(tmp_path, str(KIMI_MINI))
    assert (store.folder, store.ranks, store.origin) == (job.folder, (0, 1), manifests[0].origin)
    assert read_manifest(rank_folder(store.folder, 1)) == manifests[1]
    assert find_stores(tmp_path, "owner/other") == []


@given(sizes=st.dictionaries(st.integers(0, 100), st.integers(0, 10**10), max_size=40), processes=st.integers(1, 8))
def test_files_are_assigned_evenly(sizes: dict[int, int], processes: int) -> None:
    assignments = assign_files(sizes, processes)
    assert sorted(number for files in assignments for number in files) == sorted(sizes)
    loads = [sum(sizes[number] for number in files) for files in assignments]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5)), limit=st.integers(1, 200))
def test_chunks_are_the_bytes_in_order(shape: tuple[int, int, int], limit: int) -> None:
    wide = np.arange(np.prod(shape) * 2, dtype=np.uint32).reshape(*shape[:2], -1)
    part = wide[..., : shape[2]]
    joined = b"".join(chunk.tobytes() for _, chunk in split_into_chunks(part, limit))
    offsets = [offset for offset, _ in split_into_chunks(part, limit)]
    assert joined == np.ascontiguousarray(part).tobytes()
    assert offsets == sorted(set(offsets))


def test_a_store_of_a_folder_is_found_until_the_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))
    folder = shutil.copytree(FORMATS / "bf16", tmp_path / "model")
    job, _ = build_all(folder, tmp_path / "stores", 2)
    target = resolve_model_name(str(folder))
    assert find_local_model(target, 2) == job.folder
    assert find_local_model(target, 3) == folder
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    assert open_build_job(StoreOptions(copy, tmp_path, 2), SingleGroup()).source.contents.origin.commit == commit_of(
        job
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1234.0}))
    assert find_local_model(target, 2) == folder
    assert find_built_stores(StoreOptions(folder, tmp_path / "stores", 2), SingleGroup()) is None


def commit_of(job: BuildJob) -> str:
    return job.source.contents.origin.commit


def test_an_unexpected_error_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object) -> Path:
        raise MemoryError("no more")

    monkeypatch.setattr(FolderSource, "fetch", fetch)
    with pytest.raises(WeightsError, match="the build failed: MemoryError"):
        build_all(KIMI_MINI, tmp_path, 2)


def test_the_number_of_open_files_is_limited(overrides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, uninterrupted = build_all(overrides, tmp_path / "uninterrupted", 2)
    monkeypatch.setattr("kimi_mlx.store.writer.MAX_OPEN_FILES", 1)
    _, manifests = build_all(overrides, tmp_path / "one", 2)
    assert checksums(manifests) == checksums(uninterrupted)
