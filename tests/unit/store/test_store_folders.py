"""Folders of stores: different sources never share one, and stores of earlier versions are still found."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from kimi_mlx.store.journal import newest_commit, partial_stores
from kimi_mlx.store.locate import find_local_model, stored_strategy, stores_root
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.store.remove import find_removable
from kimi_mlx.store.store_folders import rank_folder, source_folder
from kimi_mlx.store.stores import find_stores
from tests.fakes import KIMI_MINI

FOLDER = str(KIMI_MINI.resolve())
REPOSITORY = FOLDER.strip("/")
SOURCES = ["a/b", "/a/b", "/a--b", "/a/b--c", "/a--b/c", "/", "/a", "/x/a", f"/{'ü' * 250}", f"a/{'x' * 300}"]


def build_mini(stores: Path) -> BuildJob:
    options = StoreOptions(KIMI_MINI, stores, 2)
    job = open_build_job(options, SingleGroup())
    build(options, job, SingleGroup())
    return job


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildJob:
    """A store where earlier versions put it, under the name of a repository."""
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path))
    job = build_mini(tmp_path)
    source_folder(tmp_path, FOLDER).rename(tmp_path / REPOSITORY.replace("/", "--"))
    return job


def test_different_sources_have_different_folders(tmp_path: Path) -> None:
    folders = [source_folder(tmp_path, source) for source in SOURCES]
    assert not any(first == second for first, second in itertools.combinations(folders, 2))
    for folder in folders:
        assert folder.parent == tmp_path
        folder.mkdir()


def test_a_store_of_an_earlier_version_is_found_and_used(tmp_path: Path, earlier: BuildJob) -> None:
    (store,) = find_stores(tmp_path, FOLDER)
    assert store.folder.parent.parent.name == REPOSITORY.replace("/", "--")
    model = resolve_model_name(FOLDER)
    assert find_local_model(model, 2) == store.folder
    assert stored_strategy(model, 2) == "hybrid"
    assert partial_stores(tmp_path, FOLDER, 2, None) == [store.folder]
    assert newest_commit(tmp_path, FOLDER, 2, "hybrid") == store.origin.commit
    assert open_build_job(StoreOptions(KIMI_MINI, tmp_path, 2), SingleGroup()).folder == store.folder
    (removable,) = find_removable(model)
    assert removable.folder == store.folder.parent.parent


def test_a_store_is_not_found_by_the_name_of_another_source(tmp_path: Path, earlier: BuildJob) -> None:
    assert find_stores(tmp_path, REPOSITORY) == []
    assert partial_stores(tmp_path, REPOSITORY, 2, None) == []
    assert newest_commit(tmp_path, REPOSITORY, 2, "hybrid") is None


def test_a_build_does_not_overwrite_the_store_of_another_source(tmp_path: Path) -> None:
    job = build_mini(tmp_path)
    journal = rank_folder(job.folder, 1) / "journal.jsonl"
    journal.write_text(journal.read_text().replace(FOLDER, "/another/folder"))
    before = (rank_folder(job.folder, 1) / "top.safetensors").stat()
    with pytest.raises(WeightsError, match=f"contains a store of `/another/folder`, not of `{FOLDER}`"):
        build_mini(tmp_path)
    assert (rank_folder(job.folder, 1) / "top.safetensors").stat() == before


def test_a_broken_variable_of_the_stores_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_MLX_STORES", '"/data/stores"')
    with pytest.raises(UsageError, match='`KIMI_MLX_STORES` contains `"`, at position 1 of 14'):
        stores_root()
