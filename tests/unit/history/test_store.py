"""The file of the history: its permissions, several processes, erasing, and files that cannot be used."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.errors import HistoryError
from kimi_mlx.history.database import FILE_NAME, MIGRATIONS
from kimi_mlx.history.log import ConversationLog
from kimi_mlx.history.media import MAX_MEDIA_BYTES
from kimi_mlx.history.store import HistoryStore
from kimi_mlx.text.messages import Delta, Message

SECRET = "a secret that nobody guesses"


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.fixture
def careless_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_only_the_user_can_read_the_files(careless_umask: None, tmp_path: Path) -> None:
    folder = tmp_path / "kimi-mlx" / "conversations"
    with closing(HistoryStore.open(folder)) as store:
        conversation = store.create("kimi-mini")
        store.add_message(conversation.number, Message("user", SECRET), "kimi-mini", {})
        expected = [FILE_NAME, f"{FILE_NAME}-shm", f"{FILE_NAME}-wal", "history.lock"]
        assert modes(folder) == dict.fromkeys(expected, 0o600)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_files_that_others_can_read_are_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch(0o644)
    tmp_path.chmod(0o755)
    HistoryStore.open(tmp_path).close()
    assert modes(tmp_path)[FILE_NAME] == 0o600
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from kimi_mlx.history.store import HistoryStore\n"
        "from kimi_mlx.text.messages import Delta, Message\n"
        "store = HistoryStore.open(Path(sys.argv[1])); number = store.create('m').number\n"
        "for turn in range(20):\n"
        "    store.add_message(number, Message('user', f'{sys.argv[2]} {turn}'), 'm', {'n': turn})\n"
        "    answer = store.begin_answer(number, 'm', {})\n"
        "    for index in range(20): store.add_delta(answer, index, Delta(f'{turn}.'))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "new")]
    writers = [subprocess.Popen([*command, name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    with closing(HistoryStore.open(tmp_path / "new")) as store:
        assert len({item.id for item in store.conversations()}) == 3
        for item in store.conversations():
            texts = [record.message.content for record in store.messages(item.number)]
            name = item.title[0]
            assert texts == [text for turn in range(20) for text in (f"{name} {turn}", f"{turn}." * 20)]


def test_erased_conversations_leave_nothing_in_the_files(store: HistoryStore) -> None:
    image = {"type": "image", "image": SECRET.encode() * 1000}
    kept, erased = store.create("m").number, store.create("m").number
    for number in (kept, erased):
        store.add_message(number, Message("user", "a question"), "m", {"system": "kept"})
    store.add_message(erased, Message("user", [image, {"type": "text", "text": SECRET}]), "m", {"system": SECRET})
    store.add_delta(store.begin_answer(erased, "m", {}), 0, Delta(SECRET))
    store.rename(erased, SECRET)
    folder = store.path.parent
    assert any(SECRET.encode() in path.read_bytes() for path in folder.iterdir())
    store.erase([erased])
    assert not any(SECRET.encode() in path.read_bytes() for path in folder.iterdir())
    assert [item.number for item in store.conversations()] == [kept]
    assert store.messages(kept)[0].settings == {"system": "kept"}


def test_an_image_is_erased_with_its_last_message(store: HistoryStore) -> None:
    image = Message("user", [{"type": "image", "image": SECRET.encode()}])
    numbers = [store.create("m").number for _ in range(2)]
    for number in numbers:
        store.add_message(number, image, "m", {})
    store.erase(numbers[:1])
    assert store.messages(numbers[1])[0].message == image
    store.erase(numbers[1:])
    assert SECRET.encode() not in store.path.read_bytes()


def test_a_large_video_is_not_stored(store: HistoryStore) -> None:
    number = store.create("m").number
    store.add_message(number, Message("user", [{"type": "video", "video": bytes(MAX_MEDIA_BYTES + 1)}]), "m", {})
    text = "[video of 32.0 MB, not stored in the history]"
    assert store.messages(number)[0].message.content == [{"type": "text", "text": text}]


def test_a_removed_conversation_cannot_be_continued(store: HistoryStore) -> None:
    number = store.create("m").number
    store.erase([number])
    with pytest.raises(HistoryError):
        store.add_message(number, Message("user", "Hello"), "m", {})
    with pytest.raises(HistoryError, match="was removed"):
        store.conversation(number)


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    HistoryStore.open(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(
        HistoryError, match=f"version 7 of the history; this kimi-mlx knows {len(MIGRATIONS)}"
    ) as caught:
        HistoryStore.open(tmp_path)
    assert caught.value.hint == "update kimi-mlx"


@pytest.mark.parametrize("damage", ["no database", "header only"])
def test_a_broken_file_is_left_alone(tmp_path: Path, damage: str) -> None:
    HistoryStore.open(tmp_path).close()
    path = tmp_path / FILE_NAME
    data = path.read_bytes()
    broken = b"not SQLite" * 1000 if damage == "no database" else data[:100] + bytes(len(data) - 100)
    path.write_bytes(broken)
    with pytest.raises(HistoryError, match="cannot use the history") as caught:
        HistoryStore.open(tmp_path).conversations()
    assert caught.value.hint is not None
    assert f"mv '{tmp_path}'" in caught.value.hint
    assert path.read_bytes() == broken


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HistoryError, match="cannot use the history"):
        HistoryStore.open(tmp_path / "file" / "folder")


def test_a_file_that_another_process_has_locked(store: HistoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store._connection.execute("PRAGMA busy_timeout = 50")
        with pytest.raises(HistoryError, match="database is locked") as caught:
            store.create("m")
        other.execute("ROLLBACK")
    assert caught.value.hint is not None
    assert "try again" in caught.value.hint
    assert store.create("m").num_turns == 0


@pytest.mark.parametrize(
    ("table", "document"),
    [
        *(("messages", text) for text in ("{nope", "7", "[]", "null", '{"role": "user", "tool_calls": 7}', "[" * 5000)),
        *(
            ("settings", text)
            for text in ("7", '{"sampling": 7}', '{"template": []}', '{"max_tokens": "x"}', '{"system": {}}')
        ),
    ],
)
def test_damaged_rows_are_errors_in_words(store: HistoryStore, log: ConversationLog, table: str, document: str) -> None:
    message = Message("user", "Hello")
    log.on_message(message)
    (conversation,) = store.conversations()
    store._connection.execute(f"UPDATE {table} SET document = ?", (document,))
    with pytest.raises(HistoryError, match="is damaged") as caught:
        store.messages(conversation.number)
    assert "mv " in (caught.value.hint or "")
