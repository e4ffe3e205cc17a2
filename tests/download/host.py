"""Hosts that run `kimi-mlx download` against tests/hub.py, and the checksums that their stores must have."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.bench.workloads import synthetic_config, write_synthetic
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from tests import processes
from tests.command import call
from tests.fakes import KIMI_MINI
from tests.hub import COMMIT, Hub, environment, use

NAME = "owner/model"
HEADER_BYTES = 1.02
"""Maximum number of bytes served per byte of the repository: headers are read first, and again with their files."""

IN_FLIGHT_BYTES = 8 << 20
"""Maximum number of bytes that a killed process loses: those in the kernel's buffers of its connections."""

Checksums = dict[int, dict[str, str]]
"""Rank -> file -> sha256."""

Expected = Callable[[int], Checksums]
"""Function: number of ranks -> checksums."""

MAIN = "from kimi_mlx.cli.app import main; main()"


def make_repository(folder: Path, shape: str, **changes: Any) -> Path:
    """Write a complete model with random weights: one file per layer, and one for the top."""
    vocabulary = json.loads((KIMI_MINI / "config.json").read_text())["vocab_size"]
    write_synthetic(folder, synthetic_config(shape, vocab_size=vocabulary, **changes))
    for name in ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(KIMI_MINI / name, folder)
    return folder


def make_large(folder: Path) -> Path:
    """Write a model of 68 MB in 8 files."""
    return make_repository(folder, "wide", num_hidden_layers=7, n_routed_experts=8, num_experts_per_tok=4)


def make_small(folder: Path) -> Path:
    """Write a model in 4 files, for up to 3 ranks."""
    return make_repository(folder, "deep", num_hidden_layers=3, moe_intermediate_size=192)


def repository_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@dataclass
class Host:
    """A host with its own home folder, hub cache and stores."""

    hub: Hub
    home: Path

    @property
    def stores(self) -> Path:
        return self.home / "stores"

    @property
    def cache(self) -> Path:
        return self.home / "hf" / "hub"

    def start(self, *arguments: str, code: str = MAIN, **variables: str) -> subprocess.Popen[str]:
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            **environment(self.hub, self.home / "hf"),
            **self._own_variables(),
            **variables,
        }
        return processes.start([sys.executable, "-c", code, *arguments], env=variables, text=True)

    def run(self, *arguments: str, code: str = MAIN, **variables: str) -> subprocess.CompletedProcess[str]:
        return end(self.start(*arguments, code=code, **variables))

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command in this process."""
        with pytest.MonkeyPatch.context() as patch:
            use(self.hub, self.home / "hf", patch)
            return call(*arguments, variables=self._own_variables())

    def _own_variables(self) -> dict[str, str]:
        self.home.mkdir(parents=True, exist_ok=True)
        folders = {f"XDG_{kind}_HOME": str(self.home / kind) for kind in ("CACHE", "STATE", "DATA", "CONFIG")}
        return {**folders, "HOME": str(self.home), "KIMI_MLX_STORES": str(self.stores)}


def end(process: subprocess.Popen[str], limit_s: float = 120) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=limit_s)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(done: subprocess.CompletedProcess[str], message: str, code: int = 1) -> str:
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr), done.stderr
    return done.stderr


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def wait_until_sent(hub: Hub, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until the hub has sent more than `count` bytes, or the process has ended."""
    wait_until(lambda: hub.sent_bytes > count or process.poll() is not None)


def checksums(stores: Path) -> Checksums:
    """Return the checksums in the manifests of all stores; the files on disk must have them."""
    found: Checksums = {}
    for path in stores.rglob("manifest.json"):
        manifest = json.loads(path.read_bytes())
        tower = [manifest["vision"]] if "vision" in manifest else []
        files = {file["name"]: file["sha256"] for file in (*manifest["files"], *tower)}
        assert {name: sha256((path.parent / name).read_bytes()).hexdigest() for name in files} == files
        assert {file.name for file in path.parent.glob("*.safetensors*")} == set(files)
        found[manifest["rank"]] = files
    return found


def built_from_folder(repository: Path, stores: Path, ranks: int) -> Checksums:
    """Build stores in this process without a hub; return their checksums.

    Records of experts have the commit: it is that of the hub.
    """
    options = StoreOptions(repository, stores, ranks)
    job = open_build_job(options, SingleGroup())
    contents = job.source.contents
    job.source.contents = replace(contents, origin=replace(contents.origin, commit=COMMIT))
    build(options, job, SingleGroup())
    return checksums(stores)


def files_fetched(hub: Hub) -> set[str]:
    """Return the weight files of which more than the header was served."""
    return {
        name.removeprefix(f"{NAME}/") for name, count in hub.sent.items() if "safetensors" in name and count > 30_000
    }


class DiskWatch:
    """Measure the peak disk usage of a folder, and of the `sources` folders in it; a context manager."""

    def __init__(self, folder: Path):
        self.peak_bytes = self.peak_source_bytes = 0
        self._folder, self._is_stopped = folder, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, disk_bytes(self._folder))
            folders = (Path(name) for name, _, _ in os.walk(self._folder))  # unlike rglob, ignores vanishing folders
            sources = (disk_bytes(folder) for folder in folders if folder.name == "sources")
            self.peak_source_bytes = max([self.peak_source_bytes, *sources])


def disk_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def rank_folder(host: Host, rank: int = 0) -> Path:
    (folder,) = host.stores.glob(f"*/*/*/rank-{rank}")
    return folder


def flip_a_byte(folder: Path) -> None:
    with (folder / "layer-001.experts.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
