"""Known draft models, and the names that `--draft` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.errors import UsageError
from kimi_mlx.hub.catalogue import catalogue, draft_of, drafts, find_draft
from kimi_mlx.model.config import load_config
from kimi_mlx.model.draft_config import load_draft_config
from kimi_mlx.store.model_ref import resolve_draft_name, resolve_model_name

MINI = resolve_model_name("kimi-mini")


def test_each_draft_model_has_a_name_of_its_own_and_a_known_model() -> None:
    names = [entry.alias for entry in (*catalogue(), *drafts())]
    assert len(names) == len(set(names))
    for draft in drafts():
        assert draft_of(draft.model) == draft
        assert any(entry.alias == draft.model and entry.refused is None for entry in catalogue())
        assert {name for name in ("repository", "tokens_per_step") if getattr(draft, name) is not None} <= set(
            draft.source
        )


def test_the_bundled_draft_model_is_complete_and_fits_its_model() -> None:
    target = resolve_model_name("kimi-mini-draft")
    assert target.folder is not None
    assert MINI.folder is not None
    assert load_draft_config(target.folder).captured_layers(load_config(MINI.folder)) == (0, 2, 3)
    assert sum(path.stat().st_size for path in target.folder.iterdir()) < 10**6


@pytest.mark.parametrize("name", ["auto", "kimi-mini-draft"])
def test_the_draft_model_of_a_model_has_two_names(name: str) -> None:
    assert resolve_draft_name(name, MINI) == resolve_model_name("kimi-mini-draft")


def test_a_published_draft_model_is_found_by_either_name() -> None:
    by_alias, by_repository = (
        resolve_model_name(name) for name in ("kimi-k2.6-draft", "lightseekorg/kimi-k2.6-eagle3.1-mla")
    )
    assert by_alias.repository == by_repository.repository
    assert by_alias.draft == by_repository.draft == find_draft("KIMI-K2.6-draft")


def test_a_folder_may_hold_a_draft_model(tmp_path: Path) -> None:
    assert resolve_draft_name(str(tmp_path), MINI).folder == tmp_path


@pytest.mark.parametrize(
    ("name", "model", "message", "hint"),
    [
        ("auto", "kimi-k2", "no draft model is known for `kimi-k2`", "`kimi-k2.6`"),
        ("kimi-mini", "kimi-mini", "is a model, not a draft model", "--draft kimi-mini-draft"),
        ("kimi-k2", "kimi-mini", "is a model, not a draft model", "leave `--draft` out"),
        ("kimi-k2.5-draft", "kimi-k2.6", "draft model of `kimi-k2.5`, not of `kimi-k2.6`", "--draft auto"),
        ("kimi-k2.6-drafd", "kimi-k2.6", "there is no model `kimi-k2.6-drafd`", "kimi-k2.6-draft"),
    ],
)
def test_other_names_are_errors_with_what_to_type(name: str, model: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as raised:
        resolve_draft_name(name, resolve_model_name(model))
    assert message in raised.value.message
    assert raised.value.hint is not None
    assert hint in raised.value.hint
