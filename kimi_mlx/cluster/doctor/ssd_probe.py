"""The process that measures the SSD of a host, and prints one line of JSON: random reads of blocks of an expert's size.

The page cache is passed by, as when experts are read. It reads files of the model if there are any, else a file of
random bytes that it writes and removes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kimi_mlx.sizing.ssd import THIS_HOST, SsdSpeed, save_speeds
from kimi_mlx.uncached_file import IO_ALIGNMENT, UncachedFile, aligned_buffer

DEPTHS = (1, 4, 9, 16)
"""Numbers of reads in flight."""

SECONDS = 0.7
"""Duration of the measurement of each depth."""

MIN_BYTES = 2**30
"""Size of the files from which the drive's own cache does not matter; also of the file that is written."""

FREE_SHARE = 0.1
"""Share of the free space that this file may take."""

CHUNK_BYTES = 2**26
"""Bytes that are written at a time."""


def main() -> None:
    """Measure, print the result, and save it for later runs on this host."""
    parser = argparse.ArgumentParser(prog="ssd_probe")
    parser.add_argument("--block", type=int, required=True, help="bytes of each read")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for a temporary file")
    parser.add_argument("folders", type=Path, nargs="*", help="folders with files of the model")
    arguments = parser.parse_args()
    try:
        speed = probe(arguments.folders, arguments.scratch, arguments.block)
    except OSError as error:
        print(json.dumps({"error": str(error)}))
        return
    save_speeds({THIS_HOST: speed})
    print(json.dumps(speed.to_dict()))


def probe(
    folders: Iterable[Path], scratch: Path, block_bytes: int, seconds: float = SECONDS, min_bytes: int = MIN_BYTES
) -> SsdSpeed:
    """Measure the reads of files in some folders, else of a temporary file.

    Args:
        folders: folders with `*.safetensors`.
        scratch: folder for a temporary file, which may not exist yet.
        block_bytes: bytes of each read.
        seconds: duration of each depth.
        min_bytes: size of the files from which they are used, and of the temporary file.

    Raises:
        OSError: the files cannot be read, or there is no space for a temporary one.
    """
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    files = [file for file in files if file.stat().st_size >= 2 * block_bytes]
    block_bytes = -(-block_bytes // IO_ALIGNMENT) * IO_ALIGNMENT
    if sum(file.stat().st_size for file in files) >= min_bytes:
        return measure(files, block_bytes, seconds)
    with _scratch_file(scratch, max(min_bytes, 4 * block_bytes)) as file:
        return measure([file], block_bytes, seconds)


def measure(files: Sequence[Path], block_bytes: int, seconds: float = SECONDS) -> SsdSpeed:
    """Measure random reads at each depth.

    Args:
        files: files of at least two blocks.
        block_bytes: bytes of each read, a multiple of IO_ALIGNMENT.
        seconds: duration of each depth.

    Raises:
        OSError: a file cannot be read.
    """
    with ExitStack() as stack:
        opened: list[UncachedFile] = []
        for file in files:
            opened.append(UncachedFile(file))
            stack.callback(opened[-1].close)
        rates = {depth: _rate(opened, block_bytes, depth, seconds) for depth in DEPTHS}
    return SsdSpeed(str(files[0].resolve().parent), block_bytes, rates, time.time())


def _rate(files: Sequence[UncachedFile], block_bytes: int, depth: int, seconds: float) -> float:
    """Return the bytes per second of `depth` threads that read blocks at random places."""
    sizes = [file.size_bytes for file in files]
    done = [0] * depth
    errors: list[OSError] = []
    begin = time.perf_counter()

    def read(number: int) -> None:
        buffer, chooser = aligned_buffer(block_bytes), random.Random(number)
        try:
            while time.perf_counter() - begin < seconds:
                (file,) = chooser.choices(files, sizes)
                last = (file.size_bytes - block_bytes) // IO_ALIGNMENT
                done[number] += file.read([buffer], chooser.randint(0, last) * IO_ALIGNMENT)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(done) / (time.perf_counter() - begin)


@contextmanager
def _scratch_file(folder: Path, size: int) -> Generator[Path]:
    """Write a file of random bytes, past the page cache where the system can, and remove it at the end."""
    while not folder.is_dir():
        folder = folder.parent
    if size > FREE_SHARE * shutil.disk_usage(folder).free:
        raise OSError(f"not enough free space in `{folder}` for a file of {size / 1e9:.1f} GB")
    handle, name = tempfile.mkstemp(prefix="kimi-mlx-ssd-test-", dir=folder)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            chunk = os.urandom(CHUNK_BYTES)
            for start in range(0, size, CHUNK_BYTES):
                file.write(chunk[: min(CHUNK_BYTES, size - start)])
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
