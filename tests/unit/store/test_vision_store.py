"""The vision tower in stores: rank 0 alone has it, and a store without it gets it without a new download."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from kimi_mlx.errors import EngineError, WeightsError
from kimi_mlx.hub import retries
from kimi_mlx.hub.client import fetch_checkpoint, find_local, look_up
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.parallel.placement import Placement
from kimi_mlx.runtime.load import fingerprint
from kimi_mlx.store import prepare
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from kimi_mlx.store.locate import find_local_model
from kimi_mlx.store.manifest import MANIFEST_NAME, read_manifest
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.store.prepare import DownloadReport, prepare_stores
from kimi_mlx.store.rounds import BuildProgress
from kimi_mlx.store.store_folders import rank_folder
from kimi_mlx.store.stores import load_store, open_manifest
from kimi_mlx.store.vision import no_vision_error, sees_images, store_lacks_vision
from kimi_mlx.weights.index import lacks_vision
from tests.fakes import KIMI_MINI
from tests.hub import Hub, use
from tests.stores import building_stacks, make_format_2
from tests.vision_checkpoints import published_file, rewrite

NAME = "owner/model"
HEADERS_BYTES = 60_000
"""Largest number of bytes of the headers and small files of the repository."""


class Silent:
    """Observer of a download that shows nothing."""

    def __init__(self) -> None:
        self.skipped_bytes = 0

    def on_look_up(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def on_start(self, skipped_bytes: int) -> None:
        self.skipped_bytes = skipped_bytes

    def on_check(self, total_bytes: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        return contextlib.nullcontext(lambda count: None)

    def on_rewrite(self, total_bytes: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        return contextlib.nullcontext(lambda count: None)

    def on_build(self) -> contextlib.AbstractContextManager[Callable[[BuildProgress], None]]:
        return contextlib.nullcontext(lambda progress: None)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return rewrite(tmp_path / "repository", dict)


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    with Hub({NAME: repository}) as hub:
        use(hub, tmp_path / "home", monkeypatch)
        monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))
        yield hub


def download(tmp_path: Path, *, skips_vision: bool = False, **changes: bool) -> DownloadReport:
    options = StoreOptions(NAME, tmp_path / "stores", 2, skips_vision=skips_vision)
    return prepare_stores(resolve_model_name(NAME), options, SingleGroup(), Silent(), **changes)


def vision_bytes(repository: Path) -> int:
    return sum(file.stat().st_size for file in repository.glob("*.safetensors") if file.name > "model-00003")


def load(folder: Path, rank: int) -> Model:
    return load_store(folder, open_manifest(folder, rank, 2, "hybrid"), load_config(folder), mx.float32)


def sent_weights(hub: Hub) -> dict[str, int]:
    return {path.rpartition("/")[2]: count for path, count in hub.sent.items() if path.endswith(".safetensors")}


def make_earlier(folder: Path) -> None:
    """Make the manifests of stores without a tower those of an earlier version."""
    for path in folder.glob(f"rank-*/{MANIFEST_NAME}"):
        value = json.loads(path.read_text())
        value.pop("source_has_vision", None)
        path.write_text(json.dumps(value))


def test_only_the_store_of_rank_0_has_the_tower(hub: Hub, tmp_path: Path) -> None:
    folder = Path(download(tmp_path)["folder"])
    assert folder.name == "hybrid-2-a71267"  # as in the versions without vision
    manifests = [read_manifest(rank_folder(folder, rank)) for rank in (0, 1)]
    assert [manifest.vision is not None for manifest in manifests] == [True, False]
    assert [(rank_folder(folder, rank) / "vision.safetensors").exists() for rank in (0, 1)] == [True, False]
    assert [load(folder, rank).vision is not None for rank in (0, 1)] == [True, False]
    assert sees_images(folder, load_config(folder))
    hub.reset_counts()
    assert download(tmp_path)["state"] == "is on this machine"
    assert hub.requests == []


@pytest.mark.parametrize("is_earlier", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_store_without_a_tower_gets_it_without_a_new_download(
    hub: Hub, repository: Path, tmp_path: Path, is_earlier: bool
) -> None:
    whole = Path(download(tmp_path / "other")["folder"])
    folder = Path(download(tmp_path, skips_vision=True)["folder"])
    assert folder.name == whole.name  # one placement
    if is_earlier:
        make_earlier(folder)
    assert store_lacks_vision(folder)
    assert not sees_images(folder, load_config(folder))
    assert load(folder, 0).vision is None
    error = no_vision_error(folder, load_config(folder))
    assert error.hint == f"`kimi-mlx download {NAME} --ranks 2` adds it; the rest is not downloaded again"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    identity = fingerprint(folder, load_config(folder), 0, 2)
    hub.reset_counts()
    assert download(tmp_path, skips_vision=True)["state"] == "is on this machine"
    assert hub.requests == []
    planned = download(tmp_path, dry_run=True)
    assert planned["fetch_bytes"] == vision_bytes(repository)
    hub.reset_counts()
    download(tmp_path)
    assert vision_bytes(repository) <= hub.sent_bytes < vision_bytes(repository) + HEADERS_BYTES
    sent = sent_weights(hub)
    for file in repository.glob("*.safetensors"):
        is_vision = file.name > "model-00003"
        assert (sent[file.name] >= file.stat().st_size) == is_vision, file.name
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for path in whole.rglob("*.safetensors"):
        assert (folder / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert fingerprint(folder, load_config(folder), 0, 2) == identity  # the prompt cache on disk stays valid
    expected: dict[str, mx.array] = dict(tree_flatten(load(whole, 0).parameters()))
    ours: dict[str, mx.array] = dict(tree_flatten(load(folder, 0).parameters()))
    assert all(mx.array_equal(array, expected[name]) for name, array in ours.items())


def test_text_works_while_the_tower_is_added(hub: Hub, repository: Path, tmp_path: Path) -> None:
    folder = Path(download(tmp_path, skips_vision=True)["folder"])
    hub.fail("status", "*model-00004*.safetensors", status=404)
    with pytest.raises(WeightsError):
        download(tmp_path)
    assert find_local_model(resolve_model_name(NAME), 2) == folder
    assert load(folder, 0).vision is None
    hub.clear_faults()
    hub.reset_counts()
    download(tmp_path)
    assert load(folder, 0).vision is not None
    assert hub.sent_bytes < vision_bytes(repository) + HEADERS_BYTES


def test_without_the_hub_a_store_without_a_tower_stays_as_it_is(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    download(tmp_path, skips_vision=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download(tmp_path)["state"] == "is on this machine, without its vision tower"
    assert "cannot be added now" in caplog.text


def test_a_source_without_a_tower_is_asked_once(hub: Hub, repository: Path, tmp_path: Path) -> None:
    for number in (3, 4):
        (repository / f"model-{number:05}-of-000004.safetensors").unlink()
    index = repository / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {n: f for n, f in weight_map.items() if f < "model-00003"}}))
    folder = Path(download(tmp_path)["folder"])
    make_earlier(folder)
    download(tmp_path)
    hub.reset_counts()
    assert download(tmp_path)["state"] == "is on this machine"
    assert hub.requests == []
    assert "this checkpoint has no vision tower" in no_vision_error(folder, load_config(folder)).message


def test_an_interrupted_store_of_an_earlier_version_resumes_with_the_tower(tmp_path: Path) -> None:
    """The vision file sorts first here, but source files keep the numbers that are in the journal."""
    source = rewrite(tmp_path / "source", dict, lambda name: published_file(name).replace("model-00003", "model-00000"))
    stores = tmp_path / "stores"
    job = open_build_job(StoreOptions(source, stores, 1, skips_vision=True), SingleGroup())
    build(StoreOptions(source, stores, 1), job, SingleGroup())
    make_earlier(job.folder)
    (rank_folder(job.folder, 0) / "top.safetensors").unlink()
    for folder in (stores, tmp_path / "other"):
        job = open_build_job(StoreOptions(source, folder, 1), SingleGroup())
        build(StoreOptions(source, folder, 1), job, SingleGroup())
    for path in stores.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "other" / path.relative_to(stores)).read_bytes()


def test_a_store_with_stacks_gets_the_tower_and_records(
    hub: Hub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with building_stacks(), monkeypatch.context() as patch:
        patch.setattr(prepare, "rewrite_store", lambda folder, progress: None)
        folder = Path(download(tmp_path, skips_vision=True)["folder"])
    for rank in (0, 1):
        make_format_2(rank_folder(folder, rank))
        assert any(file.has_stacks for file in read_manifest(rank_folder(folder, rank)).files)
    hub.reset_counts()
    state = download(tmp_path)["state"]
    assert state == "is fetched and verified and rewritten, with a record for each expert"
    assert hub.sent_bytes < 1.1 * vision_bytes(repository)
    manifests = [read_manifest(rank_folder(folder, rank)) for rank in (0, 1)]
    assert [manifest.vision is not None for manifest in manifests] == [True, False]
    assert not any(file.has_stacks for manifest in manifests for file in manifest.files)
    fresh = Path(download(tmp_path / "fresh")["folder"])
    assert manifests == [read_manifest(rank_folder(fresh, rank)) for rank in (0, 1)]


def test_a_broken_tower_is_found_and_repaired(hub: Hub, repository: Path, tmp_path: Path) -> None:
    folder = Path(download(tmp_path)["folder"])
    path = rank_folder(folder, 0) / "vision.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    hub.reset_counts()
    assert download(tmp_path, verify=True, skips_vision=True)["broken"] == ["vision.safetensors"]
    assert path.read_bytes() == good
    assert hub.sent_bytes < vision_bytes(repository) + HEADERS_BYTES
    path.write_bytes(good[:100])
    with pytest.raises(WeightsError, match="has 100 bytes"):
        open_manifest(folder, 0, 2, "hybrid")


def test_the_cache_of_the_hub_gets_the_tower_later(hub: Hub, repository: Path) -> None:
    remote = look_up(NAME)
    folder = fetch_checkpoint(replace(remote, skips_vision=True))
    assert find_local(NAME) == folder  # text works
    assert lacks_vision(folder)
    error = no_vision_error(folder, load_config(folder))
    assert error.hint == f"`kimi-mlx download {NAME}` adds it; the rest is not downloaded again"
    hub.reset_counts()
    fetch_checkpoint(remote)
    assert hub.sent_bytes == vision_bytes(repository)
    assert sees_images(folder, load_config(folder))


def test_stores_of_text_models_are_as_before(tmp_path: Path) -> None:
    job = open_build_job(StoreOptions(KIMI_MINI, tmp_path, 2), SingleGroup())
    build(StoreOptions(KIMI_MINI, tmp_path, 2), job, SingleGroup())
    assert job.placement.digest == "d7fca4"  # as in the versions without vision
    for rank in (0, 1):
        value = json.loads((rank_folder(job.folder, rank) / MANIFEST_NAME).read_text())
        assert value.keys() == {"format", "origin", "placement", "rank", "files"}
        assert len(value["files"]) == 5
        assert all("has_vision" not in share for share in value["placement"]["shares"])
    assert Placement.from_dict(job.placement.to_dict()) == job.placement
    for name in ("kimi-mini", None):
        error = no_vision_error(KIMI_MINI, load_config(KIMI_MINI), name)
        assert isinstance(error, EngineError)
        assert error.message == "`kimi-mini` does not see images"


def test_hosts_with_and_without_the_tower_have_the_same_checkpoint(repository: Path) -> None:
    config = load_config(repository)
    before = fingerprint(repository, config, 0, 2).shared
    for number in (3, 4):
        (repository / f"model-{number:05}-of-000004.safetensors").unlink()
    assert fingerprint(repository, config, 0, 2).shared == before
    assert "files of its vision tower are missing" in no_vision_error(repository, config).message
