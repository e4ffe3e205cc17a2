"""Repositories: listing, order of downloads, and the resulting cache."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download

from kimi_mlx.errors import ConfigError, WeightsError
from kimi_mlx.hub import client as hub_module
from kimi_mlx.hub.cache import blob_path
from kimi_mlx.hub.client import (
    Repository,
    RepositoryFile,
    cached_file,
    fetch_checkpoint,
    fetch_to_cache,
    find_local,
    is_complete,
    look_up,
    needed_files,
    read_range,
    remove_cached,
    verify_checkpoint,
)
from kimi_mlx.hub.partial_file import part_path
from kimi_mlx.weights.index import INDEX_NAME, checkpoint_files
from tests.hub import COMMIT, Hub

WEIGHTS = [f"model-{number}-of-3.safetensors" for number in (1, 2, 3)]
SMALL = ["chat_template.jinja", "config.json", "generation_config.json", "tiktoken.model", "tokenizer_config.json"]
NEEDED = sorted([*SMALL, *WEIGHTS[:2], INDEX_NAME])


@pytest.fixture
def repository(hub: Hub) -> Repository:
    return look_up("owner/model")


def weight_requests(hub: Hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("GET") and request.endswith(".safetensors")]


def test_look_up_lists_the_files(hub: Hub, repository: Repository, model: Path) -> None:
    assert [request for request in hub.requests if "owner" in request] == ["GET /api/models/owner/model"]
    assert (repository.name, repository.commit, repository.revision) == ("owner/model", COMMIT, "main")
    assert [file.name for file in repository.files] == sorted([*SMALL, *WEIGHTS, INDEX_NAME])
    for file in repository.files:
        assert file.size_bytes == (model / file.name).stat().st_size
        is_large = file.name.endswith((".safetensors", "tiktoken.model"))
        assert (file.sha256 is not None) == is_large
        assert (file.blob_id is not None) == (not is_large)
    assert Repository.from_dict(json.loads(json.dumps(repository.to_dict()))) == repository
    with pytest.raises(WeightsError, match="has no file `x`"):
        repository.file("x")


def test_look_up_of_a_commit(hub: Hub) -> None:
    assert look_up("owner/model", COMMIT).revision == COMMIT
    with pytest.raises(WeightsError, match="does not have this revision"):
        look_up("owner/model", "v7")


def test_a_checkpoint_is_fetched_once(hub: Hub, repository: Repository, model: Path) -> None:
    progress: list[int] = []
    folder = fetch_checkpoint(repository, progress.append)
    assert sorted(path.name for path in folder.iterdir()) == NEEDED
    for name in NEEDED:
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    size = sum((model / name).stat().st_size for name in NEEDED)
    assert sum(progress) == size == hub.sent_bytes
    assert is_complete(folder)
    assert [file.name for file in checkpoint_files(folder)] == WEIGHTS[:2]
    assert find_local("owner/model") == find_local("owner/model", COMMIT) == folder
    assert verify_checkpoint(repository) == []
    hub.reset_counts()
    progress.clear()
    assert fetch_checkpoint(repository, progress.append) == folder
    assert sum(progress) == size
    assert hub.requests == []


def test_huggingface_hub_finds_our_download(hub: Hub, repository: Repository) -> None:
    folder = fetch_checkpoint(repository)
    hub.reset_counts()
    assert Path(snapshot_download("owner/model", local_files_only=True)) == folder
    assert Path(hf_hub_download("owner/model", WEIGHTS[0], revision=COMMIT)) == folder / WEIGHTS[0]
    assert hub.requests == []
    assert Path(hf_hub_download("owner/model", WEIGHTS[0])) == folder / WEIGHTS[0]
    snapshot_download("owner/model", ignore_patterns=[WEIGHTS[2], "*.py", "*.md", "figures/*"])
    assert hub.sent_bytes == 0


def test_we_find_a_download_of_huggingface_hub(hub: Hub, repository: Repository) -> None:
    folder = Path(snapshot_download("owner/model"))
    hub.reset_counts()
    assert find_local("owner/model") == folder
    assert verify_checkpoint(repository) == []
    assert fetch_checkpoint(repository) == folder
    assert hub.requests == []


def test_the_configuration_comes_first_and_refuses_unsupported_models(hub: Hub, model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError):
        fetch_checkpoint(look_up("owner/model"))
    assert set(hub.sent) == {"owner/model/config.json"}
    assert find_local("owner/model") is None


def test_a_repository_without_a_model(hub: Hub, model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no file `config\.json`"):
        fetch_checkpoint(look_up("owner/model"))


def test_an_index_that_names_a_missing_file(hub: Hub, model: Path) -> None:
    (model / WEIGHTS[1]).unlink()
    with pytest.raises(WeightsError, match=f"1 of 2 files in the index .* first `{WEIGHTS[1]}`"):
        fetch_checkpoint(look_up("owner/model"))
    assert weight_requests(hub) == []


def test_without_an_index_all_files_are_needed(repository: Repository) -> None:
    assert needed_files(repository, None) == repository.files


@pytest.mark.parametrize("weight_map", [{}, {"a": "other-1.safetensors", "b": "other-2.safetensors"}])
def test_with_an_index_of_other_files_all_files_are_needed(repository: Repository, weight_map: dict[str, str]) -> None:
    assert needed_files(repository, weight_map) == repository.files


def test_an_unlisted_file_of_a_numbered_series_is_needed(repository: Repository) -> None:
    weight_map = {"lm_head.weight": WEIGHTS[0], "vision_tower.encoder.weight": WEIGHTS[2]}
    text_only = replace(repository, skips_vision=True)
    assert [file.name for file in needed_files(text_only, weight_map)] == NEEDED
    assert {file.name for file in needed_files(repository, weight_map)} == {*NEEDED, WEIGHTS[2]}


def test_free_space_is_checked_first(hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(
        WeightsError, match=r"needs 6\d\d\.\d kB more, but the disk of .* has only 1\.0 kB free"
    ) as raised:
        fetch_checkpoint(repository)
    assert raised.value.hint is not None
    assert "HF_HOME" in raised.value.hint
    assert weight_requests(hub) == []


def test_partial_files_need_less_space(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    for name in WEIGHTS[:2]:
        part = part_path(blob_path(repository, repository.file(name)))
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(bytes(290_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 50_000))
    fetch_checkpoint(repository)


def test_a_new_commit_fetches_only_what_changed(hub: Hub, repository: Repository, model: Path) -> None:
    old = fetch_checkpoint(repository)
    (model / WEIGHTS[1]).write_bytes(bytes(5000))
    hub.commits["owner/model"] = "b" * 40
    hub.reset_counts()
    new = look_up("owner/model")
    hub.fail("missing", "*safetensors")
    with pytest.raises(WeightsError):
        fetch_checkpoint(new)
    assert find_local("owner/model") == old  # the old one is used until the new one is complete
    hub.clear_faults()
    assert fetch_checkpoint(new) == find_local("owner/model") != old
    assert hub.sent_bytes == 5000


def test_a_corrupt_file_is_found_and_downloaded_again(hub: Hub, repository: Repository, model: Path) -> None:
    folder = fetch_checkpoint(repository)
    blob = (folder / WEIGHTS[0]).resolve()
    data = bytearray(blob.read_bytes())
    data[7] ^= 1
    blob.write_bytes(data)
    (folder / "config.json").resolve().write_text("{}")
    (folder / WEIGHTS[1]).unlink()
    progress: list[int] = []
    corrupt = verify_checkpoint(repository, progress.append)
    assert [file.name for file in corrupt] == ["config.json", WEIGHTS[0], WEIGHTS[1]]
    assert sum(progress) == sum(
        (folder / name).stat().st_size for name in NEEDED if name not in ("config.json", WEIGHTS[1])
    )
    for file in corrupt:
        remove_cached(repository, file)
        assert cached_file(repository, file) is None
    hub.reset_counts()
    fetch_checkpoint(repository)
    assert verify_checkpoint(repository) == []
    assert set(hub.sent) == {f"owner/model/{file.name}" for file in corrupt}


def test_a_broken_index_is_found(repository: Repository) -> None:
    folder = fetch_checkpoint(repository)
    (folder / INDEX_NAME).resolve().write_text("{")
    assert INDEX_NAME in [file.name for file in verify_checkpoint(repository)]


def test_an_empty_cache(repository: Repository) -> None:
    assert [file.name for file in verify_checkpoint(repository)] == [file.name for file in repository.files]
    assert find_local("owner/model") is None
    assert find_local("owner/model", COMMIT) is None
    remove_cached(repository, repository.files[0])


def test_one_file_into_the_cache(hub: Hub, repository: Repository) -> None:
    file = repository.file(WEIGHTS[0])
    path = fetch_to_cache(repository, file)
    assert path == cached_file(repository, file)
    assert hub.sent_bytes == file.size_bytes
    assert find_local("owner/model") is None


def test_a_disk_without_symlinks(repository: Repository, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = fetch_checkpoint(repository)
    assert not (folder / WEIGHTS[0]).is_symlink()
    assert (folder / WEIGHTS[0]).read_bytes() == (model / WEIGHTS[0]).read_bytes()
    assert find_local("owner/model") == folder
    assert list((folder.parent.parent / "blobs").iterdir()) == []


def test_the_first_error_stops_the_others(hub: Hub, repository: Repository) -> None:
    hub.fail("slow", f"*{WEIGHTS[0]}", bytes_per_s=20_000)
    hub.fail("missing", f"*{WEIGHTS[1]}")
    started_s = time.monotonic()
    with pytest.raises(WeightsError, match="does not have"):
        fetch_checkpoint(repository)
    assert time.monotonic() - started_s < 10
    sent_bytes = hub.sent_bytes
    time.sleep(1)
    assert hub.sent_bytes < sent_bytes + 100_000  # bytes already in flight


def test_progress_is_never_called_concurrently(repository: Repository) -> None:
    lock = threading.Lock()

    def progress(count: int) -> None:
        assert lock.acquire(blocking=False)
        time.sleep(0.001)
        lock.release()

    fetch_checkpoint(repository, progress, workers=8)


def gate(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("owner/model")


def set_bad_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_good"
    monkeypatch.setenv("HF_TOKEN", "hf_bad")


def remove(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.folders.clear()


def go_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def unplug(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")


def answer_503(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("status", "/api/*", status=503)
    monkeypatch.setattr("kimi_mlx.hub.retries.MAX_WAIT_S", 0.1)


def answer_with_a_page(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("status", "/api/*", status=200, body=b"<html>please log in</html>")


def answer_with_other_json(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("status", "/api/*", status=200, body=b"[]")


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        (
            gate,
            "is gated",
            "accept the terms at https://huggingface.co/owner/model, then run `hf auth login`",
        ),
        (
            set_bad_token,
            "Hugging Face rejected your token",
            "run `hf auth login` with a valid token, or `unset HF_TOKEN`",
        ),
        (remove, "repository `owner/model` does not exist on Hugging Face, or it is private", "check the spelling"),
        (go_offline, "`owner/model` is not on this machine, .* `HF_HUB_OFFLINE` forbids", "`unset HF_HUB_OFFLINE`"),
        (unplug, "`owner/model` is not on this machine, .*: cannot connect to Hugging Face", "check the network"),
        (
            answer_503,
            r"`owner/model` .* cannot be downloaded: Hugging Face answered with status 503",
            "try again later",
        ),
        (answer_with_a_page, "did not answer like a Hugging Face server", "whether the network requires a login"),
        (answer_with_other_json, "did not answer like a Hugging Face server", "check the proxy settings"),
    ],
)
def test_errors_have_hints(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Hub, pytest.MonkeyPatch], None],
    message: str,
    hint: str,
) -> None:
    fault(hub, monkeypatch)
    with pytest.raises(WeightsError, match=message) as raised:
        fetch_checkpoint(look_up("owner/model"))
    assert raised.value.hint is not None
    assert hint in raised.value.hint


def test_a_valid_token_is_accepted(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_good"
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    fetch_checkpoint(look_up("owner/model"))


def test_a_cache_that_cannot_be_written(
    hub: Hub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="cannot be written") as raised:
        fetch_checkpoint(repository)
    assert raised.value.hint is not None
    assert "HF_HOME" in raised.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_of_another_user(
    hub: Hub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o555)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    with pytest.raises(WeightsError, match="Permission denied"):
        fetch_checkpoint(repository)


def test_offline_with_a_complete_cache(hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch_checkpoint(repository)
    go_offline(hub, monkeypatch)
    assert find_local("owner/model") == folder
    assert fetch_checkpoint(repository) == folder
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        read_range(repository, WEIGHTS[0], 0, 8)


@pytest.mark.parametrize("name", ["a/b", "a b/c d", "\0/\0", "../..", pytest.param("x" * 5000, id="long")])
def test_invalid_names_are_not_found(hub: Hub, name: str) -> None:
    assert find_local(name) is None
    assert find_local(name, "b" * 40) is None
    assert find_local("owner/model", name) is None


def test_public_names_exist() -> None:
    assert all(hasattr(hub_module, name) for name in hub_module.__all__)
    assert RepositoryFile("x", 1) == RepositoryFile("x", 1, None, None)
