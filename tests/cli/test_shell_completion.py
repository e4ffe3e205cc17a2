"""Completion of command lines: the candidates, and real shells that use them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cli.command_list import COMMANDS
from kimi_mlx.cli.shell_completion.complete import complete
from kimi_mlx.cli.shell_completion.main import split_line
from kimi_mlx.history.store import HistoryStore
from tests.command import call
from tests.terminal import CONTROLLING_TERMINAL, PATIENCE_S, TAB, Terminal

ROOT = Path(__file__).parents[2]


def values(line: str) -> list[str]:
    """Return the candidates for the end of a line."""
    words = split_line(line)
    return [value for value, _ in complete(words[1:-1], words[-1]).values]


def paths(line: str) -> tuple[str, str]:
    words = split_line(line)
    found = complete(words[1:-1], words[-1])
    return found.paths, found.prefix


def test_commands() -> None:
    assert values("kimi-mlx ") == [info.name for info in COMMANDS if not info.is_hidden]
    assert values("kimi-mlx ch") == ["chat"]
    assert values("kimi-mlx --v") == ["--version"]
    assert values("kimi-mlx service un") == ["uninstall"]
    assert values("kimi-mlx nonsense ") == []
    assert complete(["service"], "status").values == [("status", "Show whether the server runs and answers.")]


def test_models() -> None:
    assert values("kimi-mlx chat kimi-mini") == ["kimi-mini", "kimi-mini-vl"]
    assert paths("kimi-mlx chat ./K") == ("folders", "")
    assert "kimi-k2" in values("kimi-mlx launch --hosts a,b serve --port 80 ")
    assert values("kimi-mlx rm moon") == values("kimi-mlx service install moon") == ["moonlight"]
    assert "kimi-k2.5" in values("kimi-mlx convert kimi-k2")


def test_models_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("models--me--Kimi-mine", "models--mlx-community--other", "models--mlx-community--Kimi-K2.5"):
        (tmp_path / "hub" / name).mkdir(parents=True)
    for name in ("you--Moonlight-mine", "folder--kimi--0123"):
        (tmp_path / "stores" / name).mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))
    found = values("kimi-mlx chat ")
    assert {"me/Kimi-mine", "you/Moonlight-mine"} <= set(found)
    assert not [name for name in found if "other" in name or name.startswith("folder")]


def test_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert values("kimi-mlx chat --continue ") == []
    assert values("kimi-mlx history ex") == ["export"]
    assert not (tmp_path / "kimi-mlx").exists()
    with closing(HistoryStore.open(tmp_path / "kimi-mlx" / "conversations")) as store:
        conversation = store.create("kimi-mini")
        store.rename(conversation.number, "Tax return")
    assert complete(["chat", "--continue"], "").values == [(conversation.id, "Tax return")]
    assert values(f"kimi-mlx chat -c {conversation.id[:3]}") == [conversation.id]
    assert conversation.id in values("kimi-mlx history show ")


def test_options_and_their_values() -> None:
    assert values("kimi-mlx chat --strat") == ["--strategy"]
    assert values("kimi-mlx chat --ranks 2 --rank") == []  # given already
    assert values("kimi-mlx chat --strategy p") == ["pipeline"]
    assert values("kimi-mlx chat --strategy=p") == ["--strategy=pipeline"]
    assert values("kimi-mlx chat --dtype f") == ["float32", "float16"]
    assert values("kimi-mlx launch --backend r") == ["ring"]
    assert values("kimi-mlx bench --synthetic ") == ["wide", "deep", "vision"]
    assert values("kimi-mlx chat --ranks ") == []
    assert paths("kimi-mlx serve --api-key-file ") == ("files", "")
    for option in ("-f", "--system-file", "--schema", "--mcp", "--preset", "--image"):
        assert paths(f"kimi-mlx chat {option} ") == ("files", "")
    assert paths("kimi-mlx serve --api-key-file=./k") == ("files", "--api-key-file=")
    assert paths("kimi-mlx chat --cache-dir ") == ("folders", "")
    assert "--help" not in values("kimi-mlx chat --image x.png --im")
    assert values("kimi-mlx chat --image x.png --im") == ["--image"]  # repeatable
    assert values("kimi-mlx launch --hosts a,b chat --no-thin") == ["--no-thinking"]
    assert set(values("kimi-mlx launch --hosts a,b c")) == {"chat"}


def test_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".ssh" / "more").mkdir(parents=True)
    (tmp_path / ".ssh" / "config").write_text(
        "Include more/*\nHost studio studio2\n  HostName 10.0.0.1\nHost *.lab !x\nhost=laptop\n"
    )
    (tmp_path / ".ssh" / "more" / "a").write_text("Host mac-a.local\n")
    (tmp_path / "two.json").write_text(json.dumps([{"ssh": "mac-z", "ips": []}]))
    (tmp_path / "other.json").write_text('{"hosts": 3}')
    assert values("kimi-mlx launch --hosts ") == ["mac-a.local", "studio", "studio2", "laptop", "mac-z"]
    assert values("kimi-mlx launch --hosts studio,l") == ["studio,laptop"]
    assert values("kimi-mlx doctor --hosts=studio,mac-z") == ["--hosts=studio,mac-z"]


def test_every_command_has_candidates() -> None:
    for info in COMMANDS:
        for names in [[info.name, command.name] for command in info.commands] or [[info.name]]:
            assert complete(names, "--").values
            assert complete(names, "") is not None


@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Z"]), min_size=1, max_size=8), min_size=1))
def test_quoted_words_are_split(words: list[str]) -> None:
    assert split_line("kimi-mlx " + shlex.join(words)) == ["kimi-mlx", *words]
    assert split_line("kimi-mlx " + shlex.join(words) + " ") == ["kimi-mlx", *words, ""]


def test_open_quotes() -> None:
    assert split_line("kimi-mlx chat 'a b") == ["kimi-mlx", "chat", "a b"]
    assert split_line('kimi-mlx chat "a \\"b') == ["kimi-mlx", "chat", 'a "b']
    assert split_line("kimi-mlx chat a\\ b") == ["kimi-mlx", "chat", "a b"]
    assert split_line("kimi-mlx") == ["kimi-mlx", ""]


def test_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/zsh")
    assert call("--show-completion").stdout.startswith("#compdef kimi-mlx")
    assert call("--show-completion", "fish").stdout.startswith("function")
    refused = call("--install-completion", "tcsh")
    assert (refused.returncode, "no completion for `tcsh`" in refused.stderr) == (2, True)
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert "no completion for `tcsh`" in call("--install-completion").stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home folder with `kimi-mlx` in `bin`."""
    program = tmp_path / "bin" / "kimi-mlx"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {shlex.quote(sys.executable)} -m kimi_mlx "$@"\n')
    program.chmod(0o755)
    (tmp_path / "a folder").mkdir()
    (tmp_path / "keys.txt").touch()
    return tmp_path


