"""Agent frameworks and other libraries from PyPI: text, a tool with its result, a stream, and structured output.

Each runs a program of `programs` in an environment of its own, with a model that follows a script.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.clients.packages import python_with
from tests.clients.recorder import ClientServer
from tests.scripted_model import Answer, Call

pytestmark = pytest.mark.clients

LIMIT_S = 300
DOG = {"name": "Rex", "age": 3}
HELLO, WEATHER = "Hello, I am here.", "It is 21 degrees in Oslo."
CODE = "Thought: I write it.\n<code>\nfinal_answer(get_weather('Oslo'))\n</code>"
ANSWERS = (
    Answer(HELLO),
    Answer("I look it up.", calls=(Call("get_weather", {"city": "Oslo"}),), after="weather in Oslo"),
    Answer(WEATHER, after="21 degrees"),
    Answer(json.dumps(DOG), after="Invent a dog"),
    Answer(calls=(Call("Dog", DOG),), after="Call a dog"),
)
AGENTS = (
    Answer(HELLO),
    Answer("I look it up.", calls=(Call("get_weather", {"city": "Oslo"}),), after="weather in Oslo"),
    Answer(calls=(Call("final_answer", {"answer": WEATHER}),), after="21 degrees", num_earlier_calls=1),
    Answer(CODE, after="Write code"),
)


def run_program(server: ClientServer, package: str, program: str, *arguments: str) -> dict[str, Any]:
    """Run a program in an environment with a package; return what it prints."""
    python = python_with(package)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"URL": server.url}
    command = [str(python), str(Path(__file__).parent / "programs" / f"{program}.py"), *arguments]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


LIBRARIES = {
    "pydantic_ai_agents": ("pydantic-ai-slim[openai,anthropic]==2.68.0", {"chat": 3, "responses": 3, "messages": 2}),
    "openai_agents": ("openai-agents==0.24.0", {"chat": 1, "responses": 1}),
    "litellm_package": ("litellm==1.110.2", {"openai": 1, "hosted_vllm": 1, "moonshot": 0, "anthropic": 0}),
    "langchain": ("langchain-openai==1.7.4", {"chat": 3, "responses": 3}),
    "haystack_agent": ("haystack-ai==3.4.1", {"chat": 1, "responses": 1}),
}
"""Packages by program, and the number of ways to a structured output that the program tries, by form of the API."""


@pytest.mark.parametrize("program", LIBRARIES)
def test_a_library(serve_script: Callable[[Sequence[Answer]], ClientServer], program: str) -> None:
    package, forms = LIBRARIES[program]
    server = serve_script(ANSWERS)
    results = run_program(server, package, program)
    assert results == {
        form: {"text": WEATHER, "streamed": HELLO, "dogs": [DOG] * num_dogs} for form, num_dogs in forms.items()
    }
    server.check(program, package)


def test_smolagents(serve_script: Callable[[Sequence[Answer]], ClientServer]) -> None:
    server = serve_script(AGENTS)
    package = "smolagents[openai]==1.26.0"
    results = run_program(server, package, "smolagents_agents")
    assert results == {"chat": {"text": WEATHER, "streamed": HELLO, "code": "21 degrees"}}
    server.check("smolagents_agents", package)


MODES = {
    "openai": (
        *("FUNCTIONS", "TOOLS", "TOOLS_STRICT", "PARALLEL_TOOLS", "JSON", "JSON_O1", "JSON_SCHEMA", "MD_JSON"),
        *("RESPONSES_TOOLS", "RESPONSES_TOOLS_WITH_INBUILT_TOOLS"),
    ),
    "anthropic": ("ANTHROPIC_TOOLS", "ANTHROPIC_REASONING_TOOLS", "ANTHROPIC_PARALLEL_TOOLS", "ANTHROPIC_JSON"),
}


def test_all_modes_of_instructor(serve_script: Callable[[Sequence[Answer]], ClientServer]) -> None:
    """Each mode without a stream and as a stream of partial objects; those for several calls have one answer."""
    server = serve_script(ANSWERS)
    modes = [f"{api}:{mode}" for api, modes in MODES.items() for mode in modes]
    package = "instructor[anthropic]==1.17.0"
    results = run_program(server, package, "instructor_modes", *modes)
    assert results == {mode: [DOG] * (1 if "PARALLEL" in mode else 2) for mode in modes}
    server.check("instructor", package)
