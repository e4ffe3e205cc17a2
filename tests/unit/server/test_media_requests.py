"""Images and videos in the bodies of all APIs: their translation, their locations, and models that see none."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.anthropic.messages_body import MessagesBody
from kimi_mlx.server.anthropic.request import to_chat_request as from_anthropic
from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse
from kimi_mlx.server.media import resolve_media
from kimi_mlx.server.message_content import MissingMediaError, RemoteUrl
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_request import to_chat_request as from_responses
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.text.messages import Message
from tests.examples import examples
from tests.fakes import KIMI_MINI

DATA_URL = "data:image/png;base64,AAAA"
BASE64 = "data:;base64,AAAA"
REASON = "the checkpoint has no vision tower"

Part = dict[str, Any]


def chat(*messages: Part) -> ChatRequest:
    return parse(ChatBody, json.dumps({"messages": messages}).encode()).to_chat_request()


def responses(*items: Part) -> ChatRequest:
    return from_responses(parse(ResponsesBody, json.dumps({"input": items, "instructions": "Be brief."}).encode()))


def anthropic(*messages: Part) -> ChatRequest:
    return from_anthropic(parse(MessagesBody, json.dumps({"messages": messages, "system": "Be brief."}).encode()))


def user(*parts: Part) -> Part:
    return {"role": "user", "content": list(parts)}


def text(value: str, kind: str = "text") -> Part:
    return {"type": kind, "text": value}


def image(url: str) -> Part:
    """Return an image in the form in which the prompt is made from it."""
    return {"type": "image_url", "image_url": {"url": url}}


CHAT_CALL = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}
CALL_ITEM = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
CALL_BLOCK = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": DATA_URL}},
        {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "high"}},
        {"type": "image_url", "image_url": DATA_URL},
        {"type": "input_image", "image_url": DATA_URL, "detail": "low"},
    ],
)
def test_an_image_of_chat_completions(part: Part) -> None:
    request = chat(user(text("What"), text(" is this?"), part, part, text("And this?")))
    content = (text("What is this?"), image(DATA_URL), image(DATA_URL), text("And this?"))
    assert request.messages == (Message("user", content),)
    assert [request.part_places[0][at] for at in (1, 2)] == ["messages[0].content[2]", "messages[0].content[3]"]


def test_a_video_of_chat_completions() -> None:
    url = "data:video/mp4;base64,AAAA"
    for part in ({"type": "video_url", "video_url": {"url": url}}, {"type": "video_url", "video_url": url}):
        assert chat(user(part)).messages == (Message("user", ({"type": "video_url", "video_url": {"url": url}},)),)


def test_an_image_in_a_result_of_chat_completions() -> None:
    result = {"role": "tool", "tool_call_id": "a", "content": [text("Seen:"), {"type": "image_url", "image_url": "x"}]}
    request = chat(user(text("Hi")), CHAT_CALL, result)
    assert request.messages[2] == Message("tool", (text("Seen:"), image("x")), tool_call_id="a")
    assert request.part_places[2] == ("", "messages[2].content[1]")


def test_images_of_the_responses_api() -> None:
    part = {"type": "input_image", "detail": "auto", "image_url": DATA_URL}
    output = {"type": "function_call_output", "call_id": "a", "output": [text("Seen:", "input_text"), part]}
    request = responses(user(part, text("What?", "input_text")), CALL_ITEM, output)
    assert request.messages[1] == Message("user", (image(DATA_URL), text("What?")))
    assert request.messages[3] == Message("tool", (text("Seen:"), image(DATA_URL)), tool_call_id="a")
    assert request.part_places[1][0] == "input[0].content[0]"
    assert request.part_places[3][1] == "input[2].output[1]"


def test_images_of_the_messages_api() -> None:
    by_url = {"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [text("Seen:"), BLOCK], "is_error": True}
    request = anthropic(user(text("One"), text("Two"), BLOCK, by_url), CALL_BLOCK, user(result, BLOCK, text("Now?")))
    assert request.messages[1:] == (
        Message("user", (text("One\n\nTwo"), image(BASE64), image("https://example.org/x.png"))),
        request.messages[2],
        Message("tool", (text("Error: Seen:"), image(BASE64)), tool_call_id="a"),
        Message("user", (image(BASE64), text("Now?"))),
    )
    assert request.part_places[1][1:] == ("messages[0].content[2]", "messages[0].content[3]")
    assert request.part_places[3][1] == "messages[2].content[0].content[1]"
    assert request.part_places[4][0] == "messages[2].content[1]"


@pytest.mark.parametrize(
    ("convert", "part", "param", "message"),
    [
        (chat, {"type": "image_url"}, "messages[0].content[0].image_url", "required field is missing"),
        (chat, {"type": "image_url", "image_url": {}}, "messages[0].content[0].image_url.url", "field is missing"),
        (chat, {"type": "image_url", "image_url": 5}, "messages[0].content[0].image_url", "a string or an object"),
        (
            chat,
            {"type": "video_url", "image_url": "x"},
            "messages[0].content[0].video_url",
            "required field is missing",
        ),
        (responses, {"type": "input_image", "file_id": "f"}, "input[0].content[0].file_id", "send a data URL"),
        (responses, {"type": "input_image"}, "input[0].content[0].image_url", "required field is missing"),
        (anthropic, {"type": "image"}, "messages[0].content[0].source", "required field is missing"),
        (
            anthropic,
            {"type": "image", "source": {"type": "file", "file_id": "f"}},
            "messages[0].content[0].source.type",
            "`file` is not supported: use `base64`",
        ),
        (anthropic, {"type": "image", "source": {"type": "base64"}}, "messages[0].content[0].source.data", "missing"),
        (anthropic, {"type": "image", "source": {"type": "url"}}, "messages[0].content[0].source.url", "missing"),
    ],
)
def test_incomplete_parts(convert: Callable[..., ChatRequest], part: Part, param: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as error:
        convert(user(part))
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_only_users_and_tools_send_images(role: str) -> None:
    part = {"type": "image_url", "image_url": DATA_URL}
    with pytest.raises(ApiError, match=rf"`image_url` in a message of role `{role}` is not supported: use `text`"):
        chat({"role": role, "content": [part]})
    with pytest.raises(ApiError, match=rf"`input_image` in a message of role `{role}` is not supported"):
        responses({"role": role, "content": [{"type": "input_image", "image_url": DATA_URL}]})
    if role != "developer":
        with pytest.raises(ApiError, match=rf"`image` in a message of role `{role}` is not supported"):
            anthropic(user(text("Hi")), {"role": role, "content": [BLOCK]}, user(text("Hi")))


@pytest.fixture(scope="module")
def text_only() -> PromptBuilder:
    return PromptBuilder(ChatTokenizer.load(KIMI_MINI), 2000, {}, REASON)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (chat(user(text("What?"), {"type": "image_url", "image_url": "https://x"})), "messages[0].content[1]"),
        (responses(user(text("What?"), {"type": "input_image", "image_url": DATA_URL})), "input[0].content[1]"),
        (anthropic(user(text("What?"), BLOCK)), "messages[0].content[1]"),
    ],
)
def test_a_model_without_vision_refuses_images(text_only: PromptBuilder, request_: ChatRequest, param: str) -> None:
    for prepare in (text_only.prepare, text_only.count_tokens):
        with pytest.raises(ApiError, match="images are not supported: this model reads text only") as error:
            prepare(request_)
        assert (error.value.status, error.value.param, error.value.hint) == (400, param, REASON)
        assert error.value.message.startswith(f"`{param}`: ")


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("t", "one"),
        ("tt", "one\n\none"),
        ("ti", ({"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": DATA_URL}})),
        ("tu", "one\n\n[PART: not supported]"),
        ("f", "[IMAGE: not supported]"),
    ],
)
def test_results_of_tools_reach_the_model_alike_from_all_apis(kinds: str, expected: Any) -> None:
    source = {"type": "url", "url": DATA_URL}
    parts = {
        "t": [{"type": kind, "text": "one"} for kind in ("text", "input_text", "text")],
        "i": [
            {"type": "image_url", "image_url": {"url": DATA_URL}},
            {"type": "input_image", "image_url": DATA_URL},
            {"type": "image", "source": source},
        ],
        "u": [{"type": "odd"}] * 3,
        "f": [
            {"type": "image_url"},
            {"type": "input_image", "file_id": "x"},
            {"type": "image", "source": {"type": "file"}},
        ],
    }
    in_chat, in_responses, in_anthropic = ([parts[kind][api] for kind in kinds] for api in range(3))
    requests = (
        chat(user(text("Hi")), CHAT_CALL, {"role": "tool", "tool_call_id": "a", "content": in_chat}),
        responses(CALL_ITEM, {"type": "function_call_output", "call_id": "a", "output": in_responses}),
        anthropic(
            user(text("Hi")), CALL_BLOCK, user({"type": "tool_result", "tool_use_id": "a", "content": in_anthropic})
        ),
    )
    for request in requests:
        content = request.messages[-1].content
        if isinstance(content, str):  # notes have the name of the part, which differs
            content = re.sub(r"\[(image_url|input_image|image):", "[IMAGE:", content.replace("[odd:", "[PART:"))
        assert content == expected


def test_a_model_without_vision_reads_the_texts_of_results(text_only: PromptBuilder) -> None:
    results = [
        chat(
            user(text("Hi")),
            CHAT_CALL,
            {"role": "tool", "tool_call_id": "a", "content": [text("Seen:"), {"type": "image_url", "image_url": "x"}]},
        ),
        responses(
            user(text("Hi", "input_text")),
            CALL_ITEM,
            {
                "type": "function_call_output",
                "call_id": "a",
                "output": [text("Seen:", "input_text"), {"type": "input_image", "image_url": "x"}],
            },
        ),
        anthropic(
            user(text("Hi")),
            CALL_BLOCK,
            user({"type": "tool_result", "tool_use_id": "a", "content": [text("Seen:"), BLOCK]}),
        ),
    ]
    for request in results:
        assert resolve_media(request, REASON, {}).messages[-1].content == "Seen:\n\n[image: this model reads text only]"
        assert text_only.prepare(request).request.images == ()
        assert text_only.count_tokens(request) > 10


@pytest.fixture(scope="module")
def seeing() -> PromptBuilder:
    return PromptBuilder(ChatTokenizer.load(KIMI_MINI.with_name("kimi-mini-vl")), 2000, {})


URLS = st.one_of(
    st.text(max_size=30),
    st.binary(max_size=40).map(lambda data: f"data:image/png;base64,{base64.b64encode(data).decode()}"),
    st.sampled_from(["https://a.example/x", "data:", "data:,", "DATA:;base64,====", "file:///x", "data:image/png,%00"]),
)
VALUES = st.one_of(
    st.none(),
    URLS,
    st.integers(),
    st.dictionaries(st.sampled_from(["url", "detail", "type", "data", "media_type"]), st.one_of(st.none(), URLS)),
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["image_url", "input_image", "video_url", "image", "text"])},
    optional=dict.fromkeys(("image_url", "video_url", "source", "file_id", "text", "detail"), VALUES),
)


def error_of(prepare: Callable[[], object]) -> ApiError | MissingMediaError | None:
    try:
        prepare()
    except (ApiError, MissingMediaError) as error:
        return error
    return None


@examples(50)
@given(parts=st.lists(PARTS, max_size=4))
@pytest.mark.parametrize("convert", [chat, responses, anthropic])
def test_any_part_is_served_or_refused(
    seeing: PromptBuilder, text_only: PromptBuilder, convert: Callable[..., ChatRequest], parts: list[Part]
) -> None:
    for builder in (seeing, text_only):
        error = error_of(lambda: builder.prepare(convert(user(*parts))))  # noqa: B023
        if isinstance(error, MissingMediaError):
            assert all(not remote.url.lower().startswith("data:") for remote in error.urls)
        elif error is not None:
            assert error.status == 400


def test_urls_are_replaced_by_their_contents() -> None:
    urls = ["https://a.example/1.png", DATA_URL, "https://b.example/2.png"]
    request = chat(user(*({"type": "image_url", "image_url": url} for url in urls)))
    fetched: Mapping[str, bytes] = {urls[0]: b"one", urls[2]: b"two"}
    for known in ({}, {urls[0]: b"one"}):
        with pytest.raises(MissingMediaError) as error:
            resolve_media(request, None, known)
        places = (RemoteUrl(urls[0], "messages[0].content[0]"), RemoteUrl(urls[2], "messages[0].content[2]"))
        assert error.value.urls == places
    (message,) = resolve_media(request, None, fetched).messages
    parts: Any = message.content
    assert [part["image_url"]["url"] for part in parts] == [b"one", DATA_URL, b"two"]
