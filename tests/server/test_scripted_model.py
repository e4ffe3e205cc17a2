"""The scripted model gives its answers, in turn or to a text, with and without thinking, grammars and sampling."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import openai
import pytest

from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from tests.scripted_model import Answer, Call, write_scripted_model
from tests.server.running_server import serving

LIST: dict[str, Any] = {"command": ["bash", "-lc", "ls -la"], "note": "repeats: bash bash bash"}
ANSWERS = (
    Answer(
        "First I look at the files, then at the tests, then at the files.",
        reasoning="The user wants the files. So I list the files.",
        calls=(Call("shell", LIST), Call("shell", {"command": ["pwd"], "note": "bash"}), Call("shell", LIST)),
    ),
    Answer("There are two files. Éclair 🍰.", calls=(Call("shell", {"command": ["pwd"], "note": "again"}),)),
    Answer("Done."),
    Answer("A title", after="Write a title"),
)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = write_scripted_model(tmp_path_factory.mktemp("scripted"), ANSWERS)
    with closing(open_session(SessionOptions(folder))) as session, serving(session, folder=folder) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "shell",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "array", "items": {"type": "string"}}, "note": {"type": "string"}},
            "required": ["command", "note"],
        },
    },
}


@pytest.mark.parametrize(("thinks", "is_strict"), [(True, False), pytest.param(False, True, marks=pytest.mark.slow)])
def test_a_conversation_follows_the_script(scripted: openai.OpenAI, thinks: bool, is_strict: bool) -> None:
    tool: Any = {**TOOL, "function": {**TOOL["function"], "strict": is_strict}}
    messages: list[Any] = [{"role": "user", "content": "What is here? " * 40}]
    for answer in ANSWERS[:3]:
        given = scripted.chat.completions.create(
            model="kimi-mini",
            messages=messages,
            tools=[tool],
            temperature=1,
            extra_body={"chat_template_kwargs": {"thinking": thinks}},
        )
        message = given.choices[0].message
        assert message.content == answer.text
        assert (message.to_dict().get("reasoning_content") or "") == (answer.reasoning if thinks else "")
        calls: list[Any] = [call.to_dict()["function"] for call in message.tool_calls or ()]
        assert [Call(call["name"], json.loads(call["arguments"])) for call in calls] == list(answer.calls)
        messages.append(message.to_dict())
        messages += [{"role": "tool", "tool_call_id": c.id, "content": "ok"} for c in message.tool_calls or ()]


def test_an_answer_to_a_text(scripted: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Write a title for this: files"}]
    given = scripted.chat.completions.create(model="kimi-mini", messages=messages)
    assert given.choices[0].message.content == "A title"


def test_text_that_repeats_itself_too_often_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="repeats itself too often"):
        write_scripted_model(tmp_path, [Answer("a" * 5000)])
