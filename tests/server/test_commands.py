"""Command-line clients: curl, and Simon Willison's `llm` with its extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.dom.minidom import parseString

import pytest

from tests.server.running_server import RunningServer

LIMIT_S = 100
PELICAN = "Generate an SVG of a pelican riding a bicycle"
MODELS = """
- model_id: kimi-mini
  model_name: kimi-mini
  api_base: "{url}/v1"
  supports_schema: true
  supports_tools: true
"""


def llm(home: Path, *arguments: str) -> str:
    """Run `llm` and return its output."""
    env = {**os.environ, "LLM_USER_PATH": str(home)}
    command = [sys.executable, "-m", "llm", *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def home(tmp_path: Path, running: RunningServer) -> Path:
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=running.url))
    return tmp_path


@pytest.mark.slow
def test_llm_generates_an_svg(home: Path) -> None:
    drawing = llm(home, "-m", "kimi-mini", PELICAN, "-o", "max_tokens", "2000", "-o", "temperature", "0")
    document = parseString(drawing[drawing.index("<svg") : drawing.index("</svg>") + 6])
    assert document.getElementsByTagName("circle")


@pytest.mark.slow
def test_llm_with_a_schema(home: Path) -> None:
    answer = llm(home, "-m", "kimi-mini", "--no-stream", "--schema", "name, age int", "Invent a dog", "-o", "seed", "1")
    dog = json.loads(answer)
    assert {"name", "age"} <= set(dog)
    assert isinstance(dog["age"], int)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(running: RunningServer) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "stream": True})
    command = ["curl", "-sN", f"{running.url}/v1/chat/completions", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] in ("length", "stop")
