"""Experts as records: any fault of a file is an error that names it, and no read returns bytes of another expert."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.load import load_share
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.experts import expert_sources
from kimi_mlx.store.store_folders import rank_folder
from kimi_mlx.store.stores import open_manifest
from kimi_mlx.uncached_file import IO_ALIGNMENT, UncachedFile
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.expert_plan import RECORD_ALIGNMENT
from kimi_mlx.weights.expert_reader import ExpertReader
from kimi_mlx.weights.expert_tag import TAG_BYTES, ExpertTag, describe_tag
from tests.checkpoints import FORMATS, load_golden, quantize_checkpoint, write_checkpoint
from tests.experts import expected_arrays, read_expert, resident_layers
from tests.fakes import KIMI_MINI
from tests.stores import build_all

DTYPES = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}


def open_reader(job: BuildJob, rank: int = 0, float_dtype: str = "F32", piece_bytes: int = 1 << 20) -> ExpertReader:
    manifest = open_manifest(job.folder, rank, job.placement.world_size, job.placement.strategy)
    return ExpertReader(expert_sources(job.folder, manifest), float_dtype, piece_bytes=piece_bytes)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gate and up with different quantizations, so that they are not fused."""
    folder, golden = tmp_path_factory.mktemp("overrides"), load_golden("k2")
    own: dict[str, dict[str, int] | bool] = {"model.layers.1.mlp.switch_mlp.up_proj": {"bits": 6, "group_size": 32}}
    source = write_checkpoint(folder / "float", golden.config, golden.seed, "bfloat16")
    return quantize_checkpoint(source, folder / "quantized", bits=4, group_size=32, overrides=own)


@pytest.mark.parametrize(
    ("name", "strategy", "ranks", "float_dtype"),
    [
        ("mini", "hybrid", 1, "F32"),
        ("mini", "hybrid:2:1", 2, "F32"),
        ("mini", "expert:3:1", 2, "F32"),
        ("mini", "pipeline", 2, "F32"),
        ("overrides", "tensor", 2, "F32"),
        ("int4", "hybrid", 2, "BF16"),
        ("int4", "expert", 2, "F32"),
        ("bf16", "hybrid", 2, "F32"),
    ],
)
def test_records_equal_the_share_of_the_checkpoint(
    name: str, strategy: str, ranks: int, float_dtype: str, overrides: Path, tmp_path: Path
) -> None:
    source = {"mini": KIMI_MINI, "overrides": overrides}.get(name, FORMATS / name)
    job, manifests = build_all(source, tmp_path, ranks, strategy)
    for rank, share in enumerate(job.placement.shares):
        layers = resident_layers(source, share, DTYPES[float_dtype])
        reader = open_reader(job, rank, float_dtype, piece_bytes=IO_ALIGNMENT)
        assert set(reader.sources) == {number for number in layers if manifests[rank].files[number].experts is not None}
        for layer, expert_source in reader.sources.items():
            assert expert_source.expert_bytes % RECORD_ALIGNMENT == 0
            assert expert_source.runs[0].offsets[0] % RECORD_ALIGNMENT == 0
            for index, expert in enumerate((share.experts.start, share.experts.start + 1, share.experts.stop - 1)):
                expected = expected_arrays(layers[layer], reader.arrays(layer), expert)
                found = read_expert(reader, layer, expert, is_aligned=index % 2 == 0)
                assert all(map(np.array_equal, found, expected))
        reader.close()


def test_fp8_becomes_records_in_the_compute_type(tmp_path: Path) -> None:
    source = FORMATS / "fp8"
    job, _ = build_all(source, tmp_path, 2)
    layers = resident_layers(source, job.placement.shares[1], mx.float32)
    reader = open_reader(job, 1)
    for layer, weights in layers.items():
        for value, exact in zip(
            read_expert(reader, layer, 0), expected_arrays(weights, reader.arrays(layer), 0), strict=True
        ):
            assert mx.array_equal(mx.array(value), mx.array(exact).astype(mx.bfloat16).astype(mx.float32))


