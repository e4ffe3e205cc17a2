"""The file with the statistics of expert use: folders that cannot be used never stop a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kimi_mlx.model.expert_use import ExpertUse
from kimi_mlx.runtime.expert_streaming import USE_NAME, ExpertUseFile


def new_use() -> ExpertUse:
    return ExpertUse([1], [4], 2)


@pytest.fixture
def used() -> ExpertUse:
    use = new_use()
    use.observe(0, np.array([3]), np.array([9]), 9)
    return use


def scores_of(file: ExpertUseFile) -> list[float]:
    use = new_use()
    file.load(use)
    return use.scores(0).tolist()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kimi-mlx"


def test_a_store_that_cannot_be_written_keeps_its_statistics_in_the_cache(
    cache: Path, tmp_path: Path, used: ExpertUse
) -> None:
    (tmp_path / "store").write_text("not a folder")
    file = ExpertUseFile(tmp_path / "store", "key")
    file.save(used)
    assert len(list(cache.glob("expert-use/*.npz"))) == 1
    scores = scores_of(file)
    assert scores[3] > scores[0]


def test_a_note_says_that_nothing_is_kept(
    cache: Path, tmp_path: Path, used: ExpertUse, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text("not a folder")
    file = ExpertUseFile(tmp_path / "store", "key")
    (tmp_path / "store").write_text("")
    file.save(used)
    assert "is not kept for the next start" in caplog.text
    assert scores_of(file) == new_use().scores(0).tolist()


def test_folders_and_damaged_files_in_place_of_statistics_are_not_used(cache: Path, tmp_path: Path) -> None:
    (tmp_path / USE_NAME).mkdir()
    file = ExpertUseFile(tmp_path, "key")
    assert scores_of(file) == new_use().scores(0).tolist()
    (tmp_path / USE_NAME).rmdir()
    (tmp_path / USE_NAME).write_bytes(b"damaged")
    assert scores_of(file) == new_use().scores(0).tolist()
