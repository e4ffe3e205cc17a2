"""Answers that follow a JSON schema, and calls of tools whose results the user enters."""

from __future__ import annotations

import json

import pytest

from tests.browser.chat_page import ChatPage
from tests.browser.conftest import OpenPage
from tests.browser.servers import answering
from tests.server.running_server import RunningServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def call_of(*arguments: object) -> str:
    """Return the output of a model that calls `weather`, once for each of the arguments."""
    calls = [
        f"<|tool_call_begin|>functions.weather:{number}<|tool_call_argument_begin|>{json.dumps(value)}<|tool_call_end|>"
        for number, value in enumerate(arguments)
    ]
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


def set_up(chat: ChatPage, label: str, value: object) -> None:
    chat.click("Settings")
    chat.page.get_by_label(label).fill(json.dumps(value))
    chat.click("Save")
    chat.find("#dialog").wait_for(state="hidden")


def test_json_schemas(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    set_up(chat, "JSON schema", schema)
    chat.send("Who are you?")
    chat.wait_answer()
    shown = chat.find(".message.assistant .content").inner_text()
    values = json.loads(shown[shown.index("{") : shown.index("}") + 1])
    assert values.keys() == {"name", "age"}


def test_settings_that_are_wrong(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.click("Settings")
    for label, value, message in [
        ("JSON schema", "{", "Not valid JSON"),
        ("JSON schema", "[]", "must be an object"),
        ("Tools (JSON", "{}", "must be a list"),
        ("Temperature", "3", "number from 0 to 2"),
        ("Seed", "1.5", "whole number from 0 to"),
    ]:
        field = chat.page.get_by_label(label)
        before = field.input_value()
        field.fill(value)
        chat.click("Save")
        chat.wait_text(message, "#dialog .error")
        assert field.get_attribute("aria-invalid") == "true"
        field.fill(before)
    chat.click("Save")
    chat.find("#dialog").wait_for(state="hidden")


def test_results_of_calls(open_page: OpenPage) -> None:
    with answering(call_of({"city": "Paris"}, {"city": "Rome"})) as server:
        chat = open_page(server.url)
        set_up(chat, "Tools (JSON", [TOOL])
        chat.send("What is the weather?")
        chat.wait_answer()
        chat.wait_text("Call to weather", ".call")
        assert '"city": "Rome"' in chat.find(".call").nth(1).inner_text()
        areas = chat.page.get_by_label("Result: weather")
        assert areas.count() == 2
        areas.nth(0).fill("sunny")
        areas.nth(1).fill("rain")
        chat.click("Send results")
        chat.wait_messages(2)
        chat.wait_answer()
        assert [node.inner_text() for node in chat.find(".message.tool .content").all()] == ["sunny", "rain"]
        assert chat.page.get_by_label("Result: weather").count() == 2  # of the second answer only


@pytest.mark.parametrize("arguments", ["", "not JSON"])
def test_broken_calls(open_page: OpenPage, arguments: str) -> None:
    broken = f"<|tool_calls_section_begin|><|tool_call_begin|>weather<|tool_call_argument_begin|>{arguments}"
    with answering(broken) as server:
        chat = open_page(server.url)
        set_up(chat, "Tools (JSON", [TOOL])
        chat.send("What is the weather?")
        chat.wait_answer()
        assert chat.has_button("Retry")
        chat.send("Again")
        chat.wait_messages(2)
        chat.wait_answer()
