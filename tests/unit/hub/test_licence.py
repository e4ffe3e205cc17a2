"""The notice about the licence is shown once."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.hub.catalogue import CatalogueEntry, find_entry
from kimi_mlx.hub.licence import notice, show_once


def entry_of(alias: str) -> CatalogueEntry:
    entry = find_entry(alias)
    assert entry is not None
    return entry


def shown(*aliases: str) -> list[str]:
    texts: list[str] = []
    for alias in aliases:
        show_once(entry_of(alias), texts.append)
    return texts


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("alias", "display"),
    [
        ("kimi-k2", "Kimi K2"),
        ("kimi-k2.5", "Kimi K2.5"),
        ("kimi-k2.6", "Kimi K2.6"),
        ("kimi-k2.7-code", "Kimi K2.7 Code"),
    ],
)
def test_the_notice_has_the_display_name_and_both_limits(alias: str, display: str) -> None:
    text = notice(entry_of(alias))
    assert text is not None
    for words in (f'"{display}"', "100 million", "20 million US dollars", "https://huggingface.co/moonshotai/"):
        assert words in text


@pytest.mark.parametrize("alias", ["kimi-mini", "moonlight", "kimi-k3"])
def test_mit_and_refused_models_have_none(alias: str, state: Path) -> None:
    assert notice(entry_of(alias)) is None
    assert shown(alias) == []
    assert not list(state.iterdir())


def test_the_notice_is_shown_once_per_family(state: Path) -> None:
    texts = shown("kimi-k2", "kimi-k2", "kimi-k2-0905", "kimi-k2.5", "kimi-k2.5")
    assert [text.split('"')[1] for text in texts] == ["Kimi K2", "Kimi K2.5"]
    assert shown("kimi-k2") == []


def test_without_a_marker_file_it_is_shown_every_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))  # a folder cannot be created in a file
    assert len(shown("kimi-k2", "kimi-k2")) == 2
    monkeypatch.setattr("kimi_mlx.hub.licence.state_folder", lambda: None)
    assert len(shown("kimi-k2", "kimi-k2")) == 2
