"""Experts read one by one equal those of a loaded layer; every fault of a file is an error that names the expert."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.cluster.ring.watch import STREAMED_STEP_S
from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from kimi_mlx.store.experts import expert_sources
from kimi_mlx.store.layer_file import open_layer_file
from kimi_mlx.store.store_folders import rank_folder
from kimi_mlx.store.stores import open_manifest
from kimi_mlx.uncached_file import UncachedFile
from kimi_mlx.weights.assemble import load_layer
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES, split_experts
from kimi_mlx.weights.expert_reader import MAX_DEPTH, PIECE_BYTES, READ_LIMIT_S, ExpertReader
from kimi_mlx.weights.expert_source import ExpertSource, checkpoint_sources
from kimi_mlx.weights.layer_plan import plan_layer
from kimi_mlx.weights.read_depth import DEFAULT_DEPTH
from kimi_mlx.weights.reader import open_checkpoint
from tests.checkpoints import FORMATS
from tests.experts import expected_arrays, new_destination, read_expert, resident_layers
from tests.fakes import KIMI_MINI

DTYPES = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
HINT = "run `kimi-mlx download`"


def open_checkpoint_experts(
    folder: Path, float_dtype: str = "F32", depth: int = DEFAULT_DEPTH, piece_bytes: int = PIECE_BYTES
) -> ExpertReader:
    checkpoint = open_checkpoint(folder, load_config(folder)).checkpoint
    return ExpertReader(checkpoint_sources(checkpoint, None, HINT), float_dtype, depth, piece_bytes)


def open_store_experts(stores: Path, source: Path, ranks: int, strategy: str, rank: int) -> ExpertReader:
    options = StoreOptions(source, stores, ranks, strategy)
    job = open_build_job(options, SingleGroup())
    build(options, job, SingleGroup())
    return ExpertReader(expert_sources(job.folder, open_manifest(job.folder, rank, ranks, strategy)), "F32")


def check(reader: ExpertReader, folder: Path, dtype: mx.Dtype, is_aligned: bool = True) -> None:
    checkpoint = open_checkpoint(folder, load_config(folder)).checkpoint
    layers = resident_layers(folder, None, dtype)
    assert set(layers) == set(reader.sources)
    assert checkpoint.config.n_routed_experts == next(iter(reader.sources.values())).num_experts
    for layer, weights in layers.items():
        for expert in range(checkpoint.config.n_routed_experts):
            found = read_expert(reader, layer, expert, is_aligned)
            for value, expected in zip(found, expected_arrays(weights, reader.arrays(layer), expert), strict=True):
                assert value.dtype == expected.dtype
                assert np.array_equal(value, expected)


@pytest.mark.parametrize("float_dtype", DTYPES)
@pytest.mark.parametrize("folder", [KIMI_MINI, FORMATS / "int4", FORMATS / "int4-k2.5"], ids=lambda path: path.name)
def test_experts_of_a_checkpoint(folder: Path, float_dtype: str) -> None:
    reader = open_checkpoint_experts(folder, float_dtype)
    check(reader, folder, DTYPES[float_dtype])
    reader.close()


@pytest.mark.parametrize("is_aligned", [False, True])
def test_experts_in_small_pieces(is_aligned: bool) -> None:
    reader = open_checkpoint_experts(FORMATS / "int4", piece_bytes=1, depth=3)
    check(reader, FORMATS / "int4", mx.float32, is_aligned)


def test_bytes_read_are_those_of_the_experts() -> None:
    reader = open_checkpoint_experts(KIMI_MINI)
    for expert in range(3):
        destination = new_destination(reader.arrays(1))
        read = reader.read(1, expert, destination)
        read.result()
        assert read.is_done
        assert read.seconds > 0
        assert read.num_bytes == reader.sources[1].expert_bytes == sum(array.nbytes for array in destination)
    assert reader.bytes_read == 3 * reader.sources[1].expert_bytes


def test_fp8_needs_a_store() -> None:
    with pytest.raises(WeightsError, match="needs a conversion of the tensor") as raised:
        open_checkpoint_experts(FORMATS / "fp8")
    assert raised.value.hint == HINT


def test_a_part_of_each_row_needs_a_store(tmp_path: Path) -> None:
    job = open_build_job(StoreOptions(KIMI_MINI, tmp_path, 2, "hybrid"), SingleGroup())
    checkpoint = open_checkpoint(KIMI_MINI, load_config(KIMI_MINI)).checkpoint
    with pytest.raises(WeightsError, match="needs a part of each row of the tensor"):
        checkpoint_sources(checkpoint, job.placement.shares[0], HINT)


@pytest.mark.parametrize("strategy", ["expert", "pipeline"])
def test_whole_experts_of_a_rank(strategy: str, tmp_path: Path) -> None:
    job = open_build_job(StoreOptions(KIMI_MINI, tmp_path, 2, strategy), SingleGroup())
    checkpoint = open_checkpoint(KIMI_MINI, load_config(KIMI_MINI)).checkpoint
    share = job.placement.shares[1]
    reader = ExpertReader(checkpoint_sources(checkpoint, share, HINT), "F32")
    layers = resident_layers(KIMI_MINI, share, mx.float32)
    assert set(layers) == set(reader.sources)
    for layer, weights in layers.items():
        for expert in range(share.experts.start, share.experts.stop):
            found = read_expert(reader, layer, expert)
            expected = expected_arrays(weights, reader.arrays(layer), expert)
            assert all(map(np.array_equal, found, expected))


def first_file(reader: ExpertReader, layer: int) -> Path:
    return reader.sources[layer].runs[0].files[0]


def copy_of_mini(tmp_path: Path) -> Path:
    folder = tmp_path / "mini"
    folder.mkdir()
    for path in KIMI_MINI.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_truncated_file(tmp_path: Path) -> None:
    reader = open_checkpoint_experts(copy_of_mini(tmp_path))
    path = first_file(reader, 1)
    os.truncate(path, 1 << 16)
    for _ in range(3):
        with pytest.raises(
            WeightsError, match=rf"expert 3 of layer 1: bytes \d+ to \d+ of `{path}` are not there: .* has 65536 bytes"
        ):
            read_expert(reader, 1, 3)


def test_a_file_that_is_removed_while_open(tmp_path: Path) -> None:
    folder = copy_of_mini(tmp_path)
    reader = open_checkpoint_experts(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    check(reader, KIMI_MINI, mx.float32)


def test_a_missing_file(tmp_path: Path) -> None:
    folder = copy_of_mini(tmp_path)
    sources: list[ExpertSource] = list(open_checkpoint_experts(folder).sources.values())
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(WeightsError, match="cannot be opened: No such file") as raised:
        ExpertReader(sources, "F32")
    assert raised.value.hint == HINT


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV, errno.ESTALE])
def test_an_error_of_the_disk(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint_experts(KIMI_MINI)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(WeightsError, match=rf"expert 2 of layer 1: bytes .* cannot be read: {os.strerror(code)}"):
        read_expert(reader, 1, 2)
    monkeypatch.undo()
    read_expert(reader, 1, 2)  # the disk is back


class Gate:
    """Replaces UncachedFile.read by one that waits until it is opened, and records its offsets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.offsets: list[int] = []
        original = UncachedFile.read

        def read(file: UncachedFile, buffers: list[np.ndarray], offset: int) -> int:
            self.offsets.append(offset)
            assert self.opened.wait(30)
            return original(file, buffers, offset)

        monkeypatch.setattr(UncachedFile, "read", read)

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.offsets) < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_reads_that_a_step_waits_for_come_before_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint_experts(KIMI_MINI, depth=1)
    runs, arrays = reader.sources[1].runs, reader.arrays(1)
    gate = Gate(monkeypatch)
    first = reader.read(1, 0, new_destination(arrays))
    gate.wait_for(1)
    guesses = [reader.read(1, expert, new_destination(arrays), is_guess=True) for expert in (1, 2, 3)]
    demanded = reader.read(1, 4, new_destination(arrays))
    guesses[2].promote()
    untouched = new_destination(arrays)
    cancelled = reader.read(1, 5, untouched, is_guess=True)
    assert cancelled.cancel()
    assert not first.cancel()
    gate.opened.set()
    for read in (first, *guesses, demanded):
        read.result()
    assert gate.offsets == [run.location(expert)[1] for expert in (0, 4, 3, 1, 2) for run in runs]
    assert cancelled.is_done
    with pytest.raises(WeightsError, match="expert 5 of layer 1 was cancelled"):
        cancelled.result()
    assert all((array.reshape(-1).view(np.uint8) == 0xAA).all() for array in untouched)
    assert not demanded.cancel()
    assert reader.bytes_read == 5 * demanded.num_bytes


