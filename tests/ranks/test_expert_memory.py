"""`--expert-memory` on a real ring: the same tokens as one process, budgets in the status, and longer timeouts."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.cluster.ring.watch import STREAMED_STEP_S
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.sizing.expert_memory import ExpertMemory
from tests.fakes import KIMI_MINI
from tests.stores import build_all

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

PROMPT = tuple(range(20, 80))


def tokens_of(session: LocalSession | RingSession) -> list[int]:
    events = session.generate(Request(PROMPT, max_tokens=12))
    return [event.id for event in events if isinstance(event, Token)]


def test_ranks_read_their_experts_from_their_stores(tmp_path: Path) -> None:
    with closing(LocalSession(SessionOptions(KIMI_MINI))) as session:
        expected = tokens_of(session)
    folder = build_all(KIMI_MINI, tmp_path, 2)[0].folder
    options = SessionOptions(folder, ranks=2, expert_memory=ExpertMemory.parse("60%"))
    with closing(RingSession(options)) as session:
        assert tokens_of(session) == expected
        budgets = [memory.expert_budget for memory in session.status().memory]
        assert session._ring._watch._limits.step_s >= STREAMED_STEP_S
    assert [budget is not None and 0 < budget.kept_share < 0.6 for budget in budgets] == [True, True]
    assert len({budget.limits for budget in budgets if budget is not None}) == 1
    with closing(RingSession(SessionOptions(folder, ranks=2))) as session:
        assert tokens_of(session) == expected
        assert [memory.expert_budget for memory in session.status().memory] == [None, None]
        assert session._ring._watch._limits.step_s < STREAMED_STEP_S