COLUMNS = 100
SHELLS = {"zsh": ["zsh", "-i"], "bash": ["bash", "-i"], "fish": ["fish", "-i"]}


def environment(home: Path) -> dict[str, str]:
    variables = {"HOME": str(home), "ZDOTDIR": str(home), "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    return variables | {"XDG_DATA_HOME": str(home / "data"), "XDG_CONFIG_HOME": str(home / "config"), "PS1": "$ "}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, home: Path) -> Iterator[Terminal]:
    """Start a shell on a terminal, after the completion was installed for it."""
    name = request.param
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    if name == "bash" and not has_readline():
        pytest.skip("bash without readline")
    variables = environment(home)
    done = call("--install-completion", name, variables=variables)
    assert done.returncode == 0, done.stderr
    again = call("--install-completion", name, variables=variables)
    assert again.stdout.count("written") == 1  # the start file has its line already
    code = CONTROLLING_TERMINAL + "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    terminal = Terminal(code, *SHELLS[name], columns=COLUMNS, cwd=home, **variables)
    try:
        terminal.send("echo rea''dy\r")
        wait_for(terminal, "\nready")
        yield terminal
    finally:
        terminal.close()


def has_readline() -> bool:
    return subprocess.run(["bash", "-c", "type complete"], capture_output=True).returncode == 0


def wait_for(shell: Terminal, text: str) -> None:
    """Wait until a text is on the screen."""
    deadline = time.monotonic() + PATIENCE_S
    while text not in (lines := on_screen(shell)):
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)


def on_screen(shell: Terminal) -> str:
    """Return the screen, without blanks at the ends of lines."""
    shell.read(0.05)
    screen = pyte.Screen(COLUMNS, 24)
    pyte.ByteStream(screen).feed(shell.raw)
    return "\n".join(line.rstrip() for line in screen.display)


def completed(shell: Terminal, line: str, result: str) -> None:
    """Type a line with Tab at its end, and check the line that it gives; then remove it."""
    shell.send(line + TAB)
    wait_for(shell, result)
    shell.send("\x15")
    time.sleep(0.1)


@pytest.mark.slow
def test_real_shells(shell: Terminal) -> None:
    completed(shell, "kimi-mlx conv", "kimi-mlx convert")
    completed(shell, "kimi-mlx chat moonl", "kimi-mlx chat moonlight")
    completed(shell, "kimi-mlx chat --strategy=pipe", "kimi-mlx chat --strategy=pipeline")
    completed(shell, "kimi-mlx chat --strategy hyb", "kimi-mlx chat --strategy hybrid")
    completed(shell, "kimi-mlx chat ./a", "kimi-mlx chat ./a\\ folder/")
    completed(shell, "kimi-mlx serve --api-key-file ke", "kimi-mlx serve --api-key-file keys.txt")
    completed(shell, "kimi-mlx serve --api-key-file=ke", "kimi-mlx serve --api-key-file=keys.txt")
    completed(shell, "kimi-mlx launch --hosts mac-x,mac-y serv", "kimi-mlx launch --hosts mac-x,mac-y serve")
