"""Coding tools from npm and PyPI run a small task: two commands, the second one from what the first has shown.

The model follows a script. Codex has a test of its own (test_codex.py).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.clients.packages import node, npm_folder, python_with
from tests.clients.recorder import ClientServer
from tests.scripted_model import Answer, Call

pytestmark = pytest.mark.clients

TASK = "Add the numbers in numbers.txt and write the sum to sum.txt"
RESULT = "The sum is 46."
TOKENS = 131_072


@dataclass(frozen=True)
class CodingTool:
    """A coding tool.

    Args:
        package: npm package with its version.
        command: name of the program, and its arguments. Everywhere, `ADDRESS` stands for that of the server.
        shell: name of its tool for commands.
        files: settings, by path in the user's folder.
        work_files: settings, by path in the project's folder.
        variables: environment variables.
        setup: a command that runs first.
        is_list: whether the tool takes a list of commands.
    """

    package: str
    command: Sequence[str]
    shell: str
    files: Mapping[str, str] = field(default_factory=dict)
    work_files: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    setup: Sequence[str] = ()
    is_list: bool = False

    def call(self, command: str) -> Call:
        """Return the call of its shell."""
        return Call(self.shell, {"commands": [command]} if self.is_list else {"command": command})


OPENCODE = {
    "model": "kimi-mlx/kimi-mini",
    "provider": {
        "kimi-mlx": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": "ADDRESS/v1", "apiKey": "any"},
            "models": {"kimi-mini": {"limit": {"context": TOKENS, "output": 8192}}},
        }
    },
}
PI = {"baseUrl": "ADDRESS/v1", "api": "openai-completions", "apiKey": "any", "models": [{"id": "kimi-mini"}]}
KIMI_CODE = f"""default_model = "kimi"
[providers.kimi-mlx]
type = "kimi"
base_url = "ADDRESS/v1"
api_key = "any"
[models.kimi]
provider = "kimi-mlx"
model = "kimi-mini"
max_context_size = {TOKENS}
capabilities = ["thinking"]
"""
CODING_TOOLS = {
    "claude_code": CodingTool(
        "@anthropic-ai/claude-code@2.1.332",
        ("claude", "-p", TASK, "--dangerously-skip-permissions"),
        "Bash",
        variables={
            "ANTHROPIC_BASE_URL": "ADDRESS",
            "ANTHROPIC_AUTH_TOKEN": "any",
            "ANTHROPIC_MODEL": "kimi-mini",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "kimi-mini",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "IS_SANDBOX": "1",  # or root may not skip the permissions
        },
    ),
    "opencode": CodingTool(
        "opencode-ai@1.18.33",
        ("opencode", "run", TASK),
        "bash",
        work_files={"opencode.json": json.dumps(OPENCODE)},
    ),
    "kimi_code": CodingTool(
        "@moonshot-ai/kimi-code@2.1.0", ("kimi", "-p", TASK), "Bash", files={".kimi-code/config.toml": KIMI_CODE}
    ),
    "qwen_code": CodingTool(
        "@qwen-code/qwen-code@0.24.4",
        ("qwen", "--auth-type", "openai", "--yolo", "-p", TASK),
        "run_shell_command",
        variables={"OPENAI_BASE_URL": "ADDRESS/v1", "OPENAI_API_KEY": "any", "OPENAI_MODEL": "kimi-mini"},
    ),
    "pi": CodingTool(
        "@earendil-works/pi-coding-agent@1.6.0",
        ("pi", "--provider", "kimi-mlx", "--model", "kimi-mini", "-p", TASK),
        "bash",
        files={".pi/agent/models.json": json.dumps({"providers": {"kimi-mlx": PI}})},
        variables={"PI_OFFLINE": "1"},
    ),
    "cline": CodingTool(
        "cline@3.0.65",
        ("cline", TASK),
        "run_commands",
        setup=("cline", "auth", "-p", "openai", "-k", "any", "-m", "kimi-mini", "-b", "ADDRESS/v1"),
        is_list=True,
    ),
}


def two_commands(call: Callable[[str], Call]) -> tuple[Answer, ...]:
    """Return the answers of a model that reads the numbers, writes their sum, and says it."""
    return (
        Answer("I read the numbers.", calls=(call("cat numbers.txt"),)),
        Answer("I add them.", calls=(call("echo $((12 + 34)) > sum.txt"),)),
        Answer(RESULT),
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The project's folder."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "numbers.txt").write_text("12\n34\n")
    return tmp_path / "work"


def run(command: Sequence[str], work: Path, programs: Sequence[Path], variables: Mapping[str, str]) -> str:
    """Run a program in the project's folder, with an empty user's folder beside it; return what it prints."""
    path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
    environment = {"PATH": path, "HOME": str(work.parent / "home"), "TERM": "dumb", "LANG": "C.UTF-8", **variables}
    done = subprocess.run(
        command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("name", CODING_TOOLS)
def test_a_coding_tool_runs_commands(
    name: str, work: Path, serve_script: Callable[[Sequence[Answer]], ClientServer]
) -> None:
    tool = CODING_TOOLS[name]
    programs = [node().parent, npm_folder(tool.package) / ".bin"]
    server = serve_script(two_commands(tool.call))
    for folder, files in ((work.parent / "home", tool.files), (work, tool.work_files)):
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text.replace("ADDRESS", server.url))
    variables = {key: value.replace("ADDRESS", server.url) for key, value in tool.variables.items()}
    output = ""
    for command in (tool.setup, tool.command):
        if command:
            arguments = [argument.replace("ADDRESS", server.url) for argument in command[1:]]
            output = run([str(programs[1] / command[0]), *arguments], work, programs, variables)
    assert (work / "sum.txt").read_text() == "46\n"
    assert RESULT in output
    assert any("34" in json.dumps(request.body) for request in server.recorder.requests)
    server.check(name, tool.package)


def test_aider_writes_a_file(work: Path, serve_script: Callable[[Sequence[Answer]], ClientServer]) -> None:
    """It has no tools: the answer holds the file."""
    package = "aider-chat==0.86.2"
    aider = python_with(package).with_name("aider")
    server = serve_script((Answer(f"{RESULT}\n\nsum.txt\n```\n46\n```\n"),))
    options = ["--no-git", "--no-check-update", "--analytics-disable", "--no-show-model-warnings", "--yes-always"]
    variables = {"OPENAI_API_BASE": f"{server.url}/v1", "OPENAI_API_KEY": "any"}
    command = [str(aider), "--model", "openai/kimi-mini", *options, "--message", TASK, "numbers.txt"]
    assert RESULT in run(command, work, [aider.parent], variables)
    assert (work / "sum.txt").read_text() == "46\n"
    server.check("aider", package)


def test_kimi_cli(work: Path, serve_script: Callable[[Sequence[Answer]], ClientServer]) -> None:
    """Moonshot's earlier client; it is replaced by kimi-code."""
    package = "kimi-cli==1.51.0"
    kimi = python_with(package, python="python3.13").with_name("kimi")
    server = serve_script(two_commands(lambda command: Call("Shell", {"command": command})))
    settings = work.parent / "home" / ".kimi" / "config.toml"
    settings.parent.mkdir()
    settings.write_text(KIMI_CODE.replace("ADDRESS", server.url))
    assert RESULT in run([str(kimi), "--quiet", "-p", TASK], work, [kimi.parent], {})
    assert (work / "sum.txt").read_text() == "46\n"
    server.check("kimi_cli", package)
