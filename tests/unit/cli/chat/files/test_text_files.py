"""Text files of a message: decoding, refusal of what is no text, and the fence around them."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cli.chat.files.text_files import (
    MAX_TEXT_BYTES,
    TextFile,
    as_message_part,
    read_text_file,
    with_text_files,
)
from kimi_mlx.errors import UsageError
from tests.examples import examples


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        ("naïve 漢字\r\n\ttab\n".encode(), "naïve 漢字\r\n\ttab\n", "UTF-8"),
        ("naïve".encode("utf-8-sig"), "naïve", "UTF-8"),
        ("naïve 漢字".encode("utf-16"), "naïve 漢字", "UTF-16"),
        (b"\xfe\xff" + "naïve".encode("utf-16-be"), "naïve", "UTF-16"),
        ("naïve".encode("utf-32"), "naïve", "UTF-32"),
        ("ein Löwe, „groß“".encode("cp1252"), "ein Löwe, „groß“", "Latin-1"),
        (b"\x81 caf\xe9", "\x81 café", "Latin-1"),
        ("漢字漢字".encode() + b"\xe6", "漢字漢字\ufffd", "UTF-8"),  # cut in the middle of a character
        (b"\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m", "UTF-8"),
        (b"", "", "UTF-8"),
    ],
)
def test_encodings(tmp_path: Path, data: bytes, text: str, encoding: str) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    assert read_text_file(path) == TextFile(str(path), text, len(data), encoding)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.out", b"\x7fELF\x02\x01\x01\x00\x00", "is not a text file: byte 7 is zero"),
        ("a.gz", gzip.compress(bytes(range(256))), "is not a text file"),
        ("odd", b"\xff\xfea", "it begins like UTF-16 and is not"),
        ("latin", b"\xe9\xe9\x02", r"has the control character \x02"),
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_text_file(path)


def test_hints_for_images_and_pdf(tmp_path: Path) -> None:
    for name, hint in (("a.png", "/image"), ("a.mp4", "/video"), ("a.PDF", "pdftotext")):
        (tmp_path / name).write_bytes(b"\0")
        with pytest.raises(UsageError, match="not a text file") as refused:
            read_text_file(tmp_path / name)
        assert hint in str(refused.value.hint)


def test_paths_that_are_no_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "notes.txt").write_text("x")
    for path, message in (
        (tmp_path, "is a folder, not a text file"),
        (tmp_path / "pipe", "is a pipe, not a file"),
        (Path("/dev/zero"), "is a device, not a file"),
        (tmp_path / "note.txt", "there is no file"),
        (Path("https://example.org/a.txt"), "a text file is a file here, not a URL"),
    ):
        with pytest.raises(UsageError, match=message):
            read_text_file(path)
    with pytest.raises(UsageError) as missing:
        read_text_file(tmp_path / "note.txt")
    assert missing.value.hint == f"did you mean `{tmp_path / 'notes.txt'}`?"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        read_text_file(path)


def test_a_file_that_no_context_holds_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "large.log"
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UsageError, match=r"has 1\.0 TB, more than the limit of 16\.0 MB"):
        read_text_file(path)
    assert MAX_TEXT_BYTES == 16_000_000


@examples(100)
@given(st.text(alphabet="`~a\n\r "))
def test_no_text_ends_its_own_fence(text: str) -> None:
    name, fence, *lines = as_message_part(TextFile("a", text, 0)).split("\n")
    assert (name, set(fence)) == ("File: a", {"`"})
    assert len(fence) >= 3
    assert lines[-1] == fence
    assert "\n".join(lines[:-1]) in (text, text.removesuffix("\n"))
    assert fence not in text


def test_files_come_before_the_text() -> None:
    files = [TextFile("a.py", "pass\n", 5), TextFile("b.md", "```\ncode\n```", 10)]
    assert with_text_files("Why?", files) == (
        "File: a.py\n```\npass\n```\n\nFile: b.md\n````\n```\ncode\n```\n````\n\nWhy?"
    )
    assert with_text_files("", files[:1]) == "File: a.py\n```\npass\n```"
