"""The Vercel AI SDK with its default OpenAI provider: from the second step on, it sends references to stored items."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.clients.packages import npm_folder
from tests.clients.recorder import ClientServer
from tests.scripted_model import Answer, Call

pytestmark = pytest.mark.clients

PACKAGES = ("ai@7.0.173", "@ai-sdk/openai@4.0.118", "zod@4.1.12")
SCRIPT = Path(__file__).with_name("ai_sdk.mjs")
ANSWERS = (
    Answer(
        "I read both.",
        reasoning="Two files are to be compared.",
        calls=(Call("read_file", {"path": "a.txt"}), Call("read_file", {"path": "b.txt"})),
    ),
    Answer(reasoning="One is missing.", calls=(Call("read_file", {"path": "c.txt"}),)),
    Answer("They differ."),
)


def test_the_ai_sdk_runs_a_task_with_item_references(serve_script: Callable[[Sequence[Answer]], ClientServer]) -> None:
    packages = npm_folder(*PACKAGES)
    script = shutil.copy(SCRIPT, packages.parent)
    server = serve_script(ANSWERS)
    environment = {**os.environ, "BASE_URL": f"{server.url}/v1"}
    done = subprocess.run(
        ["node", script], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["text"] == "They differ."
    assert result["reasoning"] == ["Two files are to be compared.", "One is missing.", None]
    assert result["calls"] == [["read_file", {"path": f"{name}.txt"}] for name in "abc"]
    assert (result["deltas"], result["streamedText"]) == ("I read both.They differ.", "They differ.")
    assert "item_reference" in result["sent"][1]
    assert result["sent"][3:] == result["sent"][:3]
    server.check("ai_sdk", PACKAGES[0])