@pytest.fixture
def stored(tmp_path: Path) -> BuildJob:
    """Stores of two ranks with equal sizes."""
    return build_all(KIMI_MINI, tmp_path, 2)[0]


def layer_path(job: BuildJob, layer: int, rank: int = 0) -> Path:
    return rank_folder(job.folder, rank) / f"layer-{layer:03}.experts.safetensors"


def swap(first: Path, second: Path) -> None:
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def swap_layers(job: BuildJob) -> str:
    swap(layer_path(job, 1), layer_path(job, 2))
    return r"layer-001\.experts\.safetensors` has expert 3 of layer 2 of rank 0 .* not expert 3 of layer 1 of rank 0"


def swap_ranks(job: BuildJob) -> str:
    swap(layer_path(job, 1), layer_path(job, 1, rank=1))
    return r"layer-001\.experts\.safetensors` has expert 3 of layer 1 of rank 1 .* not expert 3 of layer 1 of rank 0"


def swap_records(job: BuildJob) -> str:
    record = record_bytes(job)
    with layer_path(job, 1).open("r+b") as file:
        start = os.fstat(file.fileno()).st_size - 16 * record
        file.seek(start)
        records = file.read()
        file.seek(start)
        file.write(records[record:] + records[:record])
    return r"has expert 4 of layer 1 of rank 0 .* not expert 3 of layer 1"


def overwrite_with_zeros(job: BuildJob) -> str:
    record = record_bytes(job)
    with layer_path(job, 1).open("r+b") as file:
        file.seek(os.fstat(file.fileno()).st_size - 13 * record)
        file.write(bytes(record))
    return r"layer-001\.experts\.safetensors` has no expert at byte \d+, not expert 3 of layer 1 of rank 0"


def make_a_hole(job: BuildJob) -> str:
    """Cut the file and extend it again: its size is right."""
    size = layer_path(job, 1).stat().st_size
    os.truncate(layer_path(job, 1), size - 15 * record_bytes(job))
    os.truncate(layer_path(job, 1), size)
    return r"layer-001\.experts\.safetensors` has no expert at byte \d+, not expert 3 of layer 1 of rank 0"


def truncate(job: BuildJob) -> str:
    size = layer_path(job, 1).stat().st_size - 13 * record_bytes(job) + 5000
    os.truncate(layer_path(job, 1), size)
    return rf"expert 3 of layer 1: bytes \d+ to \d+ of `.*layer-001\..*` are not there: the file has {size} bytes"


def record_bytes(job: BuildJob) -> int:
    return open_reader(job).sources[1].expert_bytes


DAMAGES = [swap_layers, swap_ranks, swap_records, overwrite_with_zeros, make_a_hole, truncate]


