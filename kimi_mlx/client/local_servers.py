"""Servers of this user on this machine: each writes what it serves to a file, which it keeps locked while it runs.

A process id may be in use again after a restart, a lock cannot: a file without a lock is a leftover and is removed.
Keys are not written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Generator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import httpx2

from kimi_mlx.folders import state_folder

ANSWER_S = 2.0
"""Time in which a server on this machine must answer a request for its health."""


@dataclass(frozen=True)
class LocalServer:
    """A server on this machine.

    Args:
        url: address for programs on this machine.
        model: name of the model for people.
        source: repository of the model, or absolute path of its folder.
        weights_bytes: size of the model's weights; 0 if it is not known.
        hosts: hosts that hold the model, if it was launched on hosts.
        needs_key: whether requests need a key.
        pid: process id of the server.
        started_at: Unix time in seconds at which it was ready.
    """

    url: str
    model: str
    source: str
    weights_bytes: int
    hosts: tuple[str, ...]
    needs_key: bool
    pid: int
    started_at: float


def servers_folder() -> Path | None:
    """Return the folder of the files; None for a user without a home folder."""
    folder = state_folder()
    return None if folder is None else folder / "servers"


@contextlib.contextmanager
def announce(server: LocalServer) -> Generator[None]:
    """Announce a server to this user's other processes until the end of the block.

    Nothing happens if the folder cannot be written: the server works without it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            _write(server, stack)
        yield


def find_servers() -> list[LocalServer]:
    """Return the servers that run now, the newest first; remove the files of others."""
    folder = servers_folder()
    found: list[LocalServer] = []
    for path in () if folder is None else folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            server = _read(path)
            if server is not None:
                found.append(server)
    return sorted(found, key=lambda server: -server.started_at)


def is_answering(server: LocalServer) -> bool:
    """Return whether our server answers at its address: also while its ring restarts, but not another program there."""
    try:
        answer: Any = httpx2.get(f"{server.url}/health", timeout=ANSWER_S, trust_env=False).json()
        return {"status", "running", "waiting"} <= set(answer)
    except (httpx2.HTTPError, ValueError, TypeError):
        return False


def _write(server: LocalServer, stack: contextlib.ExitStack) -> None:
    folder = servers_folder()
    if folder is None:
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, part = folder / f"{server.pid}.json", folder / f"{server.pid}.part"
    part.unlink(missing_ok=True)
    file = stack.enter_context(os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w"))
    fcntl.flock(file, fcntl.LOCK_EX)  # before the file has its name: no other process may see it unlocked
    stack.callback(path.unlink, missing_ok=True)
    json.dump(asdict(server), file)
    file.flush()
    part.replace(path)


def _read(path: Path) -> LocalServer | None:
    """Return the server of a file; None, after removing the file, if it has ended."""
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # it runs
            values = json.load(file)
            known: dict[str, Any] = {item.name: values[item.name] for item in fields(LocalServer)}
            known["hosts"] = tuple(known["hosts"])
            return LocalServer(**known)
        path.unlink()
        return None
