"""History of the user's messages, in a file that several chats share.

The format is that of prompt_toolkit's FileHistory: an empty line, `# ` and the time, then the lines of the message,
each after a `+`. A line `# pasted START-END ...` before them has the pasted blocks, as ranges of characters.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from prompt_toolkit.history import History, InMemoryHistory

from kimi_mlx.cli.chat.input.pasted_blocks import PastedBlocks
from kimi_mlx.cli.chat.input.user_input import UserInput

MAX_ENTRY_BYTES = 100_000
"""Maximum size of a message in the file. A longer one is kept until the end of the program."""

MAX_FILE_BYTES = 4_000_000
"""Size of the file above which the older half of it is removed."""

LOCK_PATIENCE_S = 1.0
"""Time to wait for another chat that writes to the file."""

_PASTED = "# pasted "
_RANGE = re.compile(r"(\d+)-(\d+)")


class HistoryFile(History):
    """The history file. Errors of reading and writing are ignored: a full disk must not end the conversation.

    Args:
        path: file.
        blocks: pasted blocks of the conversation.
    """

    def __init__(self, path: Path, blocks: PastedBlocks):
        super().__init__()
        self._path = path
        self._blocks = blocks

    def load_history_strings(self) -> Iterable[str]:
        """Return the messages as edited texts, latest first."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return []
        return [self._blocks.collapse(message) for message in _parse(data)][::-1]

    def store_string(self, string: str) -> None:
        """Append a message."""
        data = _format(self._blocks.expand(string))
        if len(data) <= MAX_ENTRY_BYTES:
            with contextlib.suppress(OSError), _open_locked(self._path) as file:
                file.write(data)


def open_history(path: Path | None, blocks: PastedBlocks) -> History:
    """Open the history, readable only by its owner; without a file that can be written it is kept in memory."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _open_locked(path) as file:
            os.fchmod(file.fileno(), 0o600)
            _shorten(file)
    except OSError:
        return InMemoryHistory()
    return HistoryFile(path, blocks)


@contextmanager
def _open_locked(path: Path) -> Generator[BinaryIO, None, None]:
    """Open a file for appending while no other chat writes to it.

    After LOCK_PATIENCE_S it is opened without the lock: a chat that was stopped may hold it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "r+b") as file:
        end = time.monotonic() + LOCK_PATIENCE_S
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield file
        file.flush()


def _shorten(file: BinaryIO) -> None:
    """Remove the older half of a file that is too large, at the beginning of a message."""
    size = os.fstat(file.fileno()).st_size
    if size <= MAX_FILE_BYTES:
        return
    file.seek(size - MAX_FILE_BYTES // 2)
    data = file.read()
    kept = data[data.find(b"\n\n# ") + 1 :]
    file.truncate(0)
    file.write(kept)


def _format(message: UserInput) -> bytes:
    ranges = " ".join(f"{block.start}-{block.stop}" for block in message.pasted)
    head = [f"# {datetime.now()}", *([_PASTED + ranges] if ranges else [])]
    lines = [f"+{line}" for line in message.text.split("\n")]
    return "\n".join(["", *head, *lines, ""]).encode("utf-8", errors="replace")


def _parse(data: bytes) -> Iterator[UserInput]:
    """Yield the messages of a file; a message that was cut by a full disk is yielded as far as it goes."""
    lines: list[str] = []
    pasted = ""
    for line in [*data.decode("utf-8", errors="replace").split("\n"), ""]:
        if line.startswith("+"):
            lines.append(line[1:])
            continue
        if lines:
            text = "\n".join(lines)
            yield UserInput(text, _read_ranges(pasted, len(text)))
            lines, pasted = [], ""
        if line.startswith(_PASTED):
            pasted = line


def _read_ranges(line: str, length: int) -> tuple[range, ...]:
    """Return the ranges of pasted blocks; none if they do not fit the text."""
    ranges: Sequence[range] = [range(int(start), int(end)) for start, end in _RANGE.findall(line)]
    positions = [position for block in ranges for position in (block.start, block.stop)]
    return tuple(ranges) if positions == sorted(positions) and all(0 <= p <= length for p in positions) else ()
