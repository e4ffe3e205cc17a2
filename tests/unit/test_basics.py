"""Errors that cross processes, units, settings."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from kimi_mlx.errors import KimiMlxError, RingError, WeightsError
from kimi_mlx.folders import cache_folder, state_folder
from kimi_mlx.settings import Settings
from kimi_mlx.units import GB, GIB, format_bytes, format_rate, format_seconds, parse_bytes


@pytest.mark.parametrize("kind", [KimiMlxError, WeightsError, RingError])
def test_errors_can_be_pickled(kind: type[KimiMlxError]) -> None:
    error = pickle.loads(pickle.dumps(kind("it broke", hint="fix it", rank=3)))
    assert (type(error), str(error), error.hint, error.rank) == (kind, "it broke", "fix it", 3)


def test_units() -> None:
    assert [format_bytes(n) for n in (999, 1000, 577_600_000_000, 1.2e12)] == ["999 B", "1.0 kB", "577.6 GB", "1.2 TB"]
    assert [format_seconds(s) for s in (0.085, 2.409, 185)] == ["85 ms", "2.41 s", "3 min 5 s"]
    assert format_rate(20.06) == "20.1 tok/s"


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * GB), ("1.5 TB", 1500 * GB), ("2GiB", 2 * GIB), ("512mb", None), ("7", 7), ("10K", 10_000)],
)
def test_parse_bytes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="not a size"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "5 i", "5 apples", "5iB"])
def test_parse_bytes_refuses_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_settings_come_from_the_environment() -> None:
    assert Settings.from_environment({}).model == "kimi-mini"
    assert Settings.from_environment({"KIMI_MLX_MODEL": ""}).model == "kimi-mini"
    assert Settings.from_environment({"KIMI_MLX_MODEL": "moonlight"}).model == "moonlight"


def test_folders_follow_xdg_if_it_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert cache_folder() == Path("/caches/kimi-mlx")
    folder = state_folder()
    assert folder is not None
    assert folder.is_relative_to(tmp_path)
