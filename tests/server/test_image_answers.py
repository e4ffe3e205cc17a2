"""Answers of kimi-mini-vl about pictures: one answer over every API, and command-line clients."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anthropic
import mlx.core as mx
import openai
import pytest

from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from tests.server.running_server import RunningServer, serving
from tests.server.test_commands import LIMIT_S, llm
from tests.server.test_examples import EXAMPLES, run_example
from tests.server.test_images import KIMI_MINI_VL, ask, block, chat_image, data_url, png

MODELS = """
- model_id: kimi-mini-vl
  model_name: default
  api_base: "{url}/v1"
  vision: true
"""
PICTURE = png(size=(96, 96))


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    mx.set_default_device(mx.cpu)  # pyright: ignore[reportArgumentType]
    with (
        closing(open_session(SessionOptions(KIMI_MINI_VL))) as session,
        serving(session, folder=KIMI_MINI_VL) as server,
    ):
        yield server


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURE)
    return path


def test_every_api_gives_the_same_answer(running: RunningServer) -> None:
    common: dict[str, Any] = {"model": "default", "temperature": 0}
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        messages = ask(chat_image(PICTURE))
        chat = client.chat.completions.create(messages=messages, max_tokens=30, reasoning_effort="none", **common)
        text = chat.choices[0].message.content
        assert text
        stream = client.chat.completions.create(
            messages=messages, max_tokens=30, reasoning_effort="none", stream=True, n=2, **common
        )
        streamed = {0: "", 1: ""}
        for chunk in stream:
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        assert streamed == {0: text, 1: text}
        content: Any = [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": data_url(PICTURE)},
        ]
        response = client.responses.create(
            input=[{"role": "user", "content": content}], max_output_tokens=30, reasoning={"effort": "none"}, **common
        )
        assert response.output_text == text
        assert chat.usage is not None
        assert response.usage is not None
        assert response.usage.input_tokens == chat.usage.prompt_tokens
        assert response.usage.input_tokens_details.cached_tokens == chat.usage.prompt_tokens - 1
    with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=0) as anthropic_client:
        message = anthropic_client.messages.create(
            model="default", max_tokens=30, messages=ask(block(PICTURE)), extra_body={"temperature": 0}
        )
        assert [part.text for part in message.content] == [text]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
def test_llm_with_a_picture(running: RunningServer, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=running.url))
    answer = llm(tmp_path, "-m", "kimi-mini-vl", "What is this?", "-a", str(picture), "-o", "max_tokens", "200")
    assert answer.strip()


def test_the_example_of_the_documentation(
    running: RunningServer, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(picture.parent)
    (code,) = [code for code in EXAMPLES if "picture.png" in code]
    run_example(code, running)
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_with_a_picture(running: RunningServer, tmp_path: Path) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PICTURE).decode()}
    body = {"messages": ask({"type": "image", "source": source}), "max_tokens": 5}
    (tmp_path / "body.json").write_text(json.dumps(body))
    command = ["curl", "-s", f"{running.url}/v1/messages", "-d", f"@{tmp_path / 'body.json'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert json.loads(result.stdout)["usage"]["output_tokens"] > 0
