"""Images and videos of a conversation before its prompt is made: those given by URL, and models that see none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from kimi_mlx.errors import ImageError
from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.message_content import MissingMediaError, RemoteUrl
from kimi_mlx.text.messages import Content, Message

TEXT_ONLY = "this model reads text only"


def supported_media() -> tuple[str, ...]:
    """Return the kinds of media that a model with vision can be sent: images, and with the extra `video` videos."""
    return ("image", "video") if find_spec("av") else ("image",)


def resolve_media(request: ChatRequest, text_only_reason: str | None, fetched: Mapping[str, bytes]) -> ChatRequest:
    """Return the request with data URLs or contents of files for all of its images and videos.

    If the model sees no images, those in tool results are replaced by a text that says so: the client cannot change the
    result of a tool, and refusing it would end the session.

    Args:
        request: chat request.
        text_only_reason: reason why the model sees no images, for the log; None if it does.
        fetched: contents of the URLs that have been fetched.

    Raises:
        ApiError: 400, the model sees no images.
        MissingMediaError: a URL has not been fetched.
    """
    if all(isinstance(message.content, str | None) for message in request.messages):
        return request
    remote = tuple(_remote_urls(request))
    if text_only_reason is None and any(remote_url.url not in fetched for remote_url in remote):
        raise MissingMediaError(remote)
    messages: list[Message] = []
    for index, message in enumerate(request.messages):
        content = message.content
        if isinstance(content, str | None):
            messages.append(message)
        elif text_only_reason is None:
            messages.append(replace(message, content=_with_contents(content, fetched)))
        elif message.role == "tool":
            messages.append(replace(message, content=_as_text(content)))
        else:
            raise _text_only(content, request.part_places[index], text_only_reason)
    return replace(request, messages=tuple(messages))


def image_error(request: ChatRequest, error: ImageError) -> ApiError:
    """Return the response for an image that cannot be read, with its location in the body."""
    places = {
        f"messages[{index}].content[{number}]": place
        for index, parts in request.part_places.items()
        for number, place in enumerate(parts)
    }
    place = places.get(error.place, error.place)
    return ApiError(400, f"`{place}`: {error.reason}", "invalid_image", place, hint=error.hint)


def _remote_urls(request: ChatRequest) -> Iterator[RemoteUrl]:
    for index, message in enumerate(request.messages):
        if not isinstance(message.content, str | None):
            for part, place in zip(message.content, request.part_places[index], strict=True):
                if part["type"] != "text" and not _is_data_url(_url(part)):
                    yield RemoteUrl(_url(part), place)


def _with_contents(parts: Sequence[Mapping[str, Any]], fetched: Mapping[str, bytes]) -> Content:
    """Replace the URLs that have been fetched by the bytes of the files, which a prompt can be made from as well."""
    return tuple(
        part
        if part["type"] == "text" or _is_data_url(_url(part))
        else {"type": part["type"], part["type"]: {"url": fetched[_url(part)]}}
        for part in parts
    )


def _as_text(parts: Sequence[Mapping[str, Any]]) -> str:
    placeholders = {"image_url": f"[image: {TEXT_ONLY}]", "video_url": f"[video: {TEXT_ONLY}]"}
    return "\n\n".join(placeholders.get(part["type"]) or part["text"] for part in parts)


def _text_only(parts: Sequence[Mapping[str, Any]], places: Sequence[str], reason: str) -> ApiError:
    """Return the refusal of the first image or video of a message."""
    index, part = next((index, part) for index, part in enumerate(parts) if part["type"] != "text")
    noun = "images" if part["type"] == "image_url" else "videos"
    message = f"`{places[index]}`: {noun} are not supported: {TEXT_ONLY}"
    return ApiError(400, message, "unsupported_value", places[index], hint=reason)


def _url(part: Mapping[str, Any]) -> str:
    return part[part["type"]]["url"]


def _is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"
