"""The folder of a prompt cache on disk: whose it is, what lies in it, and how much may.

<cache-dir>/kv-<key>/<share>/    a folder for everything that ranks must have alike, in it one for each rank's share
    lock, <name>-<parent>.safetensors ...

The lock file says of which weights the blocks are.
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
"""For a process that is just ending, as when a ring is started again."""


def open_folder(cache_dir: Path, root: str, share: str, stamp: str) -> tuple[Path, int]:
    """Make a share's folder and lock it for as long as this process lives.

    Prompts lie in it in the clear: nobody else may read it. If it bears another stamp, what is in it is removed.

    Returns:
        The folder, and the handle of the lock.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made or written.
    """
    folder = cache_dir / f"kv-{root}" / share
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.parent.chmod(0o700)
    lock = _lock(folder, LOCK_WAIT_S)
    found = os.pread(lock, 1 << 16, 0)
    if found != stamp.encode():
        for file in _blocks_in(folder):
            file.unlink()
        os.ftruncate(lock, 0)
        os.pwrite(lock, stamp.encode(), 0)
    return folder, lock


def scan(folder: Path, block_bytes: int) -> dict[Block, float]:
    """The blocks in a folder, and when each was last wanted; removes what was not written to its end."""
    found: dict[Block, float] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if match := FILE.fullmatch(entry.name):
                status = entry.stat()
                if status.st_size > block_bytes:
                    found[Block(match[1], match[2])] = status.st_mtime
                    continue
            if match or PART.fullmatch(entry.name):
                _unlink(Path(entry.path))
    return found


def oldest_first(found: dict[Block, float], root: str) -> list[Block]:
    """The blocks that hang on the root, those first that were wanted longest ago.

    A block is as recent as the most recent one behind it: a chain is given up from its end.
    """
    children: dict[str, list[Block]] = {}
    for block in {block.name: block for block in found if block.name != root}.values():
        children.setdefault(block.parent, []).append(block)
    reached: list[Block] = list(children.get(root, []))
    for block in reached:  # which grows: each one comes behind its parent
        reached += children.get(block.name, [])
    recent = {block.name: found[block] for block in reached}
    for block in reversed(reached):
        recent[block.parent] = max(recent.get(block.parent, 0.0), recent[block.name])
    reached.reverse()
    return sorted(reached, key=lambda block: recent[block.name])  # of equally recent ones the deeper stay in front


def make_way(cache_dir: Path, root: str, max_bytes: int) -> int:
    """Remove what other models have left here, the oldest first, until it is half of what may be; bytes that remain.

    What another process uses stays.
    """
    groups = [path for path in cache_dir.glob("kv-*") if GROUP.fullmatch(path.name) and path.name != f"kv-{root}"]
    sizes = {group: sum(_size(file) for file in _files(group)) for group in groups}
    total = sum(sizes.values())
    for group in sorted(groups, key=_age):
        if total > max_bytes // 2 and _remove(group):
            total -= sizes[group]
    return total


def free_bytes(folder: Path) -> int:
    """What the disk of a folder has left."""
    return shutil.disk_usage(folder).free


def _remove(group: Path) -> bool:
    """Remove a group's files; False if one of its shares is in use."""
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
