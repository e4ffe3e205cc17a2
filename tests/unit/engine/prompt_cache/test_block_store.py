"""The prompt cache on disk: restarts, broken files, its size, several ranks and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.engine.kv_cache_pool import KVCachePool
from kimi_mlx.engine.prompt_cache import block_folder, block_store, block_writer
from kimi_mlx.engine.prompt_cache.block_file import BLOCK_TOKENS
from kimi_mlx.engine.prompt_cache.block_store import HEADER_BYTES, BlockStore
from kimi_mlx.errors import RingError
from tests.examples import examples
from tests.unit.engine.cache_rows import MODEL, SHAPE, open_store, run_turn

FILE_BYTES = SHAPE.block_bytes + HEADER_BYTES

ROOT = Path(__file__).parents[4]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_folder, "LOCK_WAIT_S", 0.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def make_tokens(count: int, seed: int = 1) -> list[int]:
    """Return tokens that no other seed returns."""
    return [seed * 10_000 + at for at in range(count)]


def write(folder: Path, tokens: list[int]) -> None:
    """Store a conversation, as a process that then ends."""
    store = open_store(folder)
    run_turn(KVCachePool(MODEL, blocks=store), tokens)
    store.close()


def found(folder: Path, tokens: list[int]) -> int:
    """Return the number of cached tokens of a conversation in a new process."""
    store = open_store(folder, [])
    cached = run_turn(KVCachePool(MODEL, blocks=store), [*tokens, 1])
    store.close()
    return cached


def files(folder: Path) -> list[Path]:
    """Return the blocks in the order of writing."""
    return sorted(folder.glob("*/*/*.safetensors"), key=lambda file: file.stat().st_mtime_ns)


def test_complete_blocks_are_found_after_a_restart(tmp_path: Path) -> None:
    write(tmp_path, make_tokens(1000))
    assert len(files(tmp_path)) == 3
    assert found(tmp_path, make_tokens(1000)) == 768
    assert found(tmp_path, [*make_tokens(600), 7]) == 512  # blocks are shared; the rest is another one
    assert found(tmp_path, make_tokens(500, 2)) == 0
    folder = files(tmp_path)[0].parent
    assert (folder.stat().st_mode | folder.parent.stat().st_mode) & 0o077 == 0  # other users cannot read prompts


@pytest.mark.slow
def test_a_new_process_finds_them_and_shares_them(tmp_path: Path) -> None:
    write(tmp_path, make_tokens(1000))
    code = f"""if True:
        from pathlib import Path
        from tests.unit.engine.prompt_cache.test_block_store import found, make_tokens, write
        assert found(Path({str(tmp_path)!r}), make_tokens(1000)) == 768
        write(Path({str(tmp_path)!r}), [*make_tokens(1000), *make_tokens(100, 2)])
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert len(files(tmp_path)) == 4  # a turn writes only new blocks
    assert found(tmp_path, [*make_tokens(1000), *make_tokens(100, 2)]) == 1024


def test_pending_blocks_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_slow = [True]
    monkeypatch.setattr(
        block_writer, "write_block", lambda *args: [time.sleep(0.01) for _ in iter(lambda: is_slow[0], False)]
    )
    store = open_store(tmp_path)
    pool = KVCachePool(MODEL, blocks=store)
    run_turn(pool, make_tokens(1000))
    pool.clear()
    assert run_turn(pool, make_tokens(1000)) == 768
    is_slow.clear()
    is_slow.append(False)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def garble(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)


def overwrite(file: Path) -> None:
    file.write_bytes(os.urandom(FILE_BYTES))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def swap(file: Path) -> None:
    file.write_bytes(next(other for other in files(file.parents[2]) if other != file).read_bytes())


def widen(file: Path) -> None:
    mx.save_safetensors(str(file), {"rows": mx.zeros((2, BLOCK_TOKENS, 5))})


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [truncate, garble, overwrite, empty, swap, widen, Path.unlink])
@pytest.mark.parametrize("is_early", [True, False])
def test_a_broken_block_is_a_miss_and_is_written_again(
    tmp_path: Path, harm: Callable[[Path], None], is_early: bool
) -> None:
    write(tmp_path, make_tokens(1000))
    if is_early:
        harm(files(tmp_path)[1])
        assert found(tmp_path, make_tokens(1000)) == 256
    else:
        store = open_store(tmp_path, [])
        harm(files(tmp_path)[1])
        assert run_turn(KVCachePool(MODEL, blocks=store), make_tokens(1000)) == 256
        store.close()
    assert found(tmp_path, make_tokens(1000)) == 768


