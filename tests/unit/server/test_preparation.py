"""Preparation: short bodies in threads, long ones in worker processes, with the same results and errors."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from kimi_mlx.engine.request import Request
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server import preparation
from kimi_mlx.server.anthropic.routes import count_prompt_tokens, read_messages
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.context import PreparedCall, prepare_call
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.openai.responses_routes import read_response
from kimi_mlx.server.openai.routes import read_chat, read_completion
from kimi_mlx.server.preparation import SHORT_BODY_BYTES, Preparation
from kimi_mlx.server.prompts import PromptBuilder
from tests.fakes import KIMI_MINI

MODEL_INFO = ModelInfo("kimi-mini", ("mini",), 50_000, 0)
TEXT = "a long text " * (SHORT_BODY_BYTES // 10)
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat": (read_chat, {"messages": [{"role": "user", "content": TEXT}], "n": 2, "stop": ["x"], "seed": 1}),
    "tools": (read_chat, {"messages": [{"role": "user", "content": TEXT}], "tool_choice": "required",
                          "tools": [{"type": "function", "function": TOOL}]}),
    "completion": (read_completion, {"prompt": [TEXT, "hi"], "echo": True, "stream": True}),
    "response": (partial(read_response, False), {"input": TEXT, "reasoning": {"effort": "low", "summary": "auto"}}),
    "messages": (read_messages, {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 3}),
}  # fmt: skip


@pytest.fixture(scope="module")
def prompt_builder() -> PromptBuilder:
    return PromptBuilder(ChatTokenizer.load(KIMI_MINI), 50_000, {"temperature": 0.5})


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))  # pyright: ignore[reportArgumentType]


def process_id(prompt_builder: PromptBuilder, body: bytes) -> int:
    return os.getpid()


def interrupt(prompt_builder: PromptBuilder, body: bytes) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return os.getpid()


def sleep(prompt_builder: PromptBuilder, body: bytes) -> None:
    time.sleep(30)


def end_the_process(prompt_builder: PromptBuilder, body: bytes) -> None:
    os._exit(1)


def write_much_to_stderr(prompt_builder: PromptBuilder, body: bytes) -> int:
    return os.write(2, bytes(1_000_000))


@pytest.mark.slow
def test_a_worker_that_writes_to_stderr_is_not_blocked(prompt_builder: PromptBuilder) -> None:
    async def work() -> None:
        body = b"x" * (SHORT_BODY_BYTES + 1)
        assert await asyncio.wait_for(Preparation(prompt_builder).run(write_much_to_stderr, body), 20) == 1_000_000

    run(work)


def test_only_long_bodies_go_to_a_worker_process(prompt_builder: PromptBuilder) -> None:
    async def work() -> None:
        pool = Preparation(prompt_builder)
        assert await pool.run(process_id, b"x" * SHORT_BODY_BYTES) == os.getpid()
        worker = await pool.run(process_id, b"x" * (SHORT_BODY_BYTES + 1))
        assert worker != os.getpid()
        # the worker stays for the next one
        body = json.dumps({"messages": [{"role": "user", "content": TEXT}]}).encode()
        count = await pool.run(partial(count_prompt_tokens, MODEL_INFO), body)
        assert count == count_prompt_tokens(MODEL_INFO, prompt_builder, body)
        assert await pool.run(interrupt, body) == worker
        with pytest.raises(ApiError) as error:
            await pool.run(partial(prepare_call, read_chat, MODEL_INFO), b'{"messages": []}' + b" " * len(body))
        assert (error.value.status, error.value.param) == (400, "messages")

    run(work)


@pytest.mark.parametrize("name", BODIES)
def test_what_a_worker_returns_can_be_pickled(prompt_builder: PromptBuilder, name: str) -> None:
    read, body = BODIES[name]
    call = prepare_call(read, MODEL_INFO, prompt_builder, json.dumps(body).encode())
    copy: PreparedCall = pickle.loads(pickle.dumps(call))
    assert (copy.requests, copy.is_stream) == (call.requests, call.is_stream)
    assert type(copy.formatter) is type(call.formatter)
    assert all(isinstance(request.request, Request) for request in copy.requests)


def test_an_error_keeps_all_its_fields_when_it_is_pickled() -> None:
    error = ApiError(429, "full", "queue_full", "n", 3, (("a", "b"),), "more")
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_a_worker_can_be_started_in_advance(
    prompt_builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        monkeypatch.setattr(preparation, "LIMIT_S", 0.0)
        await Preparation(prompt_builder).start_worker()

    run(work)
    assert "cannot start a worker process: preparing the request takes more than 0 s" in caplog.text


@pytest.mark.slow
def test_a_worker_that_ended_while_it_was_idle_is_replaced(prompt_builder: PromptBuilder) -> None:
    async def work() -> None:
        pool = Preparation(prompt_builder)
        long = b"x" * (SHORT_BODY_BYTES + 1)
        for _ in range(3):
            worker = await pool.run(process_id, long)
            os.kill(worker, signal.SIGKILL)
            assert await pool.run(process_id, long) != worker

    run(work)


@pytest.mark.slow
def test_a_worker_that_takes_too_long_or_ends_is_replaced(
    prompt_builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = b"x" * (SHORT_BODY_BYTES + 1)

    async def work() -> None:
        pool = Preparation(prompt_builder)
        first = await pool.run(process_id, long)
        monkeypatch.setattr(preparation, "LIMIT_S", 0.3)
        with pytest.raises(ApiError, match="takes more than") as error:
            await pool.run(sleep, long)
        assert error.value.status == 400
        monkeypatch.setattr(preparation, "LIMIT_S", 60)
        second = await pool.run(process_id, long)
        with pytest.raises(ApiError, match="could not be prepared") as error:
            await pool.run(end_the_process, long)
        assert error.value.status == 503
        assert len({first, second, await pool.run(process_id, long)}) == 3

    run(work)


@pytest.mark.slow
def test_short_bodies_with_images_go_to_a_worker_process(prompt_builder: PromptBuilder) -> None:
    async def work() -> None:
        pool = Preparation(prompt_builder)
        text_only = Preparation(replace(prompt_builder, text_only_reason="it has no vision tower"))
        for media_type in ('"image_url"', '"ima\\u0067e_url"', '"input\\u005fimage"'):
            body = f'{{"type": {media_type}, "image_url": "data:,"}}'.encode()
            assert await pool.run(process_id, body) != os.getpid(), media_type
            assert await text_only.run(process_id, body) == os.getpid(), media_type

    run(work)


@pytest.mark.slow
def test_long_requests_do_not_delay_short_ones(prompt_builder: PromptBuilder) -> None:
    async def work() -> None:
        pool = Preparation(prompt_builder)
        tasks = [asyncio.create_task(pool.run(sleep, b"x" * 100_000)) for _ in range(10)]
        await asyncio.sleep(0.1)
        started = time.monotonic()
        assert await pool.run(process_id, b"x") == os.getpid()
        assert time.monotonic() - started < 5
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(work)