def test_a_disk_that_does_not_answer_and_answers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint_experts(KIMI_MINI, depth=2)
    gate = Gate(monkeypatch)
    arrays = reader.arrays(1)
    read, destination = reader.read(1, 0, new_destination(arrays)), new_destination(arrays)
    waiting = reader.read(1, 1, destination, is_guess=True)
    gate.wait_for(2)
    with pytest.raises(WeightsError, match=r"did not answer within 0\.05 s when expert 0 of layer 1 was read at byte"):
        read.result(0.05)
    for _ in range(2):
        with pytest.raises(WeightsError, match="did not answer"):  # its threads may still write
            read_expert(reader, 1, 2)
    with pytest.raises(WeightsError, match="did not answer"):
        waiting.result()
    assert len(gate.offsets) == 2
    gate.opened.set()
    deadline = time.monotonic() + 30
    while True:
        try:
            found = read_expert(reader, 1, 1)
            break
        except WeightsError:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    expected = resident_layers(KIMI_MINI, None, mx.float32)[1]
    for value, array in zip(found, expected_arrays(expected, arrays, 1), strict=True):
        assert np.array_equal(value, array)
    assert all((array.reshape(-1).view(np.uint8) == 0xAA).all() for array in destination)
    reader.close()


def test_a_ring_names_the_disk_before_it_reports_a_stall() -> None:
    assert READ_LIMIT_S < STREAMED_STEP_S


