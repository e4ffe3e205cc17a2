"""The history file: several lines, pasted blocks, several chats at once, and limits."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from kimi_mlx.cli.chat.input import history_file
from kimi_mlx.cli.chat.input.history_file import MAX_ENTRY_BYTES, HistoryFile, open_history
from kimi_mlx.cli.chat.input.pasted_blocks import PastedBlocks

LINES = "".join(f"line {number}\n" for number in range(48))


def opened(path: Path) -> History:
    return open_history(path, PastedBlocks())


def messages(path: Path) -> list[str]:
    """All messages with the pasted texts in them, oldest first."""
    blocks = PastedBlocks()
    return [blocks.expand(text).text for text in open_history(path, blocks).load_history_strings()][::-1]


def test_messages_come_back_latest_first(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "history"
    history = opened(path)
    for text in ("one", "two\nlines\n", "", "+# odd\n\n# lines\r\n", "漢字 \ud800"):
        history.append_string(text)
    assert messages(path) == ["one", "two\nlines\n", "", "+# odd\n\n# lines\r\n", "漢字 ?"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(FileHistory(path).load_history_strings())[-1] == "one"  # the format is prompt_toolkit's


def test_pasted_blocks_are_kept_as_blocks(tmp_path: Path) -> None:
    path = tmp_path / "history"
    blocks = PastedBlocks()
    open_history(path, blocks).append_string(f"Why {blocks.add(LINES)}?")
    again = PastedBlocks()
    (edited,) = open_history(path, again).load_history_strings()
    assert (len(edited), again.label(edited[4])) == (len("Why x?"), "[pasted 48 lines]")
    assert again.expand(edited).text == f"Why {LINES}?"
    path.write_text(path.read_text().replace("# pasted 4-", "# pasted 9999999-"))
    assert messages(path) == [f"Why {LINES}?"]  # wrong ranges are ignored


def test_a_huge_message_stays_out_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history = opened(path)
    history.append_string("x" * (MAX_ENTRY_BYTES - 100))
    history.append_string("y" * MAX_ENTRY_BYTES)
    assert [text[0] for text in messages(path)] == ["x"]
    assert history.get_strings()[-1][0] == "y"  # until the end of the program


def test_an_old_part_of_a_large_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_file, "MAX_FILE_BYTES", 10_000)
    path = tmp_path / "history"
    history = opened(path)
    for number in range(400):
        history.append_string(f"message {number}\nsecond line")
    left = messages(path)
    assert path.stat().st_size <= 5_000
    assert left == [f"message {number}\nsecond line" for number in range(400 - len(left), 400)]
    assert 40 < len(left) < 100


def write_many(path: Path, name: str) -> None:
    history = opened(path)
    for number in range(100):
        history.append_string(f"{name} {number}\n" + name * 3000)


def test_two_chats_at_once_do_not_damage_the_file(tmp_path: Path) -> None:
    path = tmp_path / "history"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    texts = messages(path)
    for name in "ab":
        of_one = [text for text in texts if text.startswith(name)]
        assert of_one == [f"{name} {number}\n" + name * 3000 for number in range(100)]
    assert len(texts) == 200


def test_a_message_that_was_cut_does_not_damage_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "history"
    opened(path).append_string("a long message\nof two lines")
    data = path.read_bytes()
    path.write_bytes(data[:-6])
    opened(path).append_string("next")
    assert messages(path) == ["a long message\nof two ", "next"]


def test_a_chat_that_holds_the_lock_is_not_waited_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_file, "LOCK_PATIENCE_S", 0.05)
    path = tmp_path / "history"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        opened(path).append_string("one")
    assert messages(path) == ["one"]


def test_errors_of_the_disk_are_ignored(tmp_path: Path) -> None:
    assert isinstance(open_history(None, PastedBlocks()), InMemoryHistory)
    (tmp_path / "file").write_text("")
    assert isinstance(open_history(tmp_path / "file" / "history", PastedBlocks()), InMemoryHistory)
    history = HistoryFile(Path("/dev/full"), PastedBlocks())
    history.append_string("lost")
    assert history.get_strings() == ["lost"]
    os.mkdir(tmp_path / "folder")
    assert list(HistoryFile(tmp_path / "folder", PastedBlocks()).load_history_strings()) == []