@pytest.mark.parametrize("harm", [garble, replace_by_folder])
def test_a_broken_block_is_reported_once_and_not_read_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    write(tmp_path, make_tokens(1000))
    warnings: list[str] = []
    store = open_store(tmp_path, warnings)
    harm(files(tmp_path)[1])  # a folder cannot be deleted like a file, so it stays
    pool = KVCachePool(MODEL, blocks=store)
    for _ in range(3):
        assert len(pool.acquire(make_tokens(1000))[0].tokens) == 256
        pool.discard_all()
    assert len(warnings) == 1
    assert "it is removed, and its tokens are computed again" in warnings[0]
    store.close()


@examples(60)
@given(at=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_damaged_header_is_a_miss(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    folder = tmp_path_factory.mktemp("cache")
    write(folder, make_tokens(300))
    [file] = files(folder)
    data = bytearray(file.read_bytes())
    header_bytes = len(data) - SHAPE.block_bytes
    data[at % header_bytes] = value
    file.write_bytes(data)
    assert found(folder, make_tokens(300)) in (0, 256)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "another model"},
        {"share": "rank-1"},
        {"stamp": "rewritten"},
        {"shape": replace(SHAPE, dtype=mx.float16)},
        {"shape": replace(SHAPE, layers=1)},
    ],
)
def test_blocks_of_another_model_are_not_used(tmp_path: Path, change: dict[str, str]) -> None:
    write(tmp_path, make_tokens(1000))
    store = open_store(tmp_path, [], **change)  # pyright: ignore[reportArgumentType]
    blocks = store.find(make_tokens(1000))
    assert not blocks or "shape" in change
    for block in blocks[:1]:
        assert store.shape != SHAPE
        with pytest.raises(Exception, match="rows are"):
            store.read(block, make_tokens(256))
    store.close()


def test_other_files_are_kept_and_incomplete_files_removed(tmp_path: Path) -> None:
    write(tmp_path, make_tokens(1000))
    folder = files(tmp_path)[0].parent
    other, part = folder / "notes.txt", folder / f"{files(tmp_path)[0].name}.123.part"
    for file in (other, part):
        file.write_text("x")
    assert found(tmp_path, make_tokens(1000)) == 768
    assert other.exists()
    assert not part.exists()


def test_files_with_bogus_names_are_removed(tmp_path: Path) -> None:
    write(tmp_path, make_tokens(1000))
    first = files(tmp_path)[0]
    name, root = first.stem.split("-")
    for garbage in (f"{root}-{root}", f"{root}-{name}", f"{'0' * 32}-{'1' * 32}", f"{'1' * 32}-{'0' * 32}"):
        (first.parent / f"{garbage}.safetensors").write_bytes(b"x" * FILE_BYTES)
    assert found(tmp_path, make_tokens(1000)) == 768
    assert len(files(tmp_path)) == 3


def test_size_is_bounded_and_chains_are_evicted_from_their_ends(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=6 * FILE_BYTES)
    assert store.capacity == 6
    pool = KVCachePool(MODEL, blocks=store)
    run_turn(pool, make_tokens(1024, 1))
    run_turn(pool, make_tokens(512, 2))
    run_turn(pool, make_tokens(1024, 1))  # wanted again: 2 is older
    run_turn(pool, make_tokens(300, 3))
    lengths = {seed: len(store.find(make_tokens(1024, seed))) for seed in (1, 2, 3)}
    assert lengths == {1: 4, 2: 1, 3: 1}
    run_turn(pool, make_tokens(1024, 4))
    lengths = {seed: len(store.find(make_tokens(1024, seed))) for seed in (1, 2, 3, 4)}
    assert lengths == {1: 1, 2: 0, 3: 1, 4: 4}
    run_turn(pool, make_tokens(10 * 256, 5))  # longer than the capacity
    assert len(store.find(make_tokens(10 * 256, 5))) == len(store) == 6
    store.close()
    assert len(files(tmp_path)) == 6
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 6 * FILE_BYTES


