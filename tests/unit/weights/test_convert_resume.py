"""Conversions that are interrupted, refused, or run out of disk space."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kimi_mlx.errors import KimiMlxError, UsageError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.weights import convert as converter
from kimi_mlx.weights import convert_folder
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert_folder import RECORD_NAME
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.index import INDEX_NAME
from tests.processes import start
from tests.unit.weights.conversions import GROUPS_OF_32, contents, run

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def finished(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a conversion that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(sources["fp8"], folder, GROUPS_OF_32)
    return contents(folder)


class Stopped(BaseException):
    """Raised in place of a kill."""


def stop_at(call: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Return a function that calls another one, and raises an error at the call of this number (from 0)."""
    calls = itertools.count()

    def stopping(*arguments: Any) -> Any:
        if next(calls) == call:
            raise error
        return function(*arguments)

    return stopping


@pytest.mark.parametrize("step", ["_write_chunk", "rename_durably", "write_atomically"])
@pytest.mark.parametrize("call", [0, 1, 2, 30])
def test_a_resumed_conversion_has_the_same_bytes(
    step: str,
    call: int,
    sources: dict[str, Path],
    finished: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopping = stop_at(call, getattr(converter, step), Stopped())
        for module in (converter, convert_folder):
            if hasattr(module, step):
                patch.setattr(module, step, stopping)
        try:
            run(sources["fp8"], folder, GROUPS_OF_32)
        except Stopped:
            assert not (folder / "config.json").exists()
    if not (folder / "config.json").exists():
        before = {path: path.stat() for path in folder.glob("model-*.safetensors")}
        assert run(sources["fp8"], folder, GROUPS_OF_32).files_before == len(before)
        assert all(path.stat().st_mtime_ns == status.st_mtime_ns for path, status in before.items())
        assert all(path.stat().st_ino == status.st_ino for path, status in before.items())
    assert contents(folder) == finished


SLOW_PROCESS = """
import sys, time
from pathlib import Path
from kimi_mlx.weights import convert as converter
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert_options import ConvertOptions

convert_chunk = converter.convert_chunk
def slowly(*arguments):
    time.sleep(0.01)
    return convert_chunk(*arguments)
converter.convert_chunk = slowly
conversion = open_conversion(Path(sys.argv[1]), ConvertOptions(bits=4, group_size=32))
converter.convert(conversion, Path(sys.argv[2]))
"""


def test_a_killed_process_is_resumed(sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = start([sys.executable, "-c", SLOW_PROCESS, str(sources["fp8"]), str(folder)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (folder / "model-00002-of-00003.safetensors.part").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert {RECORD_NAME, "model-00001-of-00003.safetensors"} <= contents(folder).keys()
    assert not {INDEX_NAME, "config.json"} & contents(folder).keys()
    with pytest.raises(KimiMlxError):
        load_config(folder)
    assert run(sources["fp8"], folder, GROUPS_OF_32).files_before == 1
    assert contents(folder) == finished


def test_leftovers_of_a_killed_process_are_removed(
    sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / f"{RECORD_NAME}.4711.part").write_text("{")
    run(sources["fp8"], tmp_path, GROUPS_OF_32)
    assert contents(tmp_path) == finished


def test_a_truncated_file_is_written_again(
    sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(converter, "_finish", stop_at(0, lambda: None, Stopped()))
        with pytest.raises(Stopped):
            run(sources["fp8"], folder, GROUPS_OF_32)
    os.truncate(folder / "model-00002-of-00003.safetensors", 1000)
    assert run(sources["fp8"], folder, GROUPS_OF_32).files_before == 2
    assert contents(folder) == finished


def interrupt(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    with monkeypatch.context() as patch:
        patch.setattr(converter, "rename_durably", stop_at(1, converter.rename_durably, Stopped()))
        with pytest.raises(Stopped):
            run(source, folder, GROUPS_OF_32)
    return contents(folder)


def test_other_options_or_another_source_are_refused(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    before = interrupt(sources["fp8"], folder, monkeypatch)
    with pytest.raises(
        UsageError, match=r"fp8.* with bits 4, group_size 32; this command converts .*fp8.* with bits 3"
    ):
        run(sources["fp8"], folder, ConvertOptions(bits=3))
    with pytest.raises(UsageError, match=r"fp8.*; this command converts .*bf16"):
        run(sources["bf16"], folder, GROUPS_OF_32)
    assert contents(folder) == before


def test_a_source_that_has_changed_is_refused(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(sources["fp8"], tmp_path / "source")
    interrupt(source, tmp_path / "out", monkeypatch)
    os.utime(source / "model-00001-of-000002.safetensors")
    with pytest.raises(UsageError, match="unfinished conversion"):
        run(source, tmp_path / "out", GROUPS_OF_32)


@pytest.mark.parametrize(
    ("name", "message"), [("config.json", "already contains a model"), ("photo.jpg", "it has `photo.jpg`")]
)
def test_a_folder_with_other_files_is_refused(
    name: str, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=message):
        run(sources["fp8"], tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_finished_model_and_a_file_are_refused_unchanged(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["fp8"], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match="already contains a model"):
        run(sources["fp8"], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(UsageError, match="Not a directory"):
        run(sources["fp8"], tmp_path / "out" / "config.json")


def test_a_broken_record_is_an_error(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        run(sources["fp8"], tmp_path)


def test_a_folder_in_use_is_refused(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(sources["fp8"], tmp_path / "out", monkeypatch)
    with (tmp_path / "out" / RECORD_NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(WeightsError, match="another process"):
            run(sources["fp8"], tmp_path / "out", GROUPS_OF_32)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small_is_refused_before_writing(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = open_conversion(sources["fp8"], GROUPS_OF_32).size_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size - 1))
    with pytest.raises(WeightsError, match=r"needs \d+\.\d kB .*has \d+\.\d kB free"):
        run(sources["fp8"], tmp_path / "new" / "out", GROUPS_OF_32)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size))
    run(sources["fp8"], tmp_path / "new" / "out", GROUPS_OF_32)


def test_finished_files_need_no_more_space(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(sources["fp8"], tmp_path / "out", monkeypatch)
    size = open_conversion(sources["fp8"], GROUPS_OF_32).size_bytes
    done = (tmp_path / "out" / "model-00001-of-00003.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size - done))
    assert run(sources["fp8"], tmp_path / "out", GROUPS_OF_32).files_before == 1


def test_after_a_full_disk_finished_files_stay(
    sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(converter, "_write_chunk", stop_at(30, converter._write_chunk, full))
        with pytest.raises(WeightsError, match="the disk is full: the rest needs") as caught:
            run(sources["fp8"], folder, GROUPS_OF_32)
    assert "same command" in (caught.value.hint or "")
    assert contents(folder).keys() == {RECORD_NAME, "model-00001-of-00003.safetensors"}
    run(sources["fp8"], folder, GROUPS_OF_32)
    assert contents(folder) == finished


def test_a_real_disk_that_fills_up(
    sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small disk")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(converter, "check_space", lambda *_: None)  # as if another program had taken the space since
            with pytest.raises(WeightsError, match="the disk is full"):
                run(sources["fp8"], disk / "out", GROUPS_OF_32)
        assert contents(disk / "out").keys() == {RECORD_NAME, "model-00001-of-00003.safetensors"}
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        run(sources["fp8"], disk / "out", GROUPS_OF_32)
        assert contents(disk / "out") == finished
    finally:
        subprocess.run(["umount", str(disk)], check=True)
