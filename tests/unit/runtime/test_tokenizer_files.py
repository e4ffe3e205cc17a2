"""Tokenizer files that rank 0 sends to the front."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from kimi_mlx.errors import RingError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.tokenizer_files import pack_tokenizer_files, unpack_tokenizer_files
from tests.fakes import KIMI_MINI


def test_the_front_reads_the_same_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = pack_tokenizer_files(KIMI_MINI)
    assert not any(name.endswith(".safetensors") for name in files)
    folder = unpack_tokenizer_files(files)
    assert folder.is_relative_to(tmp_path)
    assert unpack_tokenizer_files(files) == folder
    text = "Two boats."
    assert ChatTokenizer.load(folder).encode(text) == ChatTokenizer.load(KIMI_MINI).encode(text)


@pytest.mark.parametrize("name", ["../config.json", "/tmp/config.json", "program.sh"])
def test_other_names_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RingError, match="unexpected name"):
        unpack_tokenizer_files({name: base64.b64encode(b"{}").decode()})
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
