"""Conversations as JSON in OpenAI's format: `{"messages": [...]}`, written and read. Files may come from other tools.

Source: https://platform.openai.com/docs/api-reference/chat/create. Besides a bare list of messages, two formats of
other tools are read: ShareGPT's `{"conversations": [{"from": "human", "value": ...}]}`, and the list that
`llm logs --json` prints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from kimi_mlx.errors import KimiMlxError, UsageError
from kimi_mlx.files import irregular_kind
from kimi_mlx.history.json_text import has_surrogates
from kimi_mlx.images.data_url import read_data_url, to_data_url
from kimi_mlx.images.limits import DEFAULT_LIMITS
from kimi_mlx.text.media import KINDS
from kimi_mlx.text.messages import Message
from kimi_mlx.units import MB, format_bytes

MAX_FILE_BYTES = 200 * MB
MAX_DEPTH = 100
"""Nesting of lists and objects; OpenAI's format has 6 levels, and arguments of a tool may add some."""

FORMAT_HINT = 'a conversation is JSON: {"messages": [{"role": "user", "content": "Hello"}]}'

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class LoadedConversation:
    """A conversation from a file.

    Attributes:
        messages: messages after the system prompt.
        system: system prompt; None if the file has none.
        title: title, if the file is of kimi-mlx; else empty.
    """

    messages: Sequence[Message]
    system: str | None = None
    title: str = ""


def to_document(messages: Sequence[Message], system: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return a conversation in OpenAI's format, with images and videos as data URLs.

    Args:
        messages: messages after the system prompt.
        system: system prompt.
        fields: other fields before the messages, such as `title`.
    """
    first = [Message("system", system)] if system else []
    return {**fields, "messages": [_with_data_urls(message.to_dict()) for message in (*first, *messages)]}


def read_conversation(path: Path) -> LoadedConversation:
    """Read a conversation from a file.

    Raises:
        UsageError: the file cannot be read, is too large or nested too deeply, is not JSON, or is not a conversation.
    """
    document = _read_json(path)
    try:
        messages = [_read_message(value, index) for index, value in enumerate(_find_messages(document))]
    except UsageError as error:
        raise UsageError(f"`{path}` is not a conversation: {error.message}", hint=error.hint) from None
    system = None
    if messages and messages[0].role == "system" and isinstance(messages[0].content, str):
        system = messages.pop(0).content
    if not messages:
        raise UsageError(f"`{path}` has no messages of a conversation")
    title = document.get("title") if isinstance(document, dict) else None
    assert system is None or isinstance(system, str)
    return LoadedConversation(messages, system, title if isinstance(title, str) and not has_surrogates(title) else "")


def _read_json(path: Path) -> Any:
    kind = irregular_kind(path)
    if kind is not None:
        raise UsageError(f"`{path}` is {kind}, not a file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"`{path}` cannot be read: {error.strerror}", hint="check its name and permissions") from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"`{path}` is larger than {format_bytes(MAX_FILE_BYTES)}")
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"`{path}` is not text in UTF-8: {error.reason} at byte {error.start}", hint=FORMAT_HINT
        ) from None
    except RecursionError:
        raise UsageError(f"`{path}` is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise UsageError(f"`{path}` is not JSON: {error}", hint=FORMAT_HINT) from None
    if _is_too_deep(document):
        raise UsageError(f"`{path}` is nested more than {MAX_DEPTH} levels deep")
    return document


def _is_too_deep(document: Any) -> bool:
    level = [document]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += cast("dict[str, Any]", value).values()
            elif isinstance(value, list):
                inner += cast("list[Any]", value)
        level = inner
    return bool(level)


def _find_messages(document: Any) -> Sequence[Any]:
    """Return the list of messages of a document, converted to OpenAI's format if another tool has written it."""
    if isinstance(document, dict):
        fields = cast("dict[str, Any]", document)
        if isinstance(turns := fields.get("conversations"), list):
            return [_from_sharegpt(turn) for turn in cast("list[Any]", turns)]
        document = fields.get("messages")
    if not isinstance(document, list):
        raise UsageError(
            'there is no list "messages"', hint='write {"messages": [{"role": "user", "content": "Hello"}]}'
        )
    values = cast("list[Any]", document)
    if values and all(isinstance(value, dict) and "prompt" in value and "response" in value for value in values):
        return _from_llm_logs(values)
    return values


def _from_sharegpt(turn: Any) -> Any:
    if not isinstance(turn, dict) or turn.get("from") not in SHAREGPT_ROLES:
        return turn
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}


def _from_llm_logs(logs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": logs[0]["system"]}] if logs[0].get("system") else []
    for log in logs:
        messages.append({"role": "user", "content": log["prompt"]})
        messages.append({"role": "assistant", "content": log["response"]})
    return messages


def _read_message(value: Any, index: int) -> Message:
    place = f"messages[{index}]"
    if not isinstance(value, dict):
        raise UsageError(f"{place} is not an object: `{value!r:.60}`")
    fields = cast("dict[str, Any]", value)
    if fields.get("role") == "developer":
        fields = {**fields, "role": "system"}
    if not isinstance(fields.get("tool_calls") or [], list):
        raise UsageError(f"{place}.tool_calls is not a list")
    try:
        message = Message.from_dict(fields)
        if has_surrogates(json.dumps(fields, ensure_ascii=False)):
            raise UsageError("it has half of a surrogate pair, which is not a character", hint="remove it")
        if isinstance(message.content, str | None):
            return message
        parts = [_read_part(part, f"{place}.content[{number}]") for number, part in enumerate(message.content)]
    except KimiMlxError as error:
        reason = error.message if error.message.startswith((place, f"`{place}")) else f"{place}: {error.message}"
        raise UsageError(reason, hint=error.hint) from None
    return replace(message, content=parts)


def _read_part(part: Any, place: str) -> Mapping[str, Any]:
    """Return a part of a message, with the contents of a data URL in its place."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if not isinstance(kind, str) or kind not in KINDS:
        raise UsageError(f"{place} is neither text nor an image: `{part!r:.60}`")
    value = part.get(kind)
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        raise UsageError(f"{place} has no URL")
    is_image = KINDS[kind] == "image"
    limit = DEFAULT_LIMITS.max_bytes if is_image else DEFAULT_LIMITS.max_video_bytes
    return {"type": KINDS[kind], KINDS[kind]: read_data_url(url, place, limit)}


def _with_data_urls(document: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(document["content"], list | tuple):
        return document
    return {**document, "content": [_with_data_url(part) for part in document["content"]]}


def _with_data_url(part: Mapping[str, Any]) -> Mapping[str, Any]:
    for key, value in part.items():
        if isinstance(value, bytes):
            name = f"{KINDS[key]}_url"
            return {"type": name, name: {"url": to_data_url(value)}}
    return part