def test_time_of_last_use_survives_a_restart(tmp_path: Path) -> None:
    for number, seed in enumerate((1, 2, 1)):
        write(tmp_path, make_tokens(512, seed))
        for file in files(tmp_path):  # an hour passes
            os.utime(file, (0, file.stat().st_mtime - 3600 * (number < 2)))
    store = open_store(tmp_path, max_bytes=3 * FILE_BYTES)
    assert [len(store.find(make_tokens(512, seed))) for seed in (1, 2)] == [2, 1]
    store.close()
    assert len(files(tmp_path)) == 3


def test_smaller_limit_evicts_other_models(tmp_path: Path) -> None:
    for key in ("old", "new"):
        store = open_store(tmp_path, key=key)
        run_turn(KVCachePool(MODEL, blocks=store), make_tokens(1024))
        store.close()
        os.utime(files(tmp_path)[-1].parent, (0, time.time() - 3600 * (key == "old")))
    store = open_store(tmp_path, key="now", max_bytes=10 * FILE_BYTES)
    assert len(files(tmp_path)) == 4  # other models may use half of the limit
    assert store.capacity == 6
    assert len(open_store(tmp_path, key="new").find(make_tokens(1024))) == 4


def test_blocks_in_use_by_another_process_are_kept(tmp_path: Path) -> None:
    busy = open_store(tmp_path, key="busy")
    run_turn(KVCachePool(MODEL, blocks=busy), make_tokens(1024))
    assert busy._writer.flush(10)
    store = open_store(tmp_path, max_bytes=5 * FILE_BYTES)
    assert store.capacity == 1
    busy.close()


def test_second_process_on_the_same_folder_runs_without_a_store(tmp_path: Path) -> None:
    first, warnings = open_store(tmp_path), []
    second = open_store(tmp_path, warnings)
    assert second.capacity == 0
    assert len(warnings) == 1
    assert "another process" in warnings[0]
    pools = [KVCachePool(MODEL, blocks=store) for store in (first, second)]
    for pool in pools:
        assert run_turn(pool, make_tokens(1000)) == 0
        assert run_turn(pool, make_tokens(1000)) == 999  # still cached in memory
    for store in (first, second):
        store.close()
    assert found(tmp_path, make_tokens(1000)) == 768


def test_folder_that_cannot_be_created_warns_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    warnings: list[str] = []
    pool = KVCachePool(MODEL, blocks=open_store(tmp_path / "file" / "cache", warnings))
    assert [run_turn(pool, make_tokens(1000)) for _ in range(2)] == [0, 999]
    assert len(warnings) == 1
    assert "Not a directory" in warnings[0]


def test_full_disk_stops_only_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    store = open_store(tmp_path, warnings)
    pool = KVCachePool(MODEL, blocks=store)
    run_turn(pool, make_tokens(512))
    assert store._writer.flush(10)
    monkeypatch.setattr(block_writer, "RESERVE_BYTES", 10**18)
    run_turn(pool, make_tokens(1000))
    assert store._writer.flush(10)
    pool.clear()
    assert run_turn(pool, make_tokens(1000)) == 512
    run_turn(pool, make_tokens(1000, 2))
    store.close()
    assert len(warnings) == 1
    monkeypatch.setattr(block_store, "RESERVE_BYTES", 10**18)
    assert open_store(tmp_path, warnings).capacity == 0
    assert "no room" in warnings[1]


def test_slow_disk_does_not_block_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_store, "MAX_NEW_BLOCKS", 2)
    end_of_write = threading.Event()
    ended: list[bool] = []
    monkeypatch.setattr(block_writer, "write_block", lambda *args: ended.append(end_of_write.wait(30)))
    warnings: list[str] = []
    pool = KVCachePool(MODEL, blocks=open_store(tmp_path, warnings))
    for seed in range(5):
        run_turn(pool, make_tokens(1024, seed))
    assert not ended
    end_of_write.set()
    assert len(warnings) == 1
    assert "too slow" in warnings[0]


