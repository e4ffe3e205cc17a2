"""Loading a store needs memory for the share and at most one more layer, in every compute type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_mlx.bench.workloads import write_synthetic
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from scripts.loading.files import loading_config

SIZE_GB = 0.3

LOAD = """
import json, sys
from pathlib import Path
import mlx.core as mx
from scripts.loading.rank import measure
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.load import DTYPES
from kimi_mlx.store.stores import load_store, open_manifest
folder, dtype, ranks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
manifest = open_manifest(folder, 0, ranks, "hybrid")
config = load_config(folder)
mx.eval(mx.array([1.0]) + 1)  # start MLX's threads and allocator before measuring
print(json.dumps(measure(lambda: load_store(folder, manifest, config, DTYPES[dtype]))))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "checkpoint"
    write_synthetic(folder, loading_config(SIZE_GB))
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def store(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[Path, int]:
    """Folder of a store, and its number of ranks."""
    options = StoreOptions(checkpoint, checkpoint.parent / "stores", request.param)
    job = open_build_job(options, SingleGroup())
    build(options, job, SingleGroup())
    return job.folder, request.param


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where the peak of memory can be reset")
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("bfloat16", marks=pytest.mark.slow),
        *(pytest.param(dtype, marks=pytest.mark.sweep) for dtype in ("float32", "float16")),
    ],
)
def test_the_peak_is_the_share_and_one_layer(store: tuple[Path, int], dtype: str) -> None:
    folder, ranks = store
    command = [sys.executable, "-c", LOAD, str(folder), dtype, str(ranks)]
    load = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    layers = sum(1 for _ in (folder / "rank-0").glob("layer-*.safetensors")) - 1  # the first one is small
    held = load["held_bytes"]
    assert load["peak_bytes"] <= 1.1 * (held + held / layers)
    assert load["mlx_peak_bytes"] <= 1.1 * (held + held / layers)
