"""`kimi-mlx rm`: what it removes, what it leaves, and when it asks."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store
from typer.testing import CliRunner, Result

from kimi_mlx.cli.app import app
from kimi_mlx.errors import KimiMlxError, UsageError, WeightsError
from kimi_mlx.store.model_ref import resolve_model_name, similar_aliases
from kimi_mlx.store.remove import REMOVED_SUFFIX, find_removable, remove
from tests.fakes import KIMI_MINI

REPOSITORY = "mlx-community/Kimi-K2.5"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a download and two stores of one model, and the same of another."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))
    for name in ("mlx-community--Kimi-K2.5", "owner--other"):
        blobs = tmp_path / "hub" / f"models--{name}" / "blobs"
        snapshot = tmp_path / "hub" / f"models--{name}" / "snapshots" / ("0" * 40)
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (blobs / "a1").write_bytes(bytes(1000))
        (snapshot / "model.safetensors").symlink_to(blobs / "a1")
        for rank in range(2):
            folder = tmp_path / "stores" / name / "000000000000" / "hybrid-2-abc" / f"rank-{rank}"
            folder.mkdir(parents=True)
            (folder / "top.safetensors").write_bytes(bytes(200))
            (folder / ".lock").touch()
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["rm", *arguments])


def test_removes_stores_and_download_of_one_model(machine: Path) -> None:
    done = run("kimi-k2.5", "--yes", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["freed_bytes"] == 1400  # the link of the snapshot is not counted twice
    assert [folder["kind"] for folder in result["removed"]] == ["store", "download"]
    assert not (machine / "hub" / "models--mlx-community--Kimi-K2.5").exists()
    assert not (machine / "stores" / "mlx-community--Kimi-K2.5").exists()
    assert sum(file.stat().st_size for file in machine.rglob("*") if file.is_file() and not file.is_symlink()) == 1400


def test_without_a_terminal_it_asks_for_yes_and_removes_nothing(machine: Path) -> None:
    done = run("kimi-k2.5")
    assert isinstance(done.exception, UsageError)
    assert "--yes" in (done.exception.hint or "")
    assert len(list(machine.rglob("*.safetensors"))) == 6


def test_nothing_here_is_an_error(machine: Path) -> None:
    done = run("moonlight", "--yes")
    assert isinstance(done.exception, WeightsError)
    assert "nothing of `moonlight`" in done.exception.message


def test_a_model_that_is_being_downloaded_stays(machine: Path) -> None:
    lock = machine / "stores" / "mlx-community--Kimi-K2.5" / "000000000000" / "hybrid-2-abc" / "rank-1" / ".lock"
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        done = run("kimi-k2.5", "--yes")
    assert isinstance(done.exception, KimiMlxError)
    assert "in use" in done.exception.message
    assert len(list(machine.rglob("*.safetensors"))) == 6


def test_an_interrupted_removal_is_completed(machine: Path) -> None:
    folder = machine / "stores" / "mlx-community--Kimi-K2.5"
    folder.rename(folder.with_name(folder.name + REMOVED_SUFFIX))
    folders = find_removable(resolve_model_name(REPOSITORY))
    assert [each.kind for each in folders] == ["store", "download"]
    for each in folders:
        remove(each)
    assert find_removable(resolve_model_name(REPOSITORY)) == []


def test_a_folder_of_the_user_and_the_packaged_model_stay(machine: Path, tmp_path: Path) -> None:
    own = tmp_path / "my model"
    own.mkdir()
    (own / "config.json").touch()
    assert find_removable(resolve_model_name(str(own))) == []
    assert find_removable(resolve_model_name("kimi-mini")) == []
    assert (KIMI_MINI / "config.json").is_file()


def test_a_link_is_left_alone(machine: Path) -> None:
    folder = machine / "stores" / "mlx-community--Kimi-K2.5"
    elsewhere = machine / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert [each.kind for each in find_removable(resolve_model_name(REPOSITORY))] == ["download"]


def test_a_folder_without_stores_names_the_folder_of_the_stores(machine: Path, tmp_path: Path) -> None:
    done = run(str(tmp_path), "--yes")
    assert isinstance(done.exception, WeightsError)
    assert str(machine / "stores") in (done.exception.hint or "")


def test_names_are_matched_without_case(machine: Path) -> None:
    assert resolve_model_name("Kimi-K2.5") == resolve_model_name("kimi-k2.5")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("kimi-k25", "kimi-k2.5"),
        ("Kimi K2.6", "kimi-k2.6"),
        ("moonlite", "moonlight"),
        ("k2.5", "kimi-k2.5"),
        ("thinking", "kimi-k2-thinking"),
    ],
)
def test_a_misspelled_name_gets_near_names(name: str, near: str) -> None:
    assert similar_aliases(name)[0] == near


@pytest.mark.parametrize("name", ["llama", "gpt-4o", "hello", "", "x"])
def test_a_name_far_from_all_gets_none(name: str) -> None:
    assert similar_aliases(name) == []


def test_refused_models_are_not_suggested() -> None:
    assert "kimi-k3" not in similar_aliases("kimi-k4")


def test_the_root_folder_has_no_stores(machine: Path) -> None:
    assert find_removable(resolve_model_name("/")) == []
    assert run("/", "--yes").exit_code != 0
    assert len(list(machine.rglob("*.safetensors"))) == 6


def test_stores_of_another_source_with_the_same_folder_name_stay(machine: Path) -> None:
    rank = machine / "stores" / "mlx-community--Kimi-K2.5" / "000000000000" / "hybrid-2-abc" / "rank-0"
    (rank / "manifest.json").write_text(json.dumps({"origin": {"repository": "/mlx-community/Kimi-K2.5"}}))
    assert [each.kind for each in find_removable(resolve_model_name(REPOSITORY))] == ["download"]


def test_leftovers_and_a_new_download_are_both_removed(machine: Path) -> None:
    folder = machine / "stores" / "mlx-community--Kimi-K2.5"
    leftover = folder.with_name(folder.name + REMOVED_SUFFIX)
    leftover.mkdir()
    (leftover / "file").touch()
    assert run("kimi-k2.5", "--yes").exit_code == 0
    assert not leftover.exists()
    assert not folder.exists()


def test_an_unreadable_lock_is_no_crash(machine: Path) -> None:
    lock = machine / "stores" / "mlx-community--Kimi-K2.5" / "000000000000" / "hybrid-2-abc" / "rank-1" / ".lock"
    lock.unlink()
    lock.symlink_to(machine / "nowhere")
    assert run("kimi-k2.5", "--yes").exit_code == 0


def test_blobs_in_the_shared_folder_are_removed_with_their_last_repository(machine: Path) -> None:
    cache, digest = machine / "hub", "ab" * 32
    for name in ("mlx-community--Kimi-K2.5", "owner--other"):
        blob = cache / f"models--{name}" / "blobs" / "a1"
        assert publish_blob_to_shared_store(
            blob_path=str(blob), xet_hash=digest, cache_dir=cache, expected_size=blob.stat().st_size
        )
    shared = cache / "blobs" / "ab" / digest
    assert shared.stat().st_size == 1000
    first, second = (find_removable(resolve_model_name(name))[-1] for name in (REPOSITORY, "owner/other"))
    assert (first.kind, first.size_bytes) == ("download", 0)
    remove(first)
    assert shared.is_file()
    (second,) = (each for each in find_removable(resolve_model_name("owner/other")) if each.kind == "download")
    assert second.size_bytes == 1000
    remove(second)
    assert not shared.exists()
