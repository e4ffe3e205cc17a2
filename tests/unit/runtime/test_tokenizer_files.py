"""Tokenizer files of a ring: written to the cache, else to a temporary folder of the user's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kimi_mlx.errors import RingError
from kimi_mlx.runtime.tokenizer_files import pack_tokenizer_files, unpack_tokenizer_files
from tests.fakes import KIMI_MINI


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file where the cache and the temporary folder would be."""
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return path


def test_files_are_the_same_on_the_other_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = unpack_tokenizer_files(pack_tokenizer_files(KIMI_MINI))
    assert folder.is_relative_to(tmp_path)
    assert (folder / "tiktoken.model").read_bytes() == (KIMI_MINI / "tiktoken.model").read_bytes()
    with pytest.raises(RingError, match="unexpected name"):
        unpack_tokenizer_files({"../evil": ""})


def test_an_unusable_cache_is_replaced_by_a_private_temporary_folder(file: Path) -> None:
    files = pack_tokenizer_files(KIMI_MINI)
    folder = unpack_tokenizer_files(files)
    own = file.parent / f"kimi-mlx-{os.getuid()}"
    assert folder.is_relative_to(own)
    assert own.stat().st_mode & 0o777 == 0o700
    assert unpack_tokenizer_files(files) == folder  # runs do not add up


def test_a_temporary_folder_of_others_is_refused(file: Path) -> None:
    (file.parent / f"kimi-mlx-{os.getuid()}").symlink_to("/")
    with pytest.raises(RingError, match="cannot be written on this machine: Other users may write to it") as caught:
        unpack_tokenizer_files(pack_tokenizer_files(KIMI_MINI))
    assert "XDG_CACHE_HOME or TMPDIR" in (caught.value.hint or "")


def test_without_any_folder_it_is_one_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(file))
    with pytest.raises(RingError, match="cannot be written on this machine"):
        unpack_tokenizer_files(pack_tokenizer_files(KIMI_MINI))