@pytest.mark.parametrize("is_open", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_by_the_read(damage: Callable[[BuildJob], str], is_open: bool, stored: BuildJob) -> None:
    """Damage before the start, and while the file is open; a file that is replaced while open stays the right one."""
    reader = open_reader(stored)
    expected = read_expert(reader, 1, 3)
    message = damage(stored)
    if is_open and damage in (swap_layers, swap_ranks):
        assert all(map(np.array_equal, read_expert(reader, 1, 3), expected))
        return
    if not is_open and damage is truncate:  # found before any read
        with pytest.raises(WeightsError, match="bytes, not"):
            open_reader(stored)
        return
    reader = reader if is_open else open_reader(stored)
    for _ in range(2):
        with pytest.raises(WeightsError, match=message) as raised:
            read_expert(reader, 1, 3)
        assert "--verify" in (raised.value.hint or "")
    if damage is not truncate:
        with pytest.raises(WeightsError, match=r"experts\.safetensors` (has|does not have)"):
            load_share_of(stored)


def load_share_of(job: BuildJob) -> None:
    from kimi_mlx.store.stores import load_store

    load_store(job.folder, open_manifest(job.folder, 0, 2, "hybrid"), load_config(job.folder), mx.float32)


def test_files_that_are_removed_while_open_stay_readable(stored: BuildJob) -> None:
    reader = open_reader(stored)
    expected = read_expert(reader, 2, 7)
    for path in rank_folder(stored.folder, 0).iterdir():
        path.unlink()
    assert all(map(np.array_equal, read_expert(reader, 2, 7), expected))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on a file: a disk that can be taken away. Only root can mount it."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(bytes(32 << 20))
    folder.mkdir()
    commands = [["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(folder)]]
    try:
        is_mounted = all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("cannot mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_a_disk_that_ends_early(disk: Path) -> None:
    """The blocks of the file are gone: the kernel reports an error of the disk."""
    job, _ = build_all(KIMI_MINI, disk, 2)
    reader = open_reader(job)
    assert reader.is_direct
    expected = read_expert(reader, 1, 3)
    os.sync()
    os.truncate(disk.parent / "image", 1 << 16)
    subprocess.run(["losetup", "-c", loop_device(disk)], check=True)
    with pytest.raises(WeightsError, match=r"expert 3 of layer 1: bytes \d+ to \d+ of .* cannot be read: Input/output"):
        read_expert(reader, 1, 3)
    os.truncate(disk.parent / "image", 32 << 20)
    assert expected


def loop_device(folder: Path) -> str:
    command = ["findmnt", "-n", "-o", "SOURCE", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_direct_reads_fill_aligned_destinations_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a record whose arrays are aligned, only the tag is read into other memory."""
    golden = load_golden("k2")
    config = {**golden.config, "hidden_size": 512, "moe_intermediate_size": 512}
    source = write_checkpoint(tmp_path / "float", config, golden.seed)
    quantized = quantize_checkpoint(source, tmp_path / "quantized", bits=4, group_size=32)
    job, _ = build_all(quantized, tmp_path / "stores", 1)
    reader = open_reader(job)
    sizes: list[list[int]] = []
    read = UncachedFile.read

    def watch(file: UncachedFile, buffers: list[np.ndarray], offset: int) -> int:
        sizes.append([buffer.nbytes for buffer in buffers])
        return read(file, buffers, offset)

    monkeypatch.setattr(UncachedFile, "read", watch)
    read_expert(reader, 1, 0)
    arrays = reader.arrays(1)
    assert all(array.size_bytes % IO_ALIGNMENT == 0 for array in arrays)
    assert sizes == [[*(array.size_bytes for array in arrays), RECORD_ALIGNMENT]]


def test_a_loaded_store_equals_the_checkpoint(stored: BuildJob) -> None:
    tokens = mx.array([[1, 2, 3, 4, 5]])
    job, _ = build_all(KIMI_MINI, stored.folder.parents[3] / "one", 1)
    config = load_config(KIMI_MINI)
    logits = load_share(job.folder, config)(tokens)
    assert mx.array_equal(logits, load_model(KIMI_MINI, config, mx.float32)(tokens))


def test_tags() -> None:
    tag = ExpertTag(7, 1, "abcdef", "0" * 40)
    assert len(tag.to_bytes(383)) == TAG_BYTES
    assert (
        describe_tag(tag.to_bytes(383)) == "expert 383 of layer 7 of rank 1 (placement abcdef, commit " + "0" * 40 + ")"
    )
    assert describe_tag(bytes(TAG_BYTES)) == "no expert"
    others = [ExpertTag(8, 1, "abcdef", "0" * 40), ExpertTag(7, 0, "abcdef", "0" * 40)]
    others += [ExpertTag(7, 1, "abcdee", "0" * 40), ExpertTag(7, 1, "abcdef", "0" * 39 + "1")]
    assert len({other.to_bytes(383) for other in [tag, *others]}) == 5