def test_a_closed_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint_experts(KIMI_MINI, depth=1)
    gate = Gate(monkeypatch)
    reads = [reader.read(1, expert, new_destination(reader.arrays(1))) for expert in range(3)]
    gate.wait_for(1)
    closing = threading.Thread(target=reader.close)
    closing.start()
    for read in reads:  # the first is under way
        with pytest.raises(WeightsError, match="closed"):
            read.result()
    gate.opened.set()
    closing.join()
    with pytest.raises(WeightsError, match="closed"):
        read_expert(reader, 1, 0)


def test_a_reader_that_is_dropped_ends_its_threads() -> None:
    before = threading.active_count()
    reader = open_checkpoint_experts(KIMI_MINI, depth=4)
    assert threading.active_count() == before + MAX_DEPTH
    del reader
    assert threading.active_count() == before


@pytest.mark.parametrize("strategy", ["hybrid", "expert"])
def test_experts_of_a_store(strategy: str, tmp_path: Path) -> None:
    reader = open_store_experts(tmp_path, KIMI_MINI, 2, strategy, 1)
    job = open_build_job(StoreOptions(KIMI_MINI, tmp_path, 2, strategy), SingleGroup())
    share = job.placement.shares[1]
    layers = resident_layers(KIMI_MINI, share, mx.float32)
    for layer, weights in layers.items():
        for expert in range(share.experts.start, share.experts.stop):
            expected = expected_arrays(weights, reader.arrays(layer), expert)
            assert all(map(np.array_equal, read_expert(reader, layer, expert), expected))


def test_loading_without_routed_experts(tmp_path: Path) -> None:
    """Without them a stack has the shared experts only; everything else is equal."""
    config = load_config(KIMI_MINI)
    plan = split_experts(plan_layer(open_checkpoint(KIMI_MINI, config).checkpoint, 1, None))[0]
    rest = load_layer(open_checkpoint(KIMI_MINI, config), plan, mx.float32)
    whole = resident_layers(KIMI_MINI, None, mx.float32)[1]
    options = StoreOptions(KIMI_MINI, tmp_path, 1)
    job = open_build_job(options, SingleGroup())
    (manifest,) = build(options, job, SingleGroup())
    path = rank_folder(job.folder, 0) / manifest.files[1].name
    stored = open_layer_file(path, manifest.files[1], mx.float32, HINT, with_experts=False)
    for weights in (rest, stored):
        assert weights.entries.keys() == whole.entries.keys()
        assert weights.num_fused_shared == whole.num_fused_shared == 1
        for name, parts in whole.entries.items():
            arrays = [array for part in parts for array in part.arrays]
            if name in EXPERT_ENTRIES.values():
                arrays = [array[-1:] for array in arrays]
            found = [array for part in weights.entries[name] for array in part.arrays]
            assert [array.dtype for array in found] == [array.dtype for array in arrays]
            assert all(map(mx.array_equal, found, arrays))
