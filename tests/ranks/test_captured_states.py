"""Captured states on real rings: those of a single rank, on rank 0 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import KIMI_MINI
from tests.ranks.capture_rank import captured
from tests.ranks.test_placements import run_ring

pytestmark = pytest.mark.ranks

LAYERS = [0, 2, 3]

STEPS = [[[16, 0]], [[16, 0]], [[16, 1]], [[3, 3], [12, 0]], [[1, 1], [8, 1]], [[16, 0]]]
"""Chunks of a prompt, a draft beside a chunk, a decode step beside the last chunk, and a chunk at the end."""


def states_of(size: int, strategies: list[str], steps: list[Any], folder: Path) -> tuple[list[Any], list[list[Any]]]:
    """Return the states of a single rank, and those of rank 0 with each strategy."""
    cases = [
        {"folder": str(KIMI_MINI), "strategy": name, "layers": LAYERS, "steps": steps, "file": str(folder / f"{i}.npz")}
        for i, name in enumerate(strategies)
    ]
    expected = captured({**cases[0], "strategy": "hybrid"}, None)
    counts = run_ring(size, cases, folder, "tests.ranks.capture_rank")
    assert counts == [[len(steps)] * len(cases), *[[0] * len(cases)] * (size - 1)]
    found: list[list[Any]] = []
    for case in cases:
        with np.load(case["file"]) as arrays:
            found.append([arrays[f"arr_{number}"] for number in range(len(steps))])
    return expected, found


@pytest.mark.slow
def test_two_ranks_capture_the_states_of_one(tmp_path: Path) -> None:
    strategies = ["pipeline", "pipeline:3:1", "hybrid", "tensor"]
    expected, (even, uneven, *sums) = states_of(2, strategies, STEPS, tmp_path)
    for number, states in enumerate(expected):
        assert states.shape == (1, sum(length for length, _ in STEPS[number]), len(LAYERS) * 128)
        np.testing.assert_array_equal(even[number], states)
        np.testing.assert_array_equal(uneven[number], states)
        for found in sums:
            np.testing.assert_allclose(found[number], states, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(sums[0][number][..., :128], states[..., :128])  # the embeddings


@pytest.mark.slow
def test_three_stages_capture_the_states_of_one(tmp_path: Path) -> None:
    expected, (found,) = states_of(3, ["pipeline"], STEPS, tmp_path)
    for got, states in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, states)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_states_larger_than_the_buffers_of_a_link_do_not_make_ranks_wait_for_each_other(
    tmp_path: Path, size: int
) -> None:
    file = tmp_path / "states.npz"
    case = {"num_tokens": 4096, "hidden_size": 512, "num_steps": 4, "file": str(file)}  # 8 MB per captured layer
    assert run_ring(size, [case], tmp_path, "tests.ranks.capture_rank") == [[4], *[[0]] * (size - 1)]
    with np.load(file) as arrays:
        for step in range(4):
            states = arrays[f"arr_{step}"].reshape(4096, size, 512)
            assert (states == step + np.arange(size)[:, None]).all()
