"""A repository as the source of stores: headers that arrive broken, files in the cache, and no network."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.errors import WeightsError
from kimi_mlx.hub import retries
from kimi_mlx.hub.client import fetch_checkpoint, find_repository, look_up
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from kimi_mlx.store.hub_source import HubSource, read_contents
from tests.fakes import KIMI_MINI
from tests.hub import COMMIT, Hub, use

NAME = "owner/model"
FILE = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(KIMI_MINI, tmp_path / "model")


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    with Hub({NAME: model}) as hub:
        use(hub, tmp_path / "home", monkeypatch)
        yield hub


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("position", [0, 7, 8], ids=["size", "last byte of the size", "brace"])
def test_a_broken_header_is_downloaded_again(hub: Hub, position: int) -> None:
    expected = read_contents(look_up(NAME))
    hub.fail("corrupt", "/cdn/*.safetensors", after_bytes=position, times=2 if position == 8 else 1)
    assert read_contents(look_up(NAME)) == expected


def test_a_header_that_stays_broken_is_an_error(hub: Hub) -> None:
    hub.fail("corrupt", "/cdn/*.safetensors", after_bytes=7)
    with pytest.raises(
        WeightsError, match=rf"`{FILE}` is not a safetensors file.* \(3 downloads of it from `{NAME}`\)"
    ):
        read_contents(look_up(NAME))


@pytest.mark.parametrize("name", ["config.json", "tiktoken.model"])
def test_a_broken_small_file_is_downloaded_again(hub: Hub, model: Path, name: str) -> None:
    hub.fail("corrupt", f"*/{name}", after_bytes=0, times=1)
    assert read_contents(look_up(NAME)).small_files[name] == (model / name).read_bytes()


def test_a_file_must_have_the_header_that_was_planned_with(hub: Hub, tmp_path: Path) -> None:
    repository = look_up(NAME)
    contents = read_contents(repository)
    name, info = next(iter(contents.headers[FILE].items()))
    wrong = {FILE: {**contents.headers[FILE], name: replace(info, start=info.start + 1)}}
    source = HubSource(repository, replace(contents, headers=wrong), tmp_path / "sources")
    with pytest.raises(WeightsError, match="does not have the header that was received before"):
        source.fetch(FILE, lambda count: None, threading.Event())


@pytest.mark.parametrize(
    "has_links", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["links", "copied files"]
)
def test_stores_are_built_offline_from_the_cache(
    hub: Hub, tmp_path: Path, has_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = StoreOptions(NAME, tmp_path / "online", 2)
    expected = build(options, open_build_job(options, SingleGroup()), SingleGroup())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_SYMLINKS", not has_links)
    folder = fetch_checkpoint(look_up(NAME))
    shutil.rmtree(folder.parent.parent / "refs")
    go_offline(monkeypatch)
    hub.reset_counts()
    options = replace(options, stores=tmp_path / "offline")
    job = open_build_job(options, SingleGroup())
    assert build(options, job, SingleGroup()) == expected
    assert job.source.contents.origin.commit == COMMIT
    assert hub.requests == []
    assert (folder / FILE).is_file()


def test_stores_are_built_from_the_commit_on_this_machine(hub: Hub, model: Path, tmp_path: Path) -> None:
    fetch_checkpoint(look_up(NAME))
    hub.commits[NAME] = "b" * 40
    (model / "generation_config.json").write_text("{}")
    job = open_build_job(StoreOptions(NAME, tmp_path / "stores", 2), SingleGroup())
    assert job.source.contents.origin.commit == COMMIT
    assert find_repository(NAME).commit == "b" * 40
