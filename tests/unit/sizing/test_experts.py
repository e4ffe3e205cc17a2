"""Memory for routed experts: the setting, the budget of a rank, and expected hits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import MemoryLimitError, UsageError
from kimi_mlx.model.expert_budget import StreamedLayer, divide_slots, min_expert_bytes
from kimi_mlx.sizing.engine_limits import StreamingLimits
from kimi_mlx.sizing.expert_memory import ALL_EXPERTS, AUTO, ExpertMemory
from kimi_mlx.sizing.experts import ExpertBudget, ExpertSizes
from kimi_mlx.sizing.streaming import choice_probabilities, expected_misses, hit_rate, paying_sequences
from kimi_mlx.units import GB, GIB

K2 = ExpertSizes(12 * GB, (24_772_608,) * 60, 384, 8)


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("auto", AUTO),
        ("ALL", ALL_EXPERTS),
        ("40GB", ExpertMemory("size", num_bytes=40 * GB)),
        ("40 GiB", ExpertMemory("size", num_bytes=40 * GIB)),
        ("0", ExpertMemory("size", num_bytes=0)),
        ("35%", ExpertMemory("size", share=0.35)),
        ("12.5 %", ExpertMemory("size", share=0.125)),
    ],
)
def test_the_setting_is_read_and_written(text: str, setting: ExpertMemory) -> None:
    assert ExpertMemory.parse(text) == setting
    assert ExpertMemory.parse(str(setting)) == setting


@pytest.mark.parametrize("text", ["", "much", "40XB", "-1GB", "101%", "40", "%"])
def test_other_settings_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        ExpertMemory.parse(text)
    assert "`35%`" in (error.value.hint or "")


def test_auto_keeps_all_experts_if_they_fit() -> None:
    assert K2.all_bytes == pytest.approx(571e9, rel=0.01)
    assert K2.budget(AUTO, 600 * GB, 10 * GB) is None
    assert K2.budget(ALL_EXPERTS, 1 * GB, 10 * GB) is None


def test_auto_keeps_what_is_left() -> None:
    budget = K2.budget(AUTO, 100 * GB, 8 * GB)
    assert budget == 95 * GB - 12 * GB - 8 * GB
    assert 0.12 < K2.num_kept(budget) / K2.num_experts < 0.14
    tight = K2.budget(AUTO, 13 * GB, 8 * GB)
    assert tight == K2.staging_bytes
    assert K2.num_kept(tight) == 0


def test_a_model_whose_rest_does_not_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(MemoryLimitError, match=r"needs 11\.5 GiB even if .* SSD; 7\.5 GiB are free"):
        K2.budget(AUTO, 8 * GB, GB)
    with pytest.raises(MemoryLimitError, match=r"needs 11\.5 GiB even if .* SSD; 11\.3 GiB are free"):
        K2.budget(ExpertMemory("size", num_bytes=0), K2.rest_bytes + 100_000_000, 0)  # no room for the staging area


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.6, 0.95])
def test_the_number_of_experts_is_that_of_the_slots(share: float) -> None:
    budget = round(share * K2.all_bytes)
    layers = [StreamedLayer(K2.num_held, size) for size in K2.expert_bytes]
    slots = divide_slots(budget, layers, K2.num_chosen)
    assert sum(slots.kept) == pytest.approx(K2.num_kept(budget), abs=2)
    assert K2.staging_bytes == min_expert_bytes(layers, K2.num_chosen)


def test_a_set_size_is_not_changed() -> None:
    free = 600 * GB
    assert K2.budget(ExpertMemory("size", num_bytes=0), free, 0) == 0
    assert K2.budget(ExpertMemory("size", share=0.5), free, 0) == round(K2.all_bytes / 2)
    assert K2.budget(ExpertMemory("size", share=1.0), free, 0) is None  # all of them: nothing to read
    with pytest.raises(
        MemoryLimitError, match=r"needs 57\.7 GiB with 46\.6 GiB of experts in memory; 37\.3 GiB are free"
    ):
        K2.budget(ExpertMemory("size", num_bytes=50 * GB), 40 * GB, 0)
    assert ExpertSizes(1, (), 0, 8).budget(ExpertMemory("size", num_bytes=0), 0, 0) is None  # a dense model


def test_a_budget_survives_json() -> None:
    budget = ExpertBudget.of(K2, 100 * GB, StreamingLimits(8192, 1))
    assert ExpertBudget.from_dict(budget.to_dict()) == budget
    assert budget.token_bytes == pytest.approx(11.9e9, rel=0.01)


@given(st.integers(2, 64), st.data(), st.floats(0, 3))
def test_probabilities_sum_to_the_number_of_choices(experts: int, data: st.DataObject, exponent: float) -> None:
    chosen = data.draw(st.integers(1, experts))
    probabilities = choice_probabilities(experts, chosen, exponent)
    assert sum(probabilities) == pytest.approx(chosen)
    assert all(0 <= probability <= 1 + 1e-9 for probability in probabilities)
    assert list(probabilities) == sorted(probabilities, reverse=True)


@given(st.floats(0, 384), st.floats(0, 1.5))
def test_more_memory_never_misses_more(kept: float, exponent: float) -> None:
    before, after = (expected_misses(384, 8, number, exponent=exponent) for number in (kept, min(kept + 5, 384)))
    assert after <= before + 1e-9


def test_hits() -> None:
    assert hit_rate(384, 8, 0) == 0
    assert hit_rate(384, 8, 384) == 1
    assert hit_rate(384, 8, 96, exponent=0.0) == pytest.approx(0.25)
    assert hit_rate(384, 8, 0.16 * 384) == pytest.approx(0.58, abs=0.01)  # the source of ZIPF_EXPONENT
    assert expected_misses(384, 8, 0, tokens=10**6) == pytest.approx(384, rel=0.01)  # a long prompt needs all


def test_sequences_run_together_only_where_it_pays() -> None:
    """Reads of one sequence alone take the whole time: more sequences only wait for each other."""
    assert paying_sequences(0.06, 0.9, 384, 8, 60, 128) == 1
    assert paying_sequences(0.06, 0.03, 384, 8, 290, 128) > 1
    assert paying_sequences(0.06, 0.0, 384, 8, 384, 128) == 128
