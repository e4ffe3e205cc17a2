"""The loading benchmark: its files, its statistics, and a small real run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.model.config import parse_config
from kimi_mlx.units import GB
from scripts.loading import files as loading_files
from scripts.loading import rank as loading_rank
from scripts.loading.files import LoadingFiles, drop_caches, loading_config, make_files
from scripts.loading.measure import Load, LoadingRun, loading_sides
from scripts.loading.report import (
    loading_heading,
    loading_lines,
    loading_ratios,
    loading_rows,
    loading_settings,
    loading_table,
    loading_to_dict,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_loading.py"
FILES = LoadingFiles((Path("copy-0"), Path("copy-1")), Path("stores"), 2000, 1900, (1010, 1020))


def run(side: str, repetition: int, seconds: float, size: int | None, peak: int) -> LoadingRun:
    """Return a run whose second rank is slower and larger; with `size` None, its system reports no bytes."""
    loads = tuple(
        Load(seconds * part, size and size * part, None if size is None else size * part + 1, 900, peak * part, peak)
        for part in (1, 2)
    )
    return LoadingRun(side, repetition, loads, seconds + 1, "page cache dropped")


RUNS = [
    *(run("kimi-mlx store", i, 1.0 + i, 500, 600) for i in range(3)),
    *(run("kimi-mlx checkpoint", i, 9, None, 600) for i in range(3)),
    *(run("mlx-lm tensor", i, 8, 1000, 800) for i in range(3)),
    *(run("mlx-lm pipeline", i, 4, 550, 1000) for i in range(3)),
]


@pytest.mark.parametrize("size_gb", [0.01, 0.3, 1, 3, 10])
def test_the_checkpoint_has_the_requested_size_and_is_nearly_all_experts(size_gb: float) -> None:
    config = loading_config(size_gb)
    parse_config(config)
    experts = loading_files._expert_bytes(config)
    assert size_gb * GB <= experts
    assert experts < 1.2 * size_gb * GB or size_gb == 0.01
    assert config["moe_intermediate_size"] % (2 * 64) == 0


def test_a_row_is_the_median_over_runs_of_the_slowest_or_largest_rank() -> None:
    rows = {row.side: row.figures for row in loading_rows(RUNS)}
    assert list(rows) == ["kimi-mlx store", "kimi-mlx checkpoint", "mlx-lm tensor", "mlx-lm pipeline"]
    seconds = rows["kimi-mlx store"]["seconds"]
    assert (seconds.median, seconds.min, seconds.max) == (4, 2, 6)
    assert rows["kimi-mlx store"]["needed_bytes"].median == 1001
    assert rows["kimi-mlx store"]["peak_bytes"].median == 1200
    assert "needed_bytes" not in rows["kimi-mlx checkpoint"]


def test_ratios_are_to_each_mode_of_mlx_lm_and_to_the_best_in_each_measurement() -> None:
    rows = loading_rows(RUNS)
    tensor, pipeline = loading_ratios(rows)
    assert (tensor.against, pipeline.against) == ("mlx-lm tensor", "mlx-lm pipeline")
    assert (tensor.figures["seconds"], pipeline.figures["seconds"]) == (0.25, 0.5)
    assert loading_lines(rows)[-1] == (
        "kimi-mlx store / best of mlx-lm in each: bytes 0.91, time 0.50, peak 0.75, MLX's peak 0.75"
    )


def test_without_mlx_lm_there_are_no_ratios() -> None:
    ours = [run for run in RUNS if run.side.startswith("kimi-mlx")]
    assert loading_lines(loading_rows(ours)) == []


def test_the_report_is_json_and_a_table_of_80_columns() -> None:
    settings = {**loading_settings(FILES, "bfloat16"), "commit": None}
    document = json.loads(json.dumps(loading_to_dict(RUNS, settings), allow_nan=False))
    assert len(document["runs"]) == 12
    assert document["runs"][0]["loads"][1]["seconds"] == 2
    assert document["caches"] == ["page cache dropped"]
    assert {"machine", "versions", "commit", "method", "results", "ratios"} <= document.keys()
    output = io.StringIO()
    Console(file=output, width=80).print(loading_table(loading_rows(RUNS)))
    assert "4.00 (2.00-6.00)" in output.getvalue()
    assert "kimi-mlx checkpoint        -  " in output.getvalue()
    assert "2 ranks, bfloat16; median (min-max) of 3" in loading_heading(RUNS, settings)


def test_sides_with_another_dtype_and_without_mlx_lm() -> None:
    names = [side.name for side in loading_sides(FILES, "bfloat16", "float32", has_mlx_lm=True)]
    assert names == [
        "kimi-mlx store",
        "kimi-mlx store float32",
        "kimi-mlx checkpoint",
        "mlx-lm tensor",
        "mlx-lm pipeline",
    ]
    ours = loading_sides(FILES, "bfloat16", "bfloat16", has_mlx_lm=False)
    assert [(side.name, side.folders) for side in ours] == [
        ("kimi-mlx store", (Path("stores"), Path("stores"))),
        ("kimi-mlx checkpoint", FILES.copies),
    ]


def test_files_are_created_once_and_each_rank_has_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    actions: list[str] = []
    files = make_files(0.01, 2, lambda action, done, total: actions.append(action))
    assert list(dict.fromkeys(actions)) == [
        "creating the checkpoint",
        "copying it for each rank",
        "building the stores",
    ]
    first, second = (copy / "model-00003-of-00004.safetensors" for copy in files.copies)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_ino != second.stat().st_ino
    assert sum(files.store_bytes) < 2 * files.checkpoint_bytes  # records of such small experts are padded
    actions.clear()
    assert make_files(0.01, 2, lambda action, done, total: actions.append(action)) == files
    assert set(actions) <= {"building the stores"}  # the builder reports existing stores
    assert not list(tmp_path.rglob("*.part"))


def test_impossible_files_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="at least two ranks"):
        make_files(3, 1)
    with pytest.raises(WeightsError, match="more, but its disk has"):
        make_files(10**6, 2)
    (tmp_path / "taken").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(WeightsError, match="cannot be written"):
        make_files(0.01, 2)


def test_without_permission_only_the_caches_of_the_files_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10000)
    monkeypatch.setattr(loading_files, "DROP_CACHES", tmp_path / "missing")
    assert drop_caches([tmp_path]).endswith("(posix_fadvise)" if hasattr(os, "posix_fadvise") else "from memory")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert "not dropped" in drop_caches([tmp_path])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_bytes_read_and_peak_memory_of_a_process(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 3_000_000)
    before = loading_rank.bytes_read()
    path.read_bytes()
    after = loading_rank.bytes_read()
    assert before is not None
    assert after is not None
    assert after[0] - before[0] == pytest.approx(3_000_000, rel=0.05)
    # in a process of its own: the peak of this one may be higher
    code = (
        "from scripts.loading import rank\n"
        "held = rank.start_memory()\n"
        "block = bytearray(b'x') * 50_000_000\n"
        "print(rank.peak_memory() - held)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[2]
    )
    assert int(done.stdout) == pytest.approx(50_000_000, rel=0.05)


def test_a_system_without_proc_reports_no_bytes_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_rank, "PROCESS", tmp_path)
    assert loading_rank.bytes_read() is None
    assert 0 < loading_rank.start_memory() <= loading_rank.peak_memory()


# The script without dropping the page cache of the whole system, which would slow down all other processes.
KEEP_SYSTEM_CACHE = """
import runpy, sys
from pathlib import Path
from scripts.loading import files as loading_files
loading_files.DROP_CACHES = Path("/nowhere")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bench(tmp_path: Path, *options: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-c",
        KEEP_SYSTEM_CACHE,
        str(SCRIPT),
        "--size-gb",
        "0.01",
        "--repeat",
        "1",
        "--json",
        *options,
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


@pytest.mark.ranks
@pytest.mark.sweep
def test_a_rank_reads_only_its_share_from_a_store(tmp_path: Path) -> None:
    document = bench(tmp_path)
    runs = {run["side"]: run["loads"] for run in document["runs"]}
    assert len(runs) == 5
    if sys.platform == "linux":
        for load, store_bytes in zip(runs["kimi-mlx store"], document["store_bytes"], strict=True):
            assert store_bytes < load["read_bytes"] < 1.05 * store_bytes
        for load in runs["mlx-lm tensor"]:
            assert load["read_bytes"] > 0.95 * document["checkpoint_bytes"]
    for load in runs["kimi-mlx store"]:
        assert 0.5 < load["held_bytes"] / document["store_bytes"][0] < 1  # without the padding of records
    assert [ratio["against"] for ratio in document["ratios"]] == ["mlx-lm tensor", "mlx-lm pipeline"]


@pytest.mark.ranks
@pytest.mark.slow
def test_the_script_runs_without_mlx_lm(tmp_path: Path) -> None:
    document = bench(tmp_path, "--no-against")
    assert {run["side"].split()[0] for run in document["runs"]} == {"kimi-mlx"}
    assert document["ratios"] == []
