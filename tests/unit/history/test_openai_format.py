"""Files with conversations: what is written is read back, and files that are not conversations have clear errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.errors import UsageError
from kimi_mlx.history.openai_format import read_conversation, to_document
from kimi_mlx.text.messages import Message, ToolCall

PNG = b"\x89PNG\r\n\x1a\n rest"


def write(folder: Path, value: Any) -> Path:
    path = folder / "chat.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    call = ToolCall("functions.add:0", "add", '{"a": 1}')
    messages = [
        Message("user", [{"type": "image", "image": PNG}, {"type": "text", "text": "漢字"}]),
        Message("assistant", "", "hm", (call,)),
        Message("tool", "3", tool_call_id=call.id),
        Message("assistant", "three"),
    ]
    document = to_document(messages, "Be brief.", title="my title")
    url = document["messages"][1]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    read = read_conversation(write(tmp_path, document))
    assert (list(read.messages), read.system, read.title) == (messages, "Be brief.", "my title")


HELLO = [Message("user", "Hello"), Message("assistant", "Hi")]
HELLO_DICTS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize(
    "value",
    [
        HELLO_DICTS,
        {"messages": HELLO_DICTS, "model": "gpt", "unknown": 1},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
        [{"id": "01", "model": "gpt", "prompt": "Hello", "system": None, "response": "Hi"}],
        b"\xef\xbb\xbf" + json.dumps(HELLO_DICTS).encode(),
    ],
)
def test_formats_of_other_tools(tmp_path: Path, value: Any) -> None:
    assert list(read_conversation(write(tmp_path, value)).messages) == HELLO


def test_a_developer_message_is_the_system_prompt(tmp_path: Path) -> None:
    value = [{"role": "developer", "content": "Be brief."}, *HELLO_DICTS]
    assert read_conversation(write(tmp_path, value)).system == "Be brief."


USER = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "is not JSON"),
        (b"{'messages': []}", "is not JSON"),
        (b"\xff\xfe\0", "is not text in UTF-8"),
        (b"[" * 200_000, "nested more than 100 levels deep"),
        (b"[" * 300 + b"]" * 300, "nested more than 100 levels deep"),
        (b'{"a":' * 150 + b"1" + b"}" * 150, "nested more than 100 levels deep"),
        (b"9" * 10_000, "is not JSON|no list"),
        ({}, 'no list "messages"'),
        (None, 'no list "messages"'),
        ({"messages": "Hello"}, 'no list "messages"'),
        ({"messages": []}, "has no messages"),
        ([{"role": "system", "content": "only"}], "has no messages"),
        ([1], r"messages\[0\] is not an object: `1`"),
        ([USER, {"role": "robot"}], r"messages\[1\]: message has the role `robot`"),
        ([{"content": "Hello"}], r"messages\[0\]: message has the role ``"),
        ([{"role": 1}], r"messages\[0\]: `role` of a message is not a string"),
        ([{"role": "user", "content": 5}], r"messages\[0\]: message content is neither a string nor a list"),
        ([{"role": "user", "content": ["Hello"]}], r"messages\[0\].content\[0\] is neither text nor an image"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] is neither text nor an image"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], r"content\[0\] is neither text nor an image"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\] has no URL"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "http://a/b.png"}]}], "URLs are not read"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "data:;base64,!"}]}], "not valid base64"),
        ([{"role": "assistant", "tool_calls": 5}], r"messages\[0\].tool_calls is not a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"messages\[0\]: tool call is not in OpenAI's format"),
        ([USER, {"role": "user", "content": "half \ud800"}], r"messages\[1\]: it has half of a surrogate pair"),
        ([{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}], "half of a surrogate pair"),
        ({"conversations": [{"from": "alien", "value": "Hello"}]}, r"messages\[0\]: message has the role ``"),
        ([{"prompt": 1, "response": 2}], r"messages\[0\]: message content is neither"),
    ],
)
def test_files_that_are_not_conversations(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_conversation(write(tmp_path, value))
    assert "chat.json" in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a pipe"):
        read_conversation(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a folder"):
        read_conversation(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        read_conversation(tmp_path / "missing.json")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(200_000_001)
    with pytest.raises(UsageError, match=r"larger than 200\.0 MB"):
        read_conversation(large)
