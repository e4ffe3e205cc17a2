"""Hub caches in practice: fetched by commit, copied, edited, partly there; and hubs that cannot be reached."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_mlx.errors import UnreachableError, WeightsError
from kimi_mlx.hub.cache import repository_folder
from kimi_mlx.hub.client import complete_checkpoint, fetch_checkpoint, find_repository, look_up, verify_checkpoint
from kimi_mlx.hub.snapshots import damaged_files, find_local, missing_files, unknown_files
from kimi_mlx.model_files import TEMPLATE_FOLDER, list_small_files
from kimi_mlx.weights.header import read_header
from tests.hub import COMMIT, Hub

NAME = "owner/model"
NEWER = "b" * 40


@pytest.fixture
def snapshot(hub: Hub) -> Path:
    return fetch_checkpoint(look_up(NAME))


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def remove_refs(folder: Path) -> None:
    shutil.rmtree(folder / "refs")


def add_bom(folder: Path) -> None:
    (folder / "refs" / "main").write_text(f"\ufeff{COMMIT}", encoding="utf-8")


def add_newline(folder: Path) -> None:
    (folder / "refs" / "main").write_text(f"{COMMIT}\r\n")


def break_ref(folder: Path) -> None:
    (folder / "refs" / "main").write_bytes(b"\xff\xfe")


def point_to_nothing(folder: Path) -> None:
    (folder / "refs" / "main").write_text(NEWER)


def copy_files(folder: Path) -> None:
    copy = shutil.copytree(folder, folder.with_name("copy"), symlinks=False)
    shutil.rmtree(folder)
    shutil.rmtree(copy / "blobs")
    copy.rename(folder)


@pytest.mark.parametrize("change", [remove_refs, add_bom, add_newline, break_ref, point_to_nothing, copy_files])
def test_a_complete_snapshot_is_found(
    hub: Hub, snapshot: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(repository_folder(NAME))
    assert find_local(NAME) == find_local(NAME, COMMIT) == find_local(NAME, COMMIT[:7]) == snapshot
    for disconnect in (go_offline, unplug):
        with monkeypatch.context() as patch:
            disconnect(patch)
            assert fetch_checkpoint(find_repository(NAME)) == snapshot
            assert fetch_checkpoint(find_repository(NAME, COMMIT)) == snapshot


def test_the_newest_snapshot_is_used_without_a_reference(snapshot: Path) -> None:
    remove_refs(repository_folder(NAME))
    newer = snapshot.with_name(NEWER)
    shutil.copytree(snapshot, newer, symlinks=True)
    os.utime(newer)
    assert find_local(NAME) == newer
    (newer / "config.json").unlink()
    assert find_local(NAME) == snapshot


def test_an_incomplete_update_is_not_used_unless_the_hub_is_unreachable(
    hub: Hub, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to_nothing(repository_folder(NAME))
    (snapshot.with_name(NEWER)).mkdir()
    assert find_local(NAME) is None
    unplug(monkeypatch)
    assert find_repository(NAME).commit == COMMIT


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tiktoken.model", "model-1-of-3.safetensors"])
@pytest.mark.parametrize("is_broken_link", [False, True])
def test_a_missing_file_is_named_or_fetched(
    hub: Hub, snapshot: Path, name: str, is_broken_link: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = snapshot / name
    path.resolve().unlink() if is_broken_link else path.unlink()
    assert find_local(NAME) is None
    with monkeypatch.context() as patch:
        go_offline(patch)
        with pytest.raises(UnreachableError, match=r"is only partly on this machine \(missing: ") as raised:
            find_repository(NAME)
        assert name in raised.value.message
        assert "HF_HUB_OFFLINE" in raised.value.message
    assert fetch_checkpoint(find_repository(NAME)) == find_local(NAME) == snapshot
    assert verify_checkpoint(look_up(NAME)) == []


def test_a_gap_in_numbered_weights_without_an_index(snapshot: Path) -> None:
    (snapshot / "model.safetensors.index.json").unlink()
    assert missing_files(snapshot) == ["model-*-of-00003.safetensors"]


def test_an_optional_file_may_be_missing_until_the_hub_is_asked(hub: Hub, model: Path) -> None:
    for name in ("chat_template.jinja", "generation_config.json"):
        (model / name).unlink()
    snapshot = fetch_checkpoint(look_up(NAME))
    assert find_local(NAME) == snapshot
    assert unknown_files(snapshot) == []  # the hub does not have them
    shutil.rmtree(repository_folder(NAME) / ".no_exist")
    assert unknown_files(snapshot) == ["generation_config.json", "chat_template.jinja or chat_template.json"]
    assert find_local(NAME) == snapshot


def test_the_template_in_the_tokenizer_configuration_counts(snapshot: Path) -> None:
    (snapshot / "chat_template.jinja").unlink()
    assert unknown_files(snapshot) == ["chat_template.jinja or chat_template.json"]
    path = snapshot / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages }}"}))
    assert unknown_files(snapshot) == []


def test_added_tokens_may_be_in_tokenizer_json(snapshot: Path) -> None:
    (snapshot / "tokenizer_config.json").write_text("{}")
    shutil.rmtree(repository_folder(NAME) / ".no_exist")
    assert "tokenizer.json" in unknown_files(snapshot)


def test_further_templates_are_fetched(hub: Hub, model: Path) -> None:
    extra = f"{TEMPLATE_FOLDER}/tool_use.jinja"
    (model / TEMPLATE_FOLDER).mkdir()
    (model / extra).write_text("{{ tools }}")
    (model / "chat_template.json").write_text("{}")
    snapshot = fetch_checkpoint(look_up(NAME))
    assert (snapshot / extra).read_text() == "{{ tools }}"
    assert {extra, "chat_template.json"} <= set(list_small_files(snapshot))
    assert "figures/extra.json" not in list_small_files(model)


def test_a_local_repository_is_verified_by_the_names_of_its_blobs(
    hub: Hub, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    repository = find_repository(NAME)
    assert verify_checkpoint(repository) == []
    blob = (snapshot / "model-1-of-3.safetensors").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    assert [file.name for file in verify_checkpoint(repository)] == ["model-1-of-3.safetensors"]


@pytest.mark.parametrize("status", [401, 403, 404, 503])
def test_a_local_model_is_used_whatever_the_hub_says(hub: Hub, snapshot: Path, status: int) -> None:
    hub.fail("status", "/api/*", status=status)
    assert find_repository(NAME, COMMIT).is_local
    assert sum("/api/" in request for request in hub.requests) <= 2  # no waiting


def test_links_copied_as_text_are_missing_files(hub: Hub, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in list(snapshot.iterdir()):
        target = os.readlink(path)
        path.unlink()
        path.write_text(target)
    assert find_local(NAME) is None
    assert {"config.json", "model-1-of-3.safetensors"} <= set(missing_files(snapshot))
    hub.reset_counts()
    assert fetch_checkpoint(look_up(NAME)) == find_local(NAME) == snapshot
    assert hub.sent_bytes == 0  # the blobs are still there


def test_optional_files_are_fetched_or_noted(
    hub: Hub, snapshot: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (snapshot / "chat_template.jinja").unlink()
    with monkeypatch.context() as patch:
        go_offline(patch)
        assert complete_checkpoint(NAME, snapshot) == snapshot
    (note,) = caplog.messages
    assert "may lack chat_template.jinja" in note
    assert f"`kimi-mlx download {NAME}`" in note
    assert complete_checkpoint(NAME, snapshot) == snapshot
    assert unknown_files(snapshot) == []
    hub.reset_counts()
    assert complete_checkpoint(NAME, snapshot) == snapshot
    assert hub.requests == []


def test_a_folder_of_the_user_is_complete_as_it_is(hub: Hub, model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert complete_checkpoint(NAME, model) == model
    assert hub.requests == []


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff" * 100])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model-1-of-3.safetensors"])
def test_damaged_files_are_named(snapshot: Path, name: str, damage: bytes) -> None:
    for path in snapshot.glob("*.safetensors"):
        path.resolve().write_bytes(b"\2\0\0\0\0\0\0\0{}")
    assert damaged_files(snapshot) == []
    (snapshot / name).resolve().write_bytes(damage)
    assert set(damaged_files(snapshot)) == {name}


def test_an_unknown_revision_is_named(hub: Hub, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    with pytest.raises(UnreachableError, match="`owner/model` is not on this machine at revision `v7`"):
        find_repository(NAME, "v7")


@pytest.mark.parametrize("target", ["nothing", "d" * 40])
def test_a_broken_link_does_not_hide_the_other_snapshots(hub: Hub, snapshot: Path, target: str) -> None:
    remove_refs(snapshot.parent.parent)
    (snapshot.parent / ("d" * 40)).symlink_to(target)
    assert find_local(NAME) == find_local(NAME, COMMIT) == snapshot


def test_a_complete_model_offline_lacks_nothing(
    hub: Hub, snapshot: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_offline(monkeypatch)
    assert find_repository(NAME, COMMIT).is_local
    (note,) = caplog.messages
    assert "forbids it" in note
    assert "lack" not in note


@pytest.mark.parametrize("name", ["config.json", "model-1-of-3.safetensors"])
def test_a_folder_in_place_of_a_file_is_named(hub: Hub, snapshot: Path, name: str) -> None:
    (snapshot / name).unlink()
    (snapshot / name).mkdir()
    with pytest.raises(WeightsError, match=f"`{snapshot / name}` is a folder, but must be a file") as raised:
        fetch_checkpoint(look_up(NAME))
    assert f"`rm -r {snapshot / name}`" in (raised.value.hint or "")


def test_a_pipe_in_place_of_a_file_is_replaced(hub: Hub, snapshot: Path) -> None:
    for name in ("config.json", "model-1-of-3.safetensors"):
        (snapshot / name).unlink()
        os.mkfifo(snapshot / name)
    assert "config.json" in missing_files(snapshot)
    assert find_local(NAME) is None
    assert fetch_checkpoint(look_up(NAME)) == find_local(NAME)


def test_a_damaged_file_in_the_cache_names_the_command(snapshot: Path) -> None:
    path = snapshot / "model-1-of-3.safetensors"
    path.resolve().write_bytes(b"\xff" * 100)
    with pytest.raises(WeightsError) as raised:
        read_header(path)
    assert raised.value.hint == f"`kimi-mlx download {NAME}` fetches it again"
