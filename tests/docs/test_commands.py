"""Every shell command of the README and the docs: it runs here with kimi-mini, or is listed with the reason why not.

Commands of kimi-mlx that cannot run here must still be understood: their options exist.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from kimi_mlx.cli.app import app
from kimi_mlx.history.store import HistoryStore
from kimi_mlx.text.messages import Message
from tests.processes import start

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
LIMIT_S = 120

NOT_RUN = {
    r"(pipx|pip|uv tool) ": "installs from the repository's address",
    r"uv run ": "test_uv_run types it",
    r"scripts/(demo|test|check)|\.ci/run": ".ci/run runs it",
    r"\. \.venv/bin/activate": "belongs to an interactive shell",
    r"ssh|sudo ": "changes this machine or another one",
    r"export |claude|qwen |aider |cline |lm_eval |openssl ": "sets up another program",
    r"kimi-mlx history rm": "asks a question: tests/unit/cli/test_history.py removes conversations",
    r"kimi-mlx chat --mcp mcp\.json": "starts the user's servers: the examples with docs/mcp-toys.json run",
    r"kimi-mlx service ": "starts a server in the background: tests/services runs it",
    r"kimi-mlx plan .*--hostfile": "needs the hosts of the hostfile",
    r"llm ": "tests/server/test_commands.py types it",
    r"mlx\.launch ": "needs a second host",
    r"kimi-mlx (launch|doctor .*--host)": "needs a second host: tests/cluster runs the same over ssh",
    r"kimi-mlx .*(moonlight|kimi-k2|moonshotai|Kimi-K2)(?!.*(--sources|models))": "needs the weights of a real model",
    r"(git|make|curl) .*\| kimi-mlx chat kimi-k2": "needs the weights of a real model",
    r"kimi-mlx doctor .*--gpu": "needs a GPU: tests/unit/gpu_check runs it on a CPU",
    r"kimi-mlx bench|scripts/bench": "takes minutes: tests/bench and tests/cli/test_bench.py run them with less to do",
    r"kimi-mlx serve .*--host": "listens on all interfaces: tests/cli/test_serve.py runs it",
    r"curl http://mac-a": "needs a second host",
    r".*kimi-mlx chat .*--url": "needs a server: tests/cli/test_chat_url.py starts one",
    r"curl .*(keys|KIMI_MLX_API_KEY)": "needs the key of another example",
}
"""Pattern of a command -> why it is not run. The first that matches counts."""

RUN_ANYWAY = re.compile(r"kimi-mlx (models|plan (?!.*--hostfile))")
"""Commands that name real models and need none of their files."""


@dataclass(frozen=True)
class Example:
    """A command of a page.

    Args:
        page: path of the page.
        command: text, without its comment.
    """

    page: str
    command: str

    @property
    def reason(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if RUN_ANYWAY.match(self.command):
            return None
        return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, self.command)), None)


def read_examples() -> list[Example]:
    """Return the commands of all pages; a command may continue over lines."""
    examples: dict[str, Example] = {}  # by command, with its first page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))):
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            text = ""
            for line in block.splitlines():
                text = f"{text}\n{line}" if text else line
                if text.endswith("\\") or text.count("'") % 2:
                    continue
                command = re.sub(r"\s+#(?= ).*$", "", text.replace("\\\n", " ")).strip()
                if command and not command.startswith("#"):
                    examples.setdefault(command, Example(str(page.relative_to(ROOT)), command))
                text = ""
    return list(examples.values())


EXAMPLES = read_examples()
RUNNABLE = [example for example in EXAMPLES if example.reason is None]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment with `kimi-mlx` on the path, and folders of its own for what commands write.

    Commands of pages are for a clone, so images and servers have their paths there.
    """
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    folder = tmp_path / "bin"
    folder.mkdir()
    python = folder / "python"  # of the MCP server in docs/mcp-toys.json
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    program = folder / "kimi-mlx"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m kimi_mlx "$@"\n')
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "KIMI_MLX_STORES": str(tmp_path / "stores"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
    }


