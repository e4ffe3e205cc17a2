"""Sizes of a rank's share before it is loaded, and the memory for experts that is chosen from them."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import kimi_mlx.runtime.expert_memory
from kimi_mlx.errors import MemoryLimitError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.moe import MoE
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.runtime.expert_memory import choose_expert_budget, expert_sizes
from kimi_mlx.runtime.load import load_share
from kimi_mlx.sizing.expert_memory import ALL_EXPERTS, AUTO, ExpertMemory
from kimi_mlx.units import GIB
from tests.fakes import KIMI_MINI

CONFIG = load_config(KIMI_MINI)


def limit_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(kimi_mlx.runtime.expert_memory, "free_memory_bytes", lambda: num_bytes)


def arrays_of(module: nn.Module) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))


def test_sizes_are_those_of_the_loaded_model() -> None:
    _, sizes = expert_sizes(KIMI_MINI, CONFIG, mx.float32, SingleGroup(), "hybrid")
    model = load_share(KIMI_MINI, CONFIG)
    loaded = sum(array.nbytes for _, array in arrays_of(model))
    assert sizes.rest_bytes + sizes.all_bytes == pytest.approx(loaded, rel=0.01)  # the router's padding
    moe = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    assert len(sizes.expert_bytes) == len(moe)
    stacks = sum(array.nbytes for mlp in moe for name, array in arrays_of(mlp) if "proj" in name)
    per_expert = stacks / moe[0].num_experts / len(moe)
    assert sizes.num_held == CONFIG.n_routed_experts
    assert sum(sizes.expert_bytes) / len(moe) == pytest.approx(per_expert)


def test_a_model_that_fits_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_expert_budget(AUTO, KIMI_MINI, CONFIG) is None
    assert choose_expert_budget(ALL_EXPERTS, KIMI_MINI, CONFIG) is None
    assert choose_expert_budget(ExpertMemory("size", share=1.0), KIMI_MINI, CONFIG) is None
    limit_memory(monkeypatch, GIB)
    assert choose_expert_budget(AUTO, KIMI_MINI, CONFIG) is None


def test_a_model_that_does_not_fit_keeps_some_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, sizes = expert_sizes(KIMI_MINI, CONFIG, mx.float32, SingleGroup(), "hybrid")
    limit_memory(monkeypatch, sizes.rest_bytes + sizes.staging_bytes + 2**20)
    budget = choose_expert_budget(AUTO, KIMI_MINI, CONFIG)
    assert budget is not None
    assert budget.budget_bytes is not None
    assert sizes.staging_bytes <= budget.budget_bytes < sizes.all_bytes
    assert budget.limits.chunk >= 32
    limit_memory(monkeypatch, sizes.rest_bytes)
    with pytest.raises(MemoryLimitError, match="even if its experts are read from the SSD"):
        choose_expert_budget(AUTO, KIMI_MINI, CONFIG)


def test_a_share_is_of_the_experts(tmp_path: Path) -> None:
    budget = choose_expert_budget(ExpertMemory("size", share=0.5), KIMI_MINI, CONFIG)
    assert budget is not None
    assert budget.budget_bytes == pytest.approx(budget.all_bytes / 2, abs=1)
    assert 0 < budget.kept_share < 0.5
