"""Folders of the user, and of shard stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.folders import VARIABLES, cache_folder, data_folder, state_folder, stores_folder, variable_of


def test_folders_follow_absolute_xdg_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert cache_folder() == Path("/caches/kimi-mlx")
    folder = state_folder()
    assert folder is not None
    assert folder.is_relative_to(tmp_path)


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


def test_the_variable_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("XDG_DATA_HOME", "/home/x/data")
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert variable_of("/home/x/data/kimi-mlx/stores/a--b") == "KIMI_MLX_STORES"
    assert variable_of(f"{cache_folder()}/synthetic") == "XDG_CACHE_HOME"
    assert variable_of("/home/x/.cache/huggingface/hub/a") == "HF_HOME"
    assert variable_of("/scratch/a") == "TMPDIR"
    assert variable_of("/home/x/data/other") == "XDG_DATA_HOME"
    assert variable_of("/home/x/mine") is None
    assert variable_of("/scratch-a") is None
