"""Progress of the prompt, times and the number of prompt tokens; GET /v1/cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import httpx2
import openai
import pytest

from kimi_mlx.engine.events import Encoded, Event, Finished, Interrupted, Prefilled, Resumed, Statistics, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.model_status import ModelStatus
from kimi_mlx.session.session import DraftStatus, EventCallback, SessionStatus
from tests.fakes import KIMI_MINI, FixedSession
from tests.server.running_server import RunningServer, serving, wait_until

MESSAGES = [{"role": "user", "content": "What are you?"}]


class ScriptedSession(FixedSession):
    """A session that answers with given events."""

    def __init__(self, events: Sequence[Event]):
        super().__init__([])
        self._events = events

    def submit(self, request: Request, on_event: EventCallback) -> int:
        for event in self._events:
            on_event(event)
        return 1


def chunks(url: str, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": MESSAGES, "stream": True, "temperature": 0, **fields}
    text = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status().text
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


@pytest.mark.slow
def test_chunks_without_the_option_have_no_new_fields(running: RunningServer) -> None:
    new = {"prompt_progress", "image_progress", "notice", "timings"}
    answer = chunks(running.url, stream_options={"include_usage": True})
    assert all(not new & chunk.keys() for chunk in answer)
    assert [len(chunk["choices"]) for chunk in answer].count(0) == 1  # the usage
    whole = httpx2.post(f"{running.url}/v1/chat/completions", json={"messages": MESSAGES}, timeout=60).json()
    assert "timings" not in whole


def test_progress_and_times(running: RunningServer) -> None:
    answer = chunks(running.url, return_progress=True, stream_options={"include_usage": True})
    progress = [chunk["prompt_progress"] for chunk in answer if "prompt_progress" in chunk]
    total = progress[0]["total"]
    assert [item["total"] for item in progress] == [total] * len(progress)
    assert progress[-1]["processed"] == total
    assert all(item["cache"] == progress[0]["processed"] for item in progress)
    usage, timings = answer[-1]["usage"], answer[-1]["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == total == usage["prompt_tokens"]
    assert timings["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"] == progress[0]["cache"]
    assert timings["predicted_n"] == usage["completion_tokens"]
    assert timings["prompt_ms"] > 0 < timings["predicted_per_second"]
    whole = {"messages": MESSAGES, "return_progress": True}
    response = httpx2.post(f"{running.url}/v1/chat/completions", json=whole, timeout=60).json()
    assert response["timings"]["predicted_n"] == response["usage"]["completion_tokens"]


@pytest.mark.slow
def test_the_package_of_openai_reads_a_stream_with_progress(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "default", "messages": MESSAGES, "temperature": 0}
    plain = client.chat.completions.create(**arguments).choices[0].message.content
    with client.chat.completions.stream(**arguments, extra_body={"return_progress": True}) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == plain
    parts = client.chat.completions.create(**arguments, stream=True, extra_body={"return_progress": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts if chunk.choices) == plain


def test_images_and_restarts_are_reported() -> None:
    ids = ChatTokenizer.load(KIMI_MINI).encode("Hello")
    statistics = Statistics(4, 1, len(ids), 0.5, 1.0, 10**9, len(ids), 0.25)
    events: list[Event] = [
        Prefilled(1, 4),
        Encoded(1, 1, 1, 2),
        Prefilled(4, 4),
        Interrupted("rank 1 (`mac-b`) stopped", 1, 3, 10.0),
        Resumed(12.0),
        *map(Token, ids),
        Finished("stop", statistics),
    ]
    with serving(ScriptedSession(events)) as server:
        answer = chunks(server.url, return_progress=True)
    reported = [
        {key: chunk[key] for key in chunk if key not in ("id", "object", "created", "model")} for chunk in answer
    ]
    assert [item for item in reported if "prompt_progress" not in item][:3] == [
        {"choices": [], "image_progress": {"image": 1, "num_images": 1, "done": 1, "total": 2}},
        {
            "choices": [],
            "notice": {
                "type": "interrupted",
                "reason": "rank 1 (`mac-b`) stopped",
                "attempt": 1,
                "attempts": 3,
                "wait_s": 10.0,
            },
        },
        {"choices": [], "notice": {"type": "resumed", "seconds": 12.0}},
    ]
    timings = answer[-1]["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["encode_ms"]) == (1, 3, 250)
    assert (timings["prompt_per_second"], timings["peak_memory_bytes"]) == (pytest.approx(12), 10**9)


def test_input_tokens_are_those_of_the_answer(running: RunningServer) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    for fields in ({}, {"tools": [tool]}, {"chat_template_kwargs": {"thinking": False}}):
        body = {"messages": [{"role": "system", "content": "Be brief"}, *MESSAGES], "max_tokens": 1, **fields}
        url = f"{running.url}/v1/chat/completions"
        answer = httpx2.post(url, json=body, timeout=60).raise_for_status().json()
        count = httpx2.post(f"{url}/input_tokens", json=body, timeout=60).raise_for_status().json()
        assert count == {"object": "response.input_tokens", "input_tokens": answer["usage"]["prompt_tokens"]}
    assert httpx2.post(f"{running.url}/v1/chat/completions/input_tokens", json={"messages": []}).status_code == 400


def test_cluster_describes_the_model_and_its_answers() -> None:
    ids = ChatTokenizer.load(KIMI_MINI).encode("Hello")
    session = FixedSession(ids, pause_s=0.02, is_endless=True)
    with serving(session) as server, httpx2.Client(base_url=server.url, timeout=60) as client:
        body = {"messages": MESSAGES, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body):
            wait_until(lambda: [item["state"] for item in client.get("/v1/cluster").json()["answers"]] == ["decode"])
            document = client.get("/v1/cluster").json()
        status = ModelStatus.from_dict(document)
        assert (status.model, status.is_up, status.active, status.waiting) == ("kimi-mini", True, 1, 0)
        (answer,) = document["answers"]
        assert answer["state"] == "decode"
        assert answer["processed_tokens"] == answer["prompt_tokens"] > 0 < answer["generated_tokens"]
        assert document["rates"].keys() >= {"interval_s", "prompt_tokens", "completion_tokens"}
        wait_until(lambda: not client.get("/v1/cluster").json()["answers"])
        schema = client.get("/openapi.json").json()["components"]["schemas"]["ClusterStatus"]["properties"]
        assert schema.keys() == document.keys()
        assert document["drafts"] is None


def test_cluster_says_why_nothing_is_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = DraftStatus(drafted_tokens=40, accepted_tokens=25, off_reason="a step of 4 tokens takes 2.9 times as long")
    monkeypatch.setattr(FixedSession, "status", lambda self: SessionStatus(True, drafts=drafts))
    with serving(FixedSession([])) as server:
        assert httpx2.get(f"{server.url}/v1/cluster", timeout=60).json()["drafts"] == asdict(drafts)


def test_experts_on_the_disk_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = ExpertStats(30, 10, 1000, 0.5, 8, 6, 1, 4, kept_experts=5, num_experts=20, expert_bytes=100)
    monkeypatch.setattr(FixedSession, "status", lambda self: SessionStatus(True, experts={0: stats}))
    with serving(FixedSession([])) as server:
        document = httpx2.get(f"{server.url}/v1/cluster", timeout=60).json()
        lines = httpx2.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    assert document["ranks"][0]["experts"] == asdict(stats)
    assert ModelStatus.from_dict(document).ranks[0].experts == stats
    expected = {
        'kimi_mlx_experts_total{result="hit"} 30.0',
        'kimi_mlx_experts_total{result="miss"} 10.0',
        'kimi_mlx_expert_guesses_total{result="right"} 6.0',
        'kimi_mlx_expert_guesses_total{result="wrong"} 2.0',
        "kimi_mlx_expert_read_bytes_total 1000.0",
        "kimi_mlx_expert_wait_seconds_total 0.5",
        "kimi_mlx_experts_kept_ratio 0.25",
    }
    assert expected <= set(lines)
