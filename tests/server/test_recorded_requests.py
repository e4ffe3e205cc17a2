"""Requests that foreign clients have sent (tests/clients), with their fields, and without their own texts."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest

from tests.clients.recorder import REQUESTS
from tests.server.running_server import RunningServer

LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
QUICK = ("codex", "openai_agents", "pydantic_ai_agents")
FILES = [
    pytest.param(file, id=file.stem, marks=() if file.stem in QUICK else pytest.mark.slow)
    for file in sorted(REQUESTS.glob("*.json"))
]
ENDS = {"completions": "[DONE]", "messages": "message_stop", "responses": "response.incomplete"}


@pytest.mark.parametrize("file", FILES)
def test_a_request_of_a_client(running: RunningServer, file: Path) -> None:
    recorded = json.loads(file.read_text())
    body = recorded["body"] | {"model": "default"}
    api = recorded["path"].rsplit("/", 1)[1]
    limit = next((name for name in LIMITS if name in body), "max_output_tokens" if api == "responses" else "max_tokens")
    body[limit] = 4
    response = httpx2.post(f"{running.url}{recorded['path']}", headers=recorded["headers"], json=body, timeout=60)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        lines = response.text.splitlines()
        assert not [line for line in lines if line.startswith("event: error")]
        assert ENDS[api] in "".join(lines[-6:])
    else:
        assert response.json()["usage"]
