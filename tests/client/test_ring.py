"""A chat with a server whose ring loses a rank in mid-answer."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.client.address import parse_address
from kimi_mlx.client.remote import RemoteChatModel
from kimi_mlx.engine.events import Finished, Interrupted, Resumed
from kimi_mlx.session.chat_model import ChatEvent, ChatOptions
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.text.messages import Delta, Message, join
from tests.checkpoints import write_endless_checkpoint
from tests.server.running_server import serving

pytestmark = pytest.mark.ranks

OPTIONS = ChatOptions(sampling={"temperature": 0}, max_tokens=300)
MESSAGES = [Message("user", "What are you?")]


@pytest.mark.slow
def test_the_answer_continues_after_a_rank_is_lost(tmp_path: Path) -> None:
    endless = write_endless_checkpoint(tmp_path)  # else the answer may be complete before the rank is lost
    with (
        closing(RingSession(SessionOptions(endless, ranks=2))) as session,
        serving(session, ranks=2) as server,
        closing(RemoteChatModel(parse_address(server.url))) as model,
    ):
        expected = join(event for event in model.generate(MESSAGES, OPTIONS) if isinstance(event, Delta))
        events: list[ChatEvent] = []
        lost = session.pids[1]
        for event in model.generate(MESSAGES, OPTIONS):
            events.append(event)
            if lost and len([event for event in events if isinstance(event, Delta)]) == 3:
                os.kill(lost, signal.SIGKILL)
                lost = 0
        assert join(event for event in events if isinstance(event, Delta)) == expected
        (interrupted,) = (event for event in events if isinstance(event, Interrupted))
        assert "rank 1" in interrupted.reason
        assert [type(event) for event in events if isinstance(event, Resumed)] == [Resumed]
        assert isinstance(events[-1], Finished)
        status = model.status()
        assert [restart.reason for restart in status.restarts] == [interrupted.reason]
        assert (status.restarts[0].downtime_s or 0) > 0
        assert [rank.share for rank in status.ranks] == ["50% of each expert", "50% of each expert"]
        assert all((rank.memory_bytes or 0) > 0 < (rank.free_bytes or 0) for rank in status.ranks)
