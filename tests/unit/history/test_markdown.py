"""Conversations as Markdown."""

from __future__ import annotations

import re

from kimi_mlx.engine.events import Finished
from kimi_mlx.history.log import ConversationLog
from kimi_mlx.history.markdown import to_markdown
from kimi_mlx.history.store import HistoryStore
from kimi_mlx.text.messages import Delta, Message, ToolCall
from tests.unit.history.conftest import finished


def test_a_conversation_as_markdown(log: ConversationLog, store: HistoryStore) -> None:
    call = ToolCall("functions.add:0", "add", '{"a":1}')
    log.add_messages(
        [
            Message("user", [{"type": "image", "image": b"pixels"}, {"type": "text", "text": "Add."}]),
            Message("assistant", "", "First\nthink.", (call,)),
            Message("tool", "```3```", tool_call_id=call.id),
            Message("assistant", "# Three\n"),
            Message("user", "Again"),
        ]
    )
    log.on_delta(Delta("Thr"))
    conversation = store.conversation(1)
    text = to_markdown(conversation, store.messages(1))
    assert re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "TIME", text) == (
        f"# Add.\n\n*{conversation.id} · TIME · kimi-mini*\n\n## System\n\nBe brief.\n\n"
        "## You\n\n[image]\nAdd.\n\n"
        "## kimi-mini\n\n> First\n> think.\n\n"
        '**tool call add**\n\n```json\n{\n  "a": 1\n}\n```\n\n'
        "**result of functions.add:0**\n\n````\n```3```\n````\n\n"
        "## kimi-mini\n\n# Three\n\n"
        "## You\n\nAgain\n\n"
        "## kimi-mini\n\nThr\n\n*[unfinished: the chat ended before the answer did]*\n"
    )


def test_removed_messages_are_marked(log: ConversationLog, store: HistoryStore) -> None:
    end: Finished = finished()
    log.on_message(Message("user", "Hello"))
    log.on_message(Message("assistant", "Hi"))
    log.on_finish(end, Message("assistant", "Hi"))
    log.on_remove(1)
    log.on_message(Message("assistant", "Hello!"))
    text = to_markdown(store.conversation(1), store.messages(1, with_removed=True))
    assert text.index("## kimi-mini (removed)\n\nHi") < text.index("## kimi-mini\n\nHello!")