def test_blocks_with_nan_are_not_written(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    rows = mx.zeros((SHAPE.layers, 512, SHAPE.width))
    rows[1, 300, 1] = mx.nan
    store.put(make_tokens(512), lambda start, stop: rows[:, start:stop])
    store.close()
    assert len(files(tmp_path)) == 1


def test_ranks_agree_on_their_common_blocks(tmp_path: Path) -> None:
    for share, length in (("rank-0", 1024), ("rank-1", 700)):
        store = open_store(tmp_path, share=share)
        run_turn(KVCachePool(MODEL, blocks=store), make_tokens(length))
        store.close()
    stores = [open_store(tmp_path, share=share) for share in ("rank-0", "rank-1")]
    agree(stores, capacity=3)
    pools = [KVCachePool(MODEL, blocks=store) for store in stores]
    assert [run_turn(pool, make_tokens(1024)) for pool in pools] == [512, 512]
    assert [run_turn(pool, make_tokens(1024, 2)) for pool in pools] == [0, 0]
    assert stores[0].names() == stores[1].names()
    for store in stores:
        store.close()
    assert len(files(tmp_path)) == 6


def agree(stores: list[BlockStore], capacity: int = 100) -> None:
    """Agree on the blocks, as the ranks of a ring do."""
    common = set.intersection(*(set(store.names()) for store in stores))
    names = [name for name in stores[0].names() if name in common]
    for store in stores:
        store.keep(names, min(capacity, *(store.capacity for store in stores)))


def test_lost_block_stops_the_ring_and_is_recomputed_after_the_restart(tmp_path: Path) -> None:
    write(tmp_path, make_tokens(1000))
    store = open_store(tmp_path)
    agree([store])
    garble(files(tmp_path)[1])
    with pytest.raises(RingError, match="checksum is wrong"):
        KVCachePool(MODEL, blocks=store).acquire(make_tokens(1000))
    store.close()
    assert found(tmp_path, make_tokens(1000)) == 256


@examples(25)
@given(
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 3)), max_size=8),
    capacity=st.integers(1, 6),
    lost=st.lists(st.integers(0, 20), max_size=2),
)
def test_ranks_keep_the_same_index(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, int, int]], capacity: int, lost: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    for _ in range(2):  # and again after a restart
        stores = [open_store(folder, share=f"rank-{rank}") for rank in range(2)]
        agree(stores, capacity)
        pools = [KVCachePool(MODEL, 2048, store) for store in stores]
        for seed, common, own in turns:
            prompt = [*make_tokens(common * 200, 9), *make_tokens(own * 200, seed), 1]
            assert len({run_turn(pool, prompt) for pool in pools}) == 1
            assert stores[0].names() == stores[1].names()
            assert len(stores[0]) <= capacity
        for store in stores:
            store.close()
        there = files(folder)
        for at in lost:
            if there:
                there[at % len(there)].unlink(missing_ok=True)


def test_usage_counts_tokens_in_memory_and_on_disk(tmp_path: Path) -> None:
    tokens = make_tokens(600)
    write(tmp_path, tokens)
    store = open_store(tmp_path)
    pool = KVCachePool(MODEL, blocks=store)
    assert (pool.usage.prompt_tokens, pool.usage.disk_blocks) == (0, 2)
    run_turn(pool, [*tokens, 1])  # two blocks of 256 from disk
    assert pool.usage == replace(pool.usage, prompt_tokens=601, memory_hit_tokens=0, disk_hit_tokens=512)
    run_turn(pool, [*tokens, 1, 2])  # all from memory
    run_turn(pool, make_tokens(300, seed=2))  # nothing
    usage = pool.usage
    assert (usage.prompt_tokens, usage.memory_hit_tokens, usage.disk_hit_tokens) == (601 + 602 + 300, 601, 512)
    assert (usage.disk_blocks, usage.disk_bytes) == (3, 3 * SHAPE.block_bytes)
    store.close()
    size = sum(file.stat().st_size for file in files(tmp_path))
    assert usage.disk_bytes < size <= usage.disk_bytes + 3 * HEADER_BYTES
    assert KVCachePool(MODEL).usage.disk_limit_bytes is None
