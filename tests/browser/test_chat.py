"""Conversations with the real server: answers, branches, unfinished answers, several tabs."""

from __future__ import annotations

import pytest

from tests.browser.conftest import OpenPage
from tests.server.running_server import RunningServer

pytestmark = pytest.mark.browser


def test_a_conversation(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.wait_model("kimi-mini")
    assert "kimi-mini" in chat.ask("What are you?")
    assert "tok/s" in chat.find(".statistics").inner_text()
    assert chat.find("#title").input_value() == "What are you?"
    address = chat.page.url
    chat.ask("What else?")
    chat.page.reload()
    chat.wait_messages(2)
    assert chat.page.url == address
    assert "kimi-mini" in chat.find(".message.assistant").first.inner_text()