def run_server(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Start `kimi-mlx serve` on a free port, wait until it listens, and stop it with Ctrl-C."""
    process = start([*shlex.split(command), "--port", "0"], cwd=folder, text=True, env=environment)
    assert process.stderr is not None
    try:
        assert any("http://127.0.0.1:" in line for line in process.stderr)
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 130


def type_of(command: str) -> str:
    """Return a pipeline that types a question where a command would open a conversation."""
    return f'echo "What are you?" | {command}' if re.fullmatch(r"kimi-mlx chat( --\S+( \S+)?)*", command) else command


def add_conversation(folder: Path) -> None:
    """Put the conversation of the page's commands into the history of a test."""
    with closing(HistoryStore.open(folder / "kimi-mlx" / "conversations")) as store:
        number = store.create("kimi-mini").number
        store.add_message(number, Message("user", "A quarterly report"), "kimi-mini", {})
        with closing(sqlite3.connect(store.path)) as connection, connection:
            connection.execute("UPDATE conversations SET id = 'k3m9x7ab'")


def test_the_pages_have_commands() -> None:
    assert len(RUNNABLE) >= 12
    assert {"README.md", "docs/chat.md", "docs/models.md"} <= {example.page for example in RUNNABLE}


def test_every_reason_is_needed() -> None:
    for pattern in NOT_RUN:
        assert any(re.match(pattern, example.command) for example in EXAMPLES), pattern


def with_new_parts() -> list[Any]:
    """Return the commands to run; one whose subcommand and options are all in earlier ones is left to the sweep."""
    found, known = list[Any](), set[str]()
    for example in RUNNABLE:
        subcommand = " ".join(re.findall(r"kimi-mlx [a-z]+(?: [a-z]+\b(?!-))?|curl.*|[|>]", example.command))
        options = re.findall(r"\s(--?[a-z][\w-]*)", example.command)
        parts = {subcommand, *(f"{subcommand} {option}" for option in options)}
        found.append(pytest.param(example, marks=pytest.mark.sweep if parts <= known else pytest.mark.slow))
        known |= parts
    return found


@pytest.mark.parametrize("example", with_new_parts(), ids=lambda each: each.command[:60])
def test_command_runs(example: Example, tmp_path: Path, environment: dict[str, str]) -> None:
    if example.command.startswith("curl "):
        run_client(example.command, tmp_path, environment)
        return
    if example.command.startswith("kimi-mlx serve"):
        run_server(example.command, tmp_path, environment)
        return
    if "--continue" in example.command or "history" in example.command:
        add_conversation(tmp_path / "data")
    if "--verify" in example.command:  # of what the command before it has made
        run_shell(example.command.replace(" --verify", ""), tmp_path, environment)
    done = run_shell(type_of(example.command), tmp_path, environment)
    # 1: this machine has a problem, or runs no server
    expected = {0, 1} if example.command in ("kimi-mlx doctor", "kimi-mlx status") else {0}
    assert done.returncode in expected, done.stderr
    assert done.stdout.strip() or "no server of yours" in done.stderr
    if "chat" in example.command and "--json" not in example.command:
        assert len(done.stdout) < 400  # an answer, not garbage


def run_shell(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command as a user types it."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )


def run_client(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a curl example against a server of its own."""
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    server = start([*shlex.split("kimi-mlx serve --port 0")], cwd=folder, text=True, env=environment)
    assert server.stderr is not None
    url = next(found[0] for line in server.stderr if (found := re.search(r"http://127.0.0.1:\d+", line)))
    command = command.replace("http://127.0.0.1:8080", url)
    done = run_shell(command.replace("curl -N ", "curl -N --max-time 3 "), folder, environment)  # a stream has no end
    server.send_signal(signal.SIGINT)
    answer = '"context_tokens"' if "/v1/cluster" in command else '"choices"'
    assert answer in done.stdout, done.stdout + done.stderr
    server.wait(LIMIT_S)


def parse(arguments: list[str]) -> str:
    """Parse a command line of kimi-mlx without running it, and return the name of the command that would run.

    An option or command that does not exist is a UsageError of Click.
    """
    command, parent, name = get_command(app), None, "kimi-mlx"
    while isinstance(command, TyperGroup):
        parent = command.make_context(name, arguments[:1], parent=parent, resilient_parsing=True)
        name, *arguments = arguments
        command = command.get_command(parent, name)
        assert command is not None, name
    context = command.make_context(name, arguments, parent=parent)
    return parse(context.args) if context.args else name  # `launch` runs another command


@pytest.mark.parametrize(
    "example",
    [each for each in EXAMPLES if re.fullmatch(r"kimi-mlx [a-z][^|&>]*", each.command)],
    ids=lambda each: each.command[:60],
)
def test_command_is_understood(example: Example) -> None:
    arguments = shlex.split(example.command)[1:]
    if any(re.search(r"[|\[\]]|^N$", argument) for argument in arguments):
        return  # a synopsis
    assert parse(arguments) in arguments


@pytest.mark.network
def test_uv_run(tmp_path: Path) -> None:
    """`uv run kimi-mlx chat` in a clone: uv resolves all extras for all Pythons first."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None or not (ROOT / ".git").exists():
        pytest.skip("no uv, or no clone")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))}
    environment["UV_SYSTEM_CERTS"] = "1"  # of a proxy, too
    began = time.monotonic()
    done = subprocess.run(
        [uv, "run", "--quiet", "kimi-mlx", "chat"],
        cwd=clone,
        env=environment,
        input="What are you?",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "kimi-mini" in done.stdout, f"after {time.monotonic() - began:.0f} s: {done.stderr}"
