"""The SQLite file of the history: its location, its schema, and its errors."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from kimi_mlx.errors import HistoryError
from kimi_mlx.folders import data_folder

FILE_NAME = "history.sqlite3"
BUSY_S = 5.0
"""Time to wait for another process that writes."""
CHECKPOINT_PAGES = 4000
"""Number of pages (16 MB) in the write-ahead log after which SQLite copies them into the file and flushes it."""

MIGRATIONS = (
    # version 1
    """
    CREATE TABLE conversations (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        title TEXT NOT NULL DEFAULT '',
        is_named INTEGER NOT NULL DEFAULT 0,
        model TEXT NOT NULL,
        parent TEXT,
        created_s REAL NOT NULL,
        updated_s REAL NOT NULL
    );
    CREATE TABLE settings (number INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, document TEXT NOT NULL);
    CREATE TABLE messages (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversations (number) ON DELETE CASCADE,
        role TEXT NOT NULL,
        document TEXT,
        model TEXT NOT NULL,
        settings INTEGER REFERENCES settings (number),
        finish_reason TEXT,
        statistics TEXT,
        created_s REAL NOT NULL,
        finished_s REAL,
        removed_s REAL
    );
    CREATE INDEX messages_of_conversation ON messages (conversation, number);
    CREATE TABLE deltas (
        message INTEGER NOT NULL REFERENCES messages (number) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        document TEXT NOT NULL,
        PRIMARY KEY (message, number)
    ) WITHOUT ROWID;
    CREATE TABLE media (sha256 TEXT PRIMARY KEY, contents BLOB NOT NULL);
    CREATE TABLE media_of_messages (
        message INTEGER NOT NULL REFERENCES messages (number) ON DELETE CASCADE,
        sha256 TEXT NOT NULL REFERENCES media (sha256),
        PRIMARY KEY (message, sha256)
    ) WITHOUT ROWID;
    CREATE INDEX messages_of_media ON media_of_messages (sha256);
    """,
)
"""SQL that takes a file from one version to the next. The version is `PRAGMA user_version`; a new file has 0."""


def history_folder() -> Path | None:
    """Return the folder of the history; None for a user without a home folder."""
    folder = data_folder()
    return None if folder is None else folder / "conversations"


def connect(folder: Path) -> sqlite3.Connection:
    """Open the file of the history, and create it if it does not exist, readable only by the user.

    SQLite gives its files `-wal` and `-shm` the mode of the file itself.

    Args:
        folder: folder of the file.

    Raises:
        HistoryError: the file cannot be used, is broken, or belongs to a newer version of kimi-mlx.
    """
    path = folder / FILE_NAME
    with history_errors(path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Choose how SQLite writes, and bring the schema up to date.

    With a write-ahead log and `synchronous = NORMAL`, a transaction is one write without a flush: a killed process
    loses nothing; a power failure may lose the last seconds.
    """
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA temp_store = MEMORY")  # VACUUM would write a copy into the folder for temporary files
    connection.execute("PRAGMA foreign_keys = ON")
    _retry_while_locked(connection, "PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_PAGES * 4096}")
    if _version(connection) == len(MIGRATIONS):
        return
    with transaction(connection):
        version = _version(connection)  # again: another process may have done it
        if version > len(MIGRATIONS):
            raise HistoryError(
                f"`{path}` has version {version} of the history; this kimi-mlx knows {len(MIGRATIONS)}",
                hint="update kimi-mlx",
            )
        for migration in MIGRATIONS[version:]:
            for statement in migration.split(";\n"):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _retry_while_locked(connection: sqlite3.Connection, statement: str) -> None:
    """Execute a statement for which SQLite does not wait itself while another process opens the file."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Generator[None]:
    """Execute all statements of a block, or none of them."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has ended the transaction already
            connection.execute("ROLLBACK")
        raise


def is_busy(error: sqlite3.Error) -> bool:
    """Return whether another process holds the lock of the file."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


@contextmanager
def history_errors(path: Path) -> Generator[None]:
    """Convert errors of SQLite and of the file system to a HistoryError with a remedy.

    Args:
        path: file of the history.

    Raises:
        HistoryError: the block failed.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise to_history_error(error, path) from error


def to_history_error(error: OSError | sqlite3.Error, path: Path) -> HistoryError:
    """Return the error of the history for one of SQLite or of the file system.

    Args:
        error: error.
        path: file of the history.
    """
    if isinstance(error, OSError):
        hint = f"check the permissions of `{path.parent}`"
        return HistoryError(f"cannot use the history in `{error.filename or path}`: {error.strerror}", hint=hint)
    return HistoryError(f"cannot use the history in `{path}`: {error}", hint=_remedy(error, path))


def broken_file_hint(path: Path) -> str:
    """Return the hint for a broken file of the history."""
    return f"to begin a new one, type `mv '{path.parent}' '{path.parent}.broken'`"


def _remedy(error: sqlite3.Error, path: Path) -> str:
    text = str(error)
    if is_busy(error):
        return "another kimi-mlx is writing to it; try again"
    if "full" in text:
        return "free some space"
    if "malformed" in text or "not a database" in text or "no such" in text:
        return broken_file_hint(path)
    if "protocol" in text or "disk I/O" in text:
        return "SQLite needs a local disk; set XDG_DATA_HOME to a folder on one"
    return f"check the permissions of `{path.parent}`"
