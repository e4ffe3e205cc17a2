"""Images over HTTP: what reaches the session, and refusals. The session is a fake with a fixed answer."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
from PIL import Image

from kimi_mlx.engine.request import Request
from kimi_mlx.images.prepare import prepare_image
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.server import ServingOptions
from tests.fakes import KIMI_MINI, FixedSession
from tests.server import raw
from tests.server.picture_server import serving_pictures
from tests.server.running_server import RunningServer, serving

KIMI_MINI_VL = KIMI_MINI.with_name("kimi-mini-vl")
TOOL = {"name": "look", "description": "Look", "parameters": {"type": "object", "properties": {}}}
CHAT_TOOL: Any = {"type": "function", "function": TOOL}


def png(color: str = "red", size: tuple[int, int] = (90, 60)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


RED, BLUE = png(), png("blue", (40, 70))


def chat_image(data: bytes = RED) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data), "detail": "low"}}


def block(data: bytes = RED) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
    return {"type": "image", "source": source}


def ask(*parts: dict[str, Any]) -> list[Any]:
    """Return a question of the user with images."""
    return [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, *parts]}]


@pytest.fixture(scope="module")
def fixed() -> FixedSession:
    tokenizer = ChatTokenizer.load(KIMI_MINI_VL)
    return FixedSession([tokenizer.tokenizer.special_tokens["</think>"], *tokenizer.encode("A circle.")])


@pytest.fixture(scope="module")
def server(fixed: FixedSession) -> Iterator[RunningServer]:
    options = ServingOptions(max_body_bytes=3_000_000, log_prompts=True)
    with serving(fixed, options, context_tokens=2000, folder=KIMI_MINI_VL) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as opened:
        yield opened


@pytest.fixture
def anthropic_client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as opened:
        yield opened


def check_images(request: Request, *files: bytes) -> None:
    """Check that a request has the images, each with its placeholder tokens."""
    pad = ChatTokenizer.load(KIMI_MINI_VL).tokenizer.special_tokens["<|media_pad|>"]
    assert len(request.images) == len(files)
    covered: list[int] = []
    for image, data in zip(request.images, files, strict=True):
        prepared = prepare_image(data, "expected")
        assert (image.grid, image.digest, image.num_tokens) == (prepared.grid, prepared.digest, prepared.num_tokens)
        assert image.patches is not None
        assert np.array_equal(image.patches, prepared.patches)
        covered += range(image.start, image.stop)
    assert [at for at, id in enumerate(request.prompt) if id == pad] == covered


def test_images_of_chat_completions(client: openai.OpenAI, fixed: FixedSession) -> None:
    answer = client.chat.completions.create(model="default", messages=ask(chat_image(), chat_image(BLUE)))
    assert answer.choices[0].message.content == "A circle."
    check_images(fixed.requests[-1], RED, BLUE)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(fixed.requests[-1].prompt)
    chunks = list(client.chat.completions.create(model="default", messages=ask(chat_image()), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "A circle."
    check_images(fixed.requests[-1], RED)


def test_images_of_the_responses_api(client: openai.OpenAI, fixed: FixedSession) -> None:
    part = {"type": "input_image", "detail": "auto", "image_url": data_url(RED)}
    call: Any = {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"}
    output: Any = {"type": "function_call_output", "call_id": "a", "output": [{**part, "image_url": data_url(BLUE)}]}
    question: Any = {"role": "user", "content": [part, {"type": "input_text", "text": "What is this?"}]}
    response = client.responses.create(model="default", input=[question, call, output])
    assert response.output_text == "A circle."
    check_images(fixed.requests[-1], RED, BLUE)
    assert response.usage is not None
    assert response.usage.input_tokens == len(fixed.requests[-1].prompt)


def test_images_of_the_messages_api(anthropic_client: anthropic.Anthropic, fixed: FixedSession) -> None:
    use = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [block(BLUE)]}
    messages: Any = [*ask(block()), {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    params: Any = {"model": "default", "messages": messages}
    message = anthropic_client.messages.create(max_tokens=50, **params)
    assert message.content[-1].text == "A circle."  # pyright: ignore[reportAttributeAccessIssue]
    check_images(fixed.requests[-1], RED, BLUE)
    assert message.usage.input_tokens == len(fixed.requests[-1].prompt)
    assert anthropic_client.messages.count_tokens(**params).input_tokens == message.usage.input_tokens


def test_images_with_tools_several_answers_and_a_schema(client: openai.OpenAI, fixed: FixedSession) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        *ask(chat_image()),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [chat_image(BLUE)]},
    ]
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    before = len(fixed.requests)
    answer = client.chat.completions.create(
        model="default", messages=messages, tools=[CHAT_TOOL], n=2, response_format=schema, reasoning_effort="none"
    )
    assert len(answer.choices) == 2
    first, second = fixed.requests[before:]
    check_images(first, RED, BLUE)
    assert first.images == second.images
    assert first.grammar is not None


def broken(name: str) -> bytes:
    """Return a broken or hostile file."""
    if name == "header of a bomb":
        whole = bytearray(RED)
        whole[16:24] = (30_000).to_bytes(4, "big") * 2
        return bytes(whole)
    return {"empty": b"", "truncated": RED[:-40], "no image": b"%PDF-1.7 nothing to see"}[name]


@pytest.mark.parametrize("name", ["empty", "truncated", "no image", "header of a bomb"])
def test_broken_images_are_refused_with_their_location(server: RunningServer, name: str) -> None:
    data = broken(name)
    part = {"type": "input_image", "image_url": data_url(data)}
    for path, body, place in (
        ("chat/completions", {"messages": ask(chat_image(), chat_image(data))}, "messages[0].content[2]"),
        ("responses", {"input": [{"role": "user", "content": [part]}]}, "input[0].content[0]"),
        ("messages", {"messages": ask(block(data)), "max_tokens": 5}, "messages[0].content[1]"),
        ("messages/count_tokens", {"messages": ask(block(data))}, "messages[0].content[1]"),
    ):
        response = raw.request(server.port, "POST", f"/v1/{path}", json.dumps(body).encode())
        error = response.error
        assert response.status == 400, response.body
        assert error["message"].startswith(f"`{place}`: ")
        if not path.startswith("messages"):
            assert (error["param"], error["code"]) == (place, "invalid_image")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png", "comma"),
        ("https://example.org/x.png", "this server does not fetch images from URLs"),
        ("file:///etc/passwd", "`file` URLs are not supported"),
        ("iVBORw0KGgo", "not a URL"),
    ],
)
def test_other_urls_are_refused(client: openai.OpenAI, url: str, reason: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(openai.BadRequestError, match=reason) as error:
        client.chat.completions.create(model="default", messages=ask(part))
    assert error.value.param == "messages[0].content[1]"


def test_too_many_images_and_too_long_prompts(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="100") as error:
        client.chat.completions.create(model="default", messages=ask(*[chat_image()] * 101))
    assert str(error.value.param).startswith("messages[0].content[")
    large = png(size=(1500, 1500))
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2000 tokens") as error:
        client.chat.completions.create(model="default", messages=ask(*[chat_image(large)] * 100))
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError, match=r"the limit is 3\.0 MB") as too_large:
        client.chat.completions.create(model="default", messages=ask(chat_image(b"x" * 3_000_000)))
    assert too_large.value.status_code == 413


def test_images_by_url(server: RunningServer, client: openai.OpenAI, fixed: FixedSession) -> None:
    service = server.server.service
    original = service.image_fetcher
    with serving_pictures(RED) as pictures:
        service.image_fetcher = pictures.fetcher()
        try:
            remote = {"type": "image_url", "image_url": {"url": pictures.url("image")}}
            client.chat.completions.create(model="default", messages=ask(remote, chat_image(BLUE), remote))
            check_images(fixed.requests[-1], RED, BLUE, RED)
            assert len(pictures.requests) == 1
            source = {"type": "url", "url": pictures.url("status/500")}
            body = {"messages": ask({"type": "image", "source": source}), "max_tokens": 5}
            response = raw.request(server.port, "POST", "/v1/messages", json.dumps(body).encode())
            assert response.status == 400
            assert "answered with status 500" in response.error["message"]
        finally:
            service.image_fetcher = original


def test_models_report_that_they_see(server: RunningServer) -> None:
    model = json.loads(raw.request(server.port, path="/v1/models/default").body)
    assert model["architecture"] == {"input_modalities": ["text", "image", "video"], "output_modalities": ["text"]}
    assert (model["supports_image_in"], model["supports_video_in"]) == (True, True)
    document = json.loads(raw.request(server.port, path="/openapi.json").body)
    assert document["info"]["description"].endswith("Input: text, images, videos.")
    assert "image_url" in document["components"]["schemas"]["ContentPart"]["properties"]
    assert "ImageBlock" in document["components"]["schemas"]


def test_the_log_has_no_data_of_images(
    server: RunningServer, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    with caplog.at_level(logging.INFO, logger="kimi_mlx"):
        for data in (file.getvalue(), file.getvalue()[:-20]):
            for path, part in (("messages", block(data)), ("chat/completions", chat_image(data))):
                body = {"messages": ask(part), "max_tokens": 5}
                raw.request(server.port, "POST", f"/v1/{path}", json.dumps(body).encode())
        server.wait_idle()
    assert "What is this?" in caplog.text
    assert "data:image/png;base64,(" in caplog.text
    encoded = base64.b64encode(file.getvalue()).decode()
    assert not any(encoded[at : at + 24] in caplog.text for at in range(0, len(encoded) - 24, 8))
