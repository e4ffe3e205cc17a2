"""A rank is waited for as long as it answers and as long as it has said that it needs."""

from __future__ import annotations

from kimi_mlx.cluster.ring.end_limits import unload_limit_s
from kimi_mlx.cluster.ring.ending import ANSWER_S, RankEnd

ALIVE = {"kind": "alive", "memory": 300 * 10**9}
MARGIN_S = 20.0


def test_a_rank_that_answers_gets_the_time_that_it_asks_for() -> None:
    end = RankEnd()
    end.on_message({"kind": "end_limit", "seconds": 60.0}, 0)
    end.begin(1000)
    for second in range(1000, 1060):
        end.on_message(ALIVE, second)
        assert not end.is_overdue(second)
    end.on_message({"kind": "end_limit", "seconds": 180.0}, 1060)
    end.on_message({"kind": "unloading", "bytes": 300 * 10**9}, 1060)
    assert not end.is_overdue(1060 + 179)  # silent meanwhile
    assert end.is_overdue(1060 + 180 + MARGIN_S)
    end.on_message({"kind": "unloaded", "bytes": 0}, 1100)
    assert end.is_unloaded


def test_a_silent_rank_is_not_waited_for() -> None:
    end = RankEnd()
    end.on_message({"kind": "end_limit", "seconds": 120.0}, 0)
    end.on_message(ALIVE, 0)
    end.begin(100)
    assert not end.is_overdue(100 + ANSWER_S)
    assert end.is_overdue(100 + ANSWER_S + 0.1)
    assert end.total_limit_s == 120 + unload_limit_s(300 * 10**9)  # for its processes on the host
