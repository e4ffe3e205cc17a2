"""Which experts stay: popularity with decay, repetitions, what is kept between starts, and the division of memory."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.expert_budget import StreamedLayer, divide_slots, min_expert_bytes
from kimi_mlx.model.expert_use import HALF_LIFE, ExpertUse


def observe(use: ExpertUse, *experts: int, num_tokens: int = 1) -> None:
    use.observe(0, np.array(sorted(experts)), np.ones(len(experts)), num_tokens)


def test_frequent_experts_have_higher_scores_and_old_uses_fade() -> None:
    use = ExpertUse([1], [8], 2)
    for _ in range(300):
        observe(use, 0, 1)
    for _ in range(40):
        observe(use, 2, 3)
    assert use.scores(0)[0] > use.scores(0)[4]
    for _ in range(int(2 * HALF_LIFE)):
        observe(use, 6, 7)
    scores = use.scores(0)
    assert scores[6] > scores[0] > scores[2] > scores[4]


def test_an_expert_that_was_just_used_beats_rare_ones() -> None:
    use = ExpertUse([1], [16], 2)
    for token in range(64):
        observe(use, token % 8, (token + 3) % 8)
    observe(use, 12)
    assert use.scores(0)[12] > use.scores(0)[:8].min()


def test_the_chance_of_a_repetition_is_learned() -> None:
    rare, often = ExpertUse([1], [64], 2), ExpertUse([1], [64], 2)
    random = np.random.default_rng(0)
    for token in range(4000):
        observe(rare, *random.choice(64, 2, replace=False).tolist())
        observe(often, *((token // 8 * 2) % 64, (token // 8 * 2 + 1) % 64))
    assert rare.repeat_chance < 0.1 < 0.7 < often.repeat_chance


def test_what_was_learned_is_kept() -> None:
    use = ExpertUse([1, 5], [8, 4], 2)
    for _ in range(9):
        observe(use, 3, 4)
    again = ExpertUse([1, 5], [8, 4], 2)
    again.update_from_bytes(use.to_bytes())
    for left, right in zip(again.rates(), use.rates(), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "damage", ["truncated", "garbage", "empty", "other layers", "other share", "infinite", "infinite weight"]
)
def test_what_cannot_be_used_is_an_error_and_changes_nothing(damage: str) -> None:
    source = ExpertUse([1, 2] if damage == "other layers" else [1], [8, 8] if damage == "other layers" else [8], 2)
    if damage == "other share":
        source = ExpertUse([1], [4], 2)
    if damage == "infinite":
        source.observe(0, np.array([2]), np.array([np.inf]), 1)
    if damage == "infinite weight":
        source._weights = [np.inf]
    data = source.to_bytes()
    data = {"truncated": data[: len(data) // 2], "garbage": b"x" * 99, "empty": b""}.get(damage, data)
    use = ExpertUse([1], [8], 2)
    with pytest.raises(WeightsError, match="expert use"):
        use.update_from_bytes(data)
    assert np.ptp(use.rates()[0]) == 0


def test_memory_is_divided_evenly_without_knowledge() -> None:
    layers = [StreamedLayer(16, 100) for _ in range(4)]
    plan = divide_slots(min_expert_bytes(layers, 2) + 1000, layers, 2)
    assert (plan.staging, sorted(plan.kept)) == (4, [2, 2, 3, 3])
    assert plan.num_bytes == 1400


def test_layers_whose_popular_experts_stand_out_get_what_they_need() -> None:
    layers = [StreamedLayer(8, 100) for _ in range(2)]
    rates = [np.array([0.9, 0.8, *[0.01] * 6]), np.full(8, 0.25)]
    assert divide_slots(400 + 800, layers, 2, rates).kept == (2, 6)


def test_the_staging_area_exists_with_any_memory_and_grows_with_it() -> None:
    layers = [StreamedLayer(384, 10) for _ in range(60)]
    assert divide_slots(0, layers, 8) == divide_slots(165, layers, 8)
    assert divide_slots(0, layers, 8).staging == 16
    assert divide_slots(10**5, layers, 8).staging == 64
    whole = divide_slots(160 + 60 * 384 * 10, layers, 8)
    assert (whole.staging, set(whole.kept)) == (16, {384})


def test_any_damaged_byte_is_an_error_or_statistics_of_the_same_form() -> None:
    data = ExpertUse([1], [4], 2).to_bytes()
    for position in range(0, len(data), 7):
        use = ExpertUse([1], [4], 2)
        try:
            use.update_from_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        except WeightsError:
            continue
        assert use.scores(0).shape == (4,)
