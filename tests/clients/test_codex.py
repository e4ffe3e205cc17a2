"""Codex from npm runs small tasks with its default tools: functions, a namespace, a custom tool with a grammar."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from tests.clients.packages import npm_folder
from tests.clients.recorder import ClientServer
from tests.scripted_model import Answer, Call, write_scripted_model
from tests.server.running_server import serving

pytestmark = pytest.mark.clients

CODEX = "@openai/codex@0.171.0"
PATCH = """*** Begin Patch
*** Add File: note.txt
+The sum is 46.
*** End Patch
"""

ANSWERS = (
    Answer(
        "I read the numbers.",
        reasoning="There is a file with numbers. I should read it first.",
        calls=(Call("exec_command", {"cmd": "cat numbers.txt"}),),
    ),
    Answer(
        reasoning="12 and 34 make 46. I write it down, and look for other agents.",
        calls=(
            Call("exec_command", {"cmd": "echo $((12 + 34)) > sum.txt"}),
            Call("multi_agent_v1__close_agent", {"target": "00000000-0000-0000-0000-000000000000"}),
        ),
    ),
    Answer("The sum is 46; it is in sum.txt."),
)

PATCHING = (
    Answer("I write the note.", calls=(Call("apply_patch", PATCH),)),
    Answer("I look for another agent.", calls=(Call("tool_search", {"query": "close an agent"}),)),
    Answer(calls=(Call("multi_agent_v1__close_agent", {"target": "00000000-0000-0000-0000-000000000000"}),)),
    Answer("The note is written."),
)

GROWING = (
    Answer("I count.", calls=(Call("exec_command", {"cmd": "seq 1 400"}),)),
    Answer("I count again.", calls=(Call("exec_command", {"cmd": "echo done"}),)),
    Answer("Summary: the numbers were shown.", after="CONTEXT CHECKPOINT COMPACTION"),
    Answer("All numbers were shown.", after="Summary: the numbers were shown."),
)
WINDOW = "model_context_window = 20000"


def run_codex(tmp_path: Path, url: str, task: str, model: str = "default", setting: str = "") -> list[dict[str, Any]]:
    """Run `codex exec` in a folder with a file; return its events."""
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    (work / "numbers.txt").write_text("12\n34\n")
    (home / "config.toml").write_text(
        f'model = "{model}"\nmodel_provider = "kimi"\n{setting}\n'
        f'[model_providers.kimi]\nname = "kimi"\nbase_url = "{url}/v1"\nwire_api = "responses"\n'
    )
    codex = npm_folder(CODEX) / ".bin" / "codex"
    command = [codex, "exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", task]
    environment = {**os.environ, "CODEX_HOME": str(home)}
    done = subprocess.run(
        command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def agents_of(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the calls of tools for other agents, with their results."""
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [(item["tool"], item["status"]) for item in items if item["type"] == "collab_tool_call"]


def messages_of(events: list[dict[str, Any]]) -> list[str]:
    """Return the texts of the model."""
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in items if item["type"] == "agent_message"]


def test_codex_runs_commands_and_a_tool_of_a_namespace(
    tmp_path: Path, serve_script: Callable[[Sequence[Answer]], ClientServer]
) -> None:
    server = serve_script(ANSWERS)
    events = run_codex(tmp_path, server.url, "Add the numbers in numbers.txt")
    assert (tmp_path / "work" / "sum.txt").read_text() == "46\n"
    assert messages_of(events) == ["I read the numbers.", "The sum is 46; it is in sum.txt."]
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    outputs = [item["aggregated_output"] for item in items if item["type"] == "command_execution"]
    assert "12\n34\n" in outputs[0]
    assert agents_of(events) == [("close_agent", "failed")]  # there is no such agent
    server.check("codex", CODEX)


def test_codex_applies_a_patch_and_finds_a_tool(tmp_path: Path) -> None:
    """The patch is the input of a custom tool with a grammar; Codex runs the tool search."""
    folder = write_scripted_model(tmp_path / "model", PATCHING)
    model = "gpt-5.5"  # a model for which Codex has these tools
    with (
        closing(open_session(SessionOptions(folder))) as session,
        serving(session, folder=folder, aliases=[model]) as server,
    ):
        events = run_codex(tmp_path, server.url, "Write a note", model)
    assert (tmp_path / "work" / "note.txt").read_text() == "The sum is 46.\n"
    assert messages_of(events) == ["I write the note.", "I look for another agent.", "The note is written."]
    assert agents_of(events) == [("close_agent", "failed")]


def test_codex_compacts_a_conversation_that_grows(tmp_path: Path) -> None:
    """Its first prompt has 17,000 tokens; it compacts at 90 % of the window."""
    folder = write_scripted_model(tmp_path / "model", GROWING, context_tokens=24_000)
    with closing(open_session(SessionOptions(folder))) as session, serving(session, folder=folder) as server:
        events = run_codex(tmp_path, server.url, "Show numbers", setting=WINDOW)
        tokens = server.metric('kimi_mlx_tokens_total{kind="prompt"}')
    assert messages_of(events) == ["I count.", "I count again.", "All numbers were shown."]
    assert tokens > 60_000  # four requests: two steps, the summary, and the one that continues from it
