"""Start the ranks of a training on this machine, show their progress and wait for them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from scripts.mini import checkpoint
from scripts.mini.dialogues import stream
from scripts.mini.training import Settings
from scripts.mini.vocabulary import learn_ranks, sample_texts, write_vocabulary

ROOT = Path(__file__).resolve().parents[2]
# MLX's wheel on Linux has the reference BLAS, 30 times slower than OpenBLAS (package libopenblas0-pthread).
OPENBLAS_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu/openblas-pthread",
    "/usr/lib/aarch64-linux-gnu/openblas-pthread",
    "/usr/lib64",
    "/usr/lib",
)
VOCABULARY_DIALOGUES = 15_000
POLL_INTERVAL_S = 2.0


def remove_run(folder: Path) -> None:
    """Remove the checkpoint and the log of an earlier run."""
    for name in (checkpoint.FILE, "log.jsonl"):
        (folder / name).unlink(missing_ok=True)


def prepare(folder: Path, vocabulary: Path) -> None:
    """Learn the vocabulary, unless an earlier run has done so."""
    vocabulary.mkdir(parents=True, exist_ok=True)
    if not (vocabulary / "tiktoken.model").exists():
        dialogues = islice(stream("vocabulary", part=1, max_tokens=160), VOCABULARY_DIALOGUES)
        write_vocabulary(learn_ranks(sample_texts(dialogues)), vocabulary)


def find_openblas() -> str | None:
    """Return the library to preload on Linux, if it is installed."""
    if not sys.platform.startswith("linux"):
        return None
    paths = (Path(folder) / "libopenblas.so.0" for folder in OPENBLAS_FOLDERS)
    return next((str(path) for path in paths if path.exists()), None)


def fast_environment() -> dict[str, str]:
    """Return this process's environment with OpenBLAS, if it is installed, on one thread."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    library = find_openblas()
    return environment | {"LD_PRELOAD": library} if library else environment


def rank_environment(hostfile: Path, rank: int) -> dict[str, str]:
    """Return the variables of one rank: its position in the ring, and a fast BLAS."""
    return fast_environment() | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}


def rank_command(settings: Settings, rank: int) -> list[str]:
    """Return the command of one rank, pinned to a core where `taskset` exists."""
    pin = ["taskset", "-c", str(rank % (os.cpu_count() or 1))] if shutil.which("taskset") else []
    return [*pin, sys.executable, "-m", "scripts.mini.rank", json.dumps(asdict(settings))]


def train(settings: Settings, ranks: int) -> None:
    """Run the training to its end.

    Raises:
        RuntimeError: a rank failed; the message names its log.
    """
    folder = Path(settings.folder)
    hostfile = folder / "hostfile.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            with (folder / f"rank-{rank}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        rank_command(settings, rank),
                        cwd=ROOT,
                        env=rank_environment(hostfile, rank),
                        stdout=log,
                        stderr=log,
                    )
                )
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_INTERVAL_S)
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            if failed:
                raise RuntimeError(f"rank {failed[0]} of the training failed: see {folder / f'rank-{failed[0]}.log'}")
            show_progress(folder / "log.jsonl", settings.minutes)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    print(file=sys.stderr)


def evaluate(model: Path, count: int, examples: bool, module: str = "scripts.mini.evaluate") -> None:
    """Print the accuracies of an exported model, measured in a process with a fast BLAS."""
    command = [sys.executable, "-m", module, str(model), str(count)]
    subprocess.run([*command, "examples"] if examples else command, cwd=ROOT, env=fast_environment(), check=True)


def free_ports(count: int) -> list[int]:
    """Return ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def show_progress(log: Path, minutes: float) -> None:
    """Print the newest record of the log over the last one."""
    if not log.exists():
        return
    lines = log.read_text().splitlines()
    if lines:
        record = json.loads(lines[-1])
        text = f"step {record['step']}  {record['tokens'] / 1e6:.2f} M tokens  loss {record['loss']:.3f}"
        print(f"\r{text}  {record['minutes']:.1f} of {minutes:g} min   ", end="", file=sys.stderr, flush=True)
