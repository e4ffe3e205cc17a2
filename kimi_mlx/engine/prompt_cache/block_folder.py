"""The folder of a prompt cache on disk: locking, scanning and size limits.

<cache-dir>/kv-<key>/<share>/    per key (everything that ranks have in common), a folder for each rank's share
    lock, <name>-<parent>.safetensors ...

The lock file contains the stamp of the weights that the blocks belong to.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from kimi_mlx.engine.prompt_cache.block_file import Block

GROUP = re.compile(r"kv-[0-9a-f]{32}")
FILE = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})\.safetensors")
PART = re.compile(FILE.pattern + r"\.\d+\.part")
LOCK = "lock"

LOCK_WAIT_S = 2.0
"""Maximum wait for a process that is about to exit, for example when a ring restarts."""


def open_folder(cache_dir: Path, root: str, share: str, stamp: str) -> tuple[Path, int]:
    """Create a share's folder and lock it for the lifetime of this process.

    It contains prompts in plain text, so other users cannot read it. Blocks with another stamp are removed.

    Returns:
        The folder and the file descriptor of the lock.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: the folder cannot be created or written.
    """
    folder = cache_dir / f"kv-{root}" / share
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.parent.chmod(0o700)
    lock = _lock(folder, LOCK_WAIT_S)
    old_stamp = os.pread(lock, 1 << 16, 0)
    if old_stamp != stamp.encode():
        for file in _blocks_in(folder):
            file.unlink()
        os.ftruncate(lock, 0)
        os.pwrite(lock, stamp.encode(), 0)
    return folder, lock


def scan(folder: Path, block_bytes: int) -> dict[Block, float]:
    """Return the blocks in a folder with the time of their last use. Remove incomplete files."""
    last_uses: dict[Block, float] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if match := FILE.fullmatch(entry.name):
                status = entry.stat()
                if status.st_size > block_bytes:
                    last_uses[Block(match[1], match[2])] = status.st_mtime
                    continue
            if match or PART.fullmatch(entry.name):
                _unlink(Path(entry.path))
    return last_uses


def oldest_first(last_uses: dict[Block, float], root: str) -> list[Block]:
    """Return the blocks reachable from the root, least recently used first.

    A block is as recent as its most recent descendant, so a chain is evicted from its end.
    """
    children: dict[str, list[Block]] = {}
    for block in {block.name: block for block in last_uses if block.name != root}.values():
        children.setdefault(block.parent, []).append(block)
    reached: list[Block] = list(children.get(root, []))
    for block in reached:  # grows while iterating; each block comes after its parent
        reached += children.get(block.name, [])
    recent = {block.name: last_uses[block] for block in reached}
    for block in reversed(reached):
        recent[block.parent] = max(recent.get(block.parent, 0.0), recent[block.name])
    reached.reverse()
    return sorted(
        reached, key=lambda block: recent[block.name]
    )  # the sort is stable: of equally recent blocks, descendants come first


def evict_other_models(cache_dir: Path, root: str, max_bytes: int) -> int:
    """Remove blocks of other models, oldest first, until they use half of `max_bytes`; return the bytes that remain.

    Folders that another process uses are kept.
    """
    groups = [path for path in cache_dir.glob("kv-*") if GROUP.fullmatch(path.name) and path.name != f"kv-{root}"]
    sizes = {group: sum(_size(file) for file in _files(group)) for group in groups}
    total = sum(sizes.values())
    for group in sorted(groups, key=_age):
        if total > max_bytes // 2 and _remove(group):
            total -= sizes[group]
    return total


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder."""
    return shutil.disk_usage(folder).free


def _remove(group: Path) -> bool:
    """Remove the files of a key's folder; return False if a share in it is in use."""
    locks: list[int] = []
    try:
        locks += [_lock(share) for share in group.iterdir() if share.is_dir()]
        for file in _files(group):
            _unlink(file)
    except OSError:
        return False
    finally:
        for lock in locks:
            os.close(lock)
    return True


def _files(group: Path) -> Iterable[Path]:
    return (file for share in group.iterdir() for file in _blocks_in(share))


def _blocks_in(share: Path) -> Iterable[Path]:
    return (file for file in share.glob("*.safetensors") if FILE.fullmatch(file.name))


def _lock(folder: Path, wait_s: float = 0.0) -> int:
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                raise
            time.sleep(0.05)
        else:
            return handle


def _size(file: Path) -> int:
    with contextlib.suppress(OSError):
        return file.stat().st_size
    return 0


def _age(group: Path) -> float:
    return max((share.stat().st_mtime for share in group.iterdir()), default=0.0)


def _unlink(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()
