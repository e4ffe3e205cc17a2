"""`--check-every` finds a planted difference in every strategy, also in what each rank computes for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.divisible import write_divisible
from tests.ranks.test_placements import run_ring

pytestmark = pytest.mark.ranks

CASES = [
    ("hybrid", "router", "the chosen experts of layer 1 of rank 1 differ from those of rank 0"),
    ("hybrid", "states", "the hidden states in layer 1 of rank 1 differ"),
    ("hybrid", "weights", "the scores of chosen experts of layer 1 of rank 1 differ"),
    ("hybrid", "attention", "the compressed queries of layer 1 of rank 1 differ"),
    ("hybrid", "norm", "the final hidden states of rank 1 differ"),
    ("tensor", "router", "the chosen experts of layer 1 of rank 1 differ"),
    ("tensor", "states", "the hidden states in layer 1 of rank 1 differ"),
    ("tensor", "attention", "the compressed queries of layer 1 of rank 1 differ"),
    ("tensor", "keys", "the cached keys of layer 1 of rank 1 differ"),
    ("tensor", "norm", "the final hidden states of rank 1 differ"),
    ("expert", "router", "the chosen experts of layer 1 of rank 1 differ"),
    ("expert", "states", "the hidden states in layer 1 of rank 1 differ"),
    ("expert", "weights", "the scores of chosen experts of layer 1 of rank 1 differ"),
    ("hybrid", None, None),
    ("tensor", None, None),
    ("expert", None, None),
    ("pipeline", None, None),
    ("pipeline", "link", "rank 1 received other data than rank 0 sent"),
]


@pytest.mark.slow
def test_a_planted_difference_is_found(tmp_path: Path) -> None:
    folder = write_divisible(tmp_path, "k2", layers=4)
    cases: list[dict[str, Any]] = [
        {"folder": str(folder), "strategy": strategy, "fault": fault, "max_tokens": 8 if fault else 12}
        for strategy, fault, _ in CASES
    ]
    by_rank = run_ring(2, cases, tmp_path, module="tests.ranks.check_rank")
    for index, (strategy, fault, message) in enumerate(CASES):
        found = [messages[index] for messages in by_rank]
        if message is None:
            assert found == [None, None], (strategy, fault)
        elif strategy == "pipeline":  # the receiver finds it
            assert found[1] is not None
            assert message in found[1]
        else:
            assert all(text is not None and message in text for text in found), (strategy, fault, found)


@pytest.mark.parametrize("fault", ["router"])
def test_a_prefill_step_without_logits_is_compared_too(fault: str, tmp_path: Path) -> None:
    folder = write_divisible(tmp_path, "k2", layers=4)
    case = {"folder": str(folder), "strategy": "hybrid", "fault": fault, "max_tokens": 1}
    assert all("chosen experts" in messages[0] for messages in run_ring(2, [case], tmp_path, "tests.ranks.check_rank"))
