"""Folders of shard stores and of the user; units of memory and context."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.folders import data_folder, stores_folder
from kimi_mlx.units import format_context, format_gib


def test_stores_are_in_the_data_folder_unless_configured_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert data_folder() == Path("/data/kimi-mlx")
    for value, stores in {
        "": Path("/data/kimi-mlx/stores"),
        "/big/disk": Path("/big/disk"),
        "~/stores": tmp_path / "stores",
    }.items():
        monkeypatch.setenv("KIMI_MLX_STORES", value)
        assert stores_folder() == stores
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    folder = data_folder()
    assert folder is not None
    assert folder.is_relative_to(tmp_path)


def test_units_of_memory_and_context() -> None:
    assert format_gib(1_029_200_000_000) == "958.5 GiB"
    assert [format_context(tokens) for tokens in (8192, 131_072, 262_144, 1_048_576)] == ["8k", "128k", "256k", "1M"]
