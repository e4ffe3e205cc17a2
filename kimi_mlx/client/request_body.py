"""Bodies of requests for chat completions, from messages and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from kimi_mlx.images.data_url import to_data_url
from kimi_mlx.session.chat_model import ChatOptions
from kimi_mlx.text.media import KINDS
from kimi_mlx.text.messages import Message


def chat_body(model: str, messages: Sequence[Message], options: ChatOptions) -> dict[str, Any]:
    """Return the body of a chat completion that is not streamed; only options that are set are in it.

    Args:
        model: name of the model on the server.
        messages: conversation.
        options: options of the answer.
    """
    body: dict[str, Any] = {"model": model, "messages": [_message(message) for message in messages]}
    body |= options.sampling
    if options.max_tokens is not None:
        body["max_tokens"] = options.max_tokens
    if options.template_kwargs:
        body["chat_template_kwargs"] = dict(options.template_kwargs)
    if options.tools:
        choice = options.tool_choice
        is_named = not isinstance(choice, str)
        body["tools"] = list(options.tools)
        body["tool_choice"] = {"type": "function", "function": dict(choice)} if is_named else choice
        if not options.parallel_tool_calls:
            body["parallel_tool_calls"] = False
    schema = options.response_schema
    if schema is True:
        body["response_format"] = {"type": "json_object"}
    elif isinstance(schema, Mapping):
        named = {"name": "answer", "schema": dict(schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return body


def _message(message: Message) -> dict[str, Any]:
    """Return a message in OpenAI's format, with the contents of files as data URLs."""
    fields = message.to_dict()
    if message.content is not None and not isinstance(message.content, str):
        fields["content"] = [_part(part) for part in message.content]
    return fields


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of a message; an image or a video in any of our forms becomes `image_url` or `video_url`."""
    kind = KINDS.get(str(part.get("type")))
    if kind is None:
        return dict(part)
    value: Any = next((part[key] for key in (str(part["type"]), f"{kind}_url", kind) if key in part), None)
    source: Any = cast("Mapping[str, Any]", value).get("url") if isinstance(value, Mapping) else value
    if isinstance(source, bytes):
        source = to_data_url(source)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": source}}
