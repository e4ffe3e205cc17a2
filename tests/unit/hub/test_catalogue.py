"""Known models: names, facts, memory."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.errors import KimiMlxError, UsageError, WeightsError
from kimi_mlx.hub.catalogue import CatalogueEntry, catalogue, find_entry, parse_entry
from kimi_mlx.model.config import load_config
from kimi_mlx.store.locate import ensure_downloaded, local_state
from kimi_mlx.units import GB

ALIASES = [
    "kimi-mini",
    "kimi-mini-vl",
    "moonlight",
    "kimi-k2",
    "kimi-k2-0905",
    "kimi-k2-thinking",
    "kimi-k2.5",
    "kimi-k2.6",
    "kimi-k2.7-code",
    "kimi-k3",
]
SERVED = [alias for alias in ALIASES if alias not in ("kimi-mini", "kimi-mini-vl", "kimi-k3")]
FACTS = ("repository", "size_bytes", "weights_bytes", "kv_bytes_per_token", "context_tokens", "sampling", "refused")


def entry_of(alias: str) -> CatalogueEntry:
    entry = find_entry(alias)
    assert entry is not None
    return entry


def raw_entry() -> dict[str, Any]:
    text = resources.files("kimi_mlx.hub").joinpath("catalogue.json").read_text(encoding="utf-8")
    return next(raw for raw in json.loads(text)["models"] if raw["alias"] == "kimi-k2.5")


def test_aliases_are_unique_and_the_default_is_bundled() -> None:
    assert [entry.alias for entry in catalogue()] == ALIASES
    assert (ensure_downloaded("kimi-mini") / "config.json").is_file()


def test_unknown_and_missing_fields_are_errors() -> None:
    assert parse_entry(raw_entry()) == entry_of("kimi-k2.5")
    with pytest.raises(TypeError, match="colour"):
        parse_entry({**raw_entry(), "colour": "blue"})
    with pytest.raises(TypeError, match="top_k"):
        parse_entry({**raw_entry(), "sampling": {**raw_entry()["sampling"], "top_k": 1}})
    for name in raw_entry():
        with pytest.raises(TypeError):
            parse_entry({key: value for key, value in raw_entry().items() if key != name})


@pytest.mark.parametrize("alias", ALIASES)
def test_every_fact_has_its_source(alias: str) -> None:
    entry = entry_of(alias)
    known = {name for name in FACTS if getattr(entry, name) is not None}
    if entry.original_repository is not None:
        known.add("repository")
    if entry.sees_images:
        known.add("sees_images")
    assert set(entry.source) == {*known, "licence"}
    assert all(entry.source.values())
    assert len(entry.about) <= 59, "longer than the table's column at 120 columns"
    assert len(entry.format) <= 19, "longer than the table's column at 80 columns"


def test_sizes_of_k2_in_memory() -> None:
    """K2 has 578 GB at 4 bits, and 658 GB as native INT4 in MLX's layout."""
    weights = {alias: (entry_of(alias).weights_bytes or 0) / GB for alias in SERVED}
    assert weights["kimi-k2"] == pytest.approx(578, abs=1)
    for alias in ("kimi-k2-thinking", "kimi-k2.5", "kimi-k2.6"):
        assert weights[alias] == pytest.approx(658, abs=1)
    parameters = 1.0264e12
    for alias in SERVED[1:]:
        assert 3 < weights[alias] * GB * 8 / parameters < 5.2, "bits per weight"
    for alias in SERVED:
        entry = entry_of(alias)
        assert entry.size_bytes is not None
        assert entry.weights_bytes is not None
        assert entry.size_bytes <= entry.weights_bytes


def test_the_cache_is_70_kb_per_token_for_k2() -> None:
    for alias in SERVED[1:]:
        assert entry_of(alias).kv_bytes_per_token == (512 + 64) * 61 * 2


@pytest.mark.parametrize("alias", ["kimi-mini", "kimi-mini-vl"])
def test_facts_of_the_packaged_models_match_their_files(alias: str) -> None:
    entry, config = entry_of(alias), load_config(ensure_downloaded(alias))
    assert entry.context_tokens == config.max_position_embeddings
    assert local_state(entry) == ("package", ensure_downloaded(alias))


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("kimi-k2.5", "kimi-k2.5"),
        ("Kimi-K2.5", "kimi-k2.5"),
        ("mlx-community/kimi-k2.5", "kimi-k2.5"),
        ("moonshotai/Kimi-K2.5", "kimi-k2.5"),
        ("moonshotai/Kimi-K2.6", "kimi-k2.6"),
        ("MOONSHOTAI/KIMI-K3", "kimi-k3"),
    ],
)
def test_find_entry_by_alias_and_by_either_repository(name: str, alias: str) -> None:
    assert entry_of(name).alias == alias


@pytest.mark.parametrize("name", ["", "kimi", "./kimi-k2", "mlx-community/Kimi-K2.5-3bit"])
def test_find_entry_ignores_other_names(name: str) -> None:
    assert find_entry(name) is None


def test_an_interrupted_download_is_partly_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry = entry_of("moonlight")
    assert local_state(entry) == ("no", None)
    folder = tmp_path / "models--mlx-community--Moonlight-16B-A3B-Instruct-4-bit"
    (folder / "blobs").mkdir(parents=True)
    assert local_state(entry) == ("no", None)
    (folder / "blobs" / "0123.incomplete").write_bytes(b"1")
    assert local_state(entry) == ("partly", folder)


def test_a_folder_resolves_to_itself(tmp_path: Path) -> None:
    assert ensure_downloaded(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("kimi-mimi", "`kimi-mini`"),
        ("Kimi-K2-thinkin", "`kimi-k2-thinking`"),
        ("moonligt", "`moonlight`"),
        ("x", "`kimi-mlx models`"),
    ],
)
def test_an_unknown_name_suggests_similar_ones_or_the_list(name: str, near: str) -> None:
    with pytest.raises(UsageError) as raised:
        ensure_downloaded(name)
    assert name in raised.value.message
    assert raised.value.hint is not None
    assert near in raised.value.hint


@pytest.mark.parametrize("name", ["kimi-k3", "Kimi-K3", "moonshotai/Kimi-K3", "mlx-community/Kimi_K3_4bit"])
def test_kimi_k3_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UsageError, match="another architecture"):
        ensure_downloaded(name)


def test_a_missing_repository_without_a_hub_is_a_weights_error() -> None:
    with pytest.raises(WeightsError, match="nobody/nothing"):
        ensure_downloaded("nobody/nothing")


@pytest.mark.parametrize(
    "name", ["a/b/c", "../nowhere", "~/nowhere", "-/-", "a b/c d", "\0", pytest.param("x" * 5000, id="long")]
)
def test_strange_names_are_errors_with_a_hint(name: str) -> None:
    with pytest.raises(KimiMlxError) as raised:
        ensure_downloaded(name)
    assert raised.value.hint
