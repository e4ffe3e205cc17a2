"""Choice of hosts to install on, and install.sh run on this machine with a fake uv."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.cluster.hosts.facts import Facts, Interpreter, own_interpreter
from kimi_mlx.cluster.hosts.marked_script import MarkedScript
from kimi_mlx.cluster.hosts.ssh import script_on
from kimi_mlx.cluster.install import install as module
from kimi_mlx.cluster.install.install import can_upgrade, install, needs_install, prefer_matching
from kimi_mlx.cluster.install.install_errors import InstallProblem, explain_failure, install_error
from kimi_mlx.cluster.install.wheel import PACKAGE
from kimi_mlx.errors import InstallError

OWN = Interpreter("/own/python", "3.12.4", "arm64", {"kimi-mlx": "0.2.0", "mlx": "0.32.4", "mlx-lm": "0.32.2"}, "abc")
DATA = "/Users/me/Library/Application Support/kimi-mlx"
VENV = replace(OWN, path=f"{DATA}/venv/bin/python", version="3.12.9")
PLAIN = Interpreter("/usr/bin/python3", "3.12.4", "arm64", {}, None)
MAC = Facts("mac-b", is_complete=True, system="Darwin", data_folder=DATA)
SHELLS = sorted({os.path.realpath(shell) for name in ("sh", "bash", "dash") if (shell := shutil.which(name))})
NASTY = 'it\'s "a" $(touch injected) `id` \\ * folder'


def with_package(interpreter: Interpreter, name: str, version: str) -> Interpreter:
    return replace(interpreter, packages={**interpreter.packages, name: version})


@pytest.mark.parametrize(
    ("interpreters", "is_needed", "is_upgraded"),
    [
        ([], True, False),
        ([PLAIN], True, False),
        ([OWN], False, False),
        ([VENV], False, True),
        ([PLAIN, VENV], False, True),
        ([replace(VENV, code="def")], True, True),
        ([with_package(VENV, "kimi-mlx", "0.1.0")], True, True),
        ([with_package(VENV, "mlx", "0.32.3")], True, False),
        ([replace(VENV, version="3.11.9")], True, False),
        ([replace(VENV, packages={})], True, False),
        ([replace(OWN, code="def"), PLAIN], True, False),
        ([replace(OWN, code="def"), VENV], False, True),
    ],
)
def test_need_for_installation(interpreters: Sequence[Interpreter], is_needed: bool, is_upgraded: bool) -> None:
    facts = replace(MAC, interpreters=tuple(interpreters))
    assert needs_install(facts, OWN) is is_needed
    assert can_upgrade(facts, OWN) is is_upgraded


def test_matching_interpreter_is_preferred_to_another_version() -> None:
    other = replace(OWN, code="def")
    older = replace(VENV, version="3.11.9")
    assert prefer_matching(replace(MAC, interpreters=(PLAIN, other, VENV)), OWN).python == VENV
    assert prefer_matching(replace(MAC, interpreters=(older, OWN)), OWN).python == OWN
    assert prefer_matching(replace(MAC, interpreters=(other, older)), OWN).python == older
    assert prefer_matching(replace(MAC, interpreters=(PLAIN, other)), OWN).python == other
    assert prefer_matching(MAC, OWN).python is None


class Uv:
    """Fake uv: its environments run this Python; `pip install` runs a script of the test."""

    def __init__(self, folder: Path):
        self.path = folder / "it's uv"
        self.log = folder / "log"
        self.on_install("")

    def on_install(self, script: str) -> None:
        python = f'#!/bin/sh\nPYTHONPATH="{PACKAGE.parent}" exec "{sys.executable}" "$@"\n'
        self.path.write_text(
            f'#!/bin/sh\nprintf "%s " "$@" >>"{self.log}"; echo >>"{self.log}"\n'
            'case "$1 $2" in\n'
            f'  venv*) mkdir -p "$4/bin"; cat >"$4/bin/python" <<\'END\'\n{python}END\n'
            '    chmod +x "$4/bin/python" ;;\n'
            f'  "pip install") for wheel; do :; done; [ -s "$wheel" ] || exit 1; {script or ":"} ;;\n'
            "esac\n"
        )
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        calls = self.log.read_text().splitlines()
        self.log.unlink()
        return calls


@pytest.fixture
def uv(tmp_path: Path) -> Uv:
    return Uv(tmp_path)


@pytest.fixture
def here(tmp_path: Path, uv: Uv) -> Facts:
    return Facts("localhost", is_complete=True, system="Linux", data_folder=str(tmp_path / NASTY), uv=str(uv.path))


def run_install(facts: Facts, limit_s: float = 30.0) -> list[str]:
    lines: list[str] = []
    install({"localhost": facts}, own_interpreter(), lines.append, limit_s)
    return lines


def run_failing_install(facts: Facts, limit_s: float = 30.0) -> InstallError:
    with pytest.raises(InstallError) as caught:
        run_install(facts, limit_s)
    assert not (Path(facts.data_folder or "") / "venv").is_symlink()
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize("shell", [SHELLS[0], *(pytest.param(shell, marks=pytest.mark.sweep) for shell in SHELLS[1:])])
def test_new_environment_then_upgrade(
    shell: str, here: Facts, uv: Uv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_shell(host: str, script: str) -> MarkedScript:
        start = script_on(host, script)
        return replace(start, command=[shell, *start.command[1:]])

    monkeypatch.setattr(module, "script_on", in_shell)
    own, folder = own_interpreter(), Path(here.data_folder or "")
    lines = run_install(here)
    assert [line.partition(":")[0] for line in lines] == ["localhost"] * len(lines)
    assert lines[0] == "localhost: sending kimi-mlx"
    assert lines[-1].startswith(f"localhost: kimi-mlx {own.packages['kimi-mlx']} is installed")
    first = (folder / "venv").resolve().parent
    assert first.parent == folder / "installed"
    assert (first / "pins.txt").read_text().splitlines() == [f"{p}=={own.packages[p]}" for p in ("mlx", "mlx-lm")]
    assert os.access(folder / "venv/bin/python", os.X_OK)
    assert [call.split()[:2] for call in uv.calls] == [["venv", "--python"], ["pip", "install"]]

    installed = replace(own, path=f"{folder}/venv/bin/python", code="other")
    assert "localhost: upgrading kimi-mlx" in run_install(replace(here, interpreters=(installed,)))
    assert (folder / "venv").resolve().parent == first
    assert "--force-reinstall" in uv.calls[0]
    assert os.listdir(folder / "installed") == [first.name]

    run_install(here)
    newer = (folder / "venv").resolve().parent
    assert newer != first
    run_install(here)
    assert not first.exists()
    assert len(os.listdir(folder / "installed")) == 2, "the environment in use until now is kept"
    assert not (tmp_path / "injected").exists()
    assert not Path("injected").exists()


@pytest.mark.slow
def test_failed_installation_keeps_the_former_environment(here: Facts, uv: Uv) -> None:
    run_install(here)
    used = (Path(here.data_folder or "") / "venv").resolve()
    uv.on_install("exit 1")
    with pytest.raises(InstallError):
        run_install(here)
    assert (Path(here.data_folder or "") / "venv").resolve() == used
    assert os.access(used / "bin/python", os.X_OK)


@pytest.mark.slow
def test_timeout_then_retry(here: Facts, uv: Uv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "END_PATIENCE_S", 0.2)
    uv.on_install(f'echo "fetching packages" >&2; echo $$ >"{tmp_path}/pid"; sleep 100')
    begin = time.monotonic()
    error = run_failing_install(here, 2.0)
    assert time.monotonic() - begin < 60
    assert "`localhost`: not ready within 2.00 s; it was installing kimi-mlx" in error.message
    assert "\n  fetching packages" in error.message
    while Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists():
        assert time.monotonic() - begin < 60
        time.sleep(0.05)
    folder = Path(here.data_folder or "") / "installed"
    (unfinished,) = os.listdir(folder)
    uv.on_install("")
    run_install(here)
    assert unfinished not in os.listdir(folder)


@pytest.mark.slow
def test_last_output_line_is_reported_at_intervals(here: Facts, uv: Uv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPORT_INTERVAL_S", 0.2)
    uv.on_install("echo 'Downloading mlx' >&2; sleep 3")
    assert len([line for line in run_install(here) if line.endswith("s: Downloading mlx")]) >= 2


@pytest.mark.parametrize(
    ("script", "message", "hint"),
    [
        ("echo 'No space left on device (os error 28)' >&2; exit 1", "No space left", "ssh localhost df -h"),
        pytest.param(
            "echo 'dns error: failed to lookup' >&2; exit 1",
            "cannot install kimi-mlx\n  dns error",
            "internet",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "echo 'ERROR: No matching distribution found for mlx' >&2; exit 1",
            "No matching",
            "a system as new as",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "echo hm >&2; exit 1", "`localhost`: cannot install kimi-mlx\n  hm", "ssh localhost", marks=pytest.mark.slow
        ),
        pytest.param("kill -KILL 0", "the installation was ended by SIGKILL", "try again", marks=pytest.mark.slow),
        pytest.param(
            'echo "exit 3" >venv/bin/python', "is installed, but does not start", "lines", marks=pytest.mark.slow
        ),
    ],
)
def test_failure_messages(here: Facts, uv: Uv, script: str, message: str, hint: str) -> None:
    uv.on_install(script)
    error = run_failing_install(here)
    assert error.message.startswith("kimi-mlx was not installed on `localhost`: ")
    assert message in error.message
    assert hint in (error.hint or "")


@pytest.mark.slow
def test_installed_code_differs_from_ours(here: Facts) -> None:
    lines: list[str] = []
    with pytest.raises(InstallError, match="the installed version differs from this machine's") as caught:
        install({"localhost": here}, replace(own_interpreter(), code="123456"), lines.append)
    assert "code 123456" in caught.value.message


@pytest.mark.slow
def test_foreign_venv_folder_is_not_touched(here: Facts) -> None:
    theirs = Path(here.data_folder or "") / "venv/bin/python"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    assert "kimi-mlx did not create it" in run_failing_install(here).message
    assert theirs.read_text() == "theirs"


@pytest.mark.slow
def test_users_link_is_replaced_but_its_target_is_not_touched(here: Facts, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs/bin/python"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    folder = Path(here.data_folder or "")
    folder.mkdir()
    (folder / "venv").symlink_to(tmp_path / "theirs")
    run_install(
        replace(here, interpreters=(replace(own_interpreter(), path=f"{folder}/venv/bin/python", code="other"),))
    )
    assert theirs.read_text() == "theirs"
    assert os.listdir(tmp_path / "theirs") == ["bin"]
    assert (folder / "venv").resolve().parent.parent == folder / "installed"


@pytest.mark.slow
def test_data_folder_cannot_be_created(here: Facts) -> None:
    Path(here.data_folder or "").write_text("a file")
    error = run_failing_install(here)
    assert "cannot write its data folder" in error.message
    assert error.hint is not None
    assert error.hint.startswith("check its owner: type on that host `ls -ld '")
    assert "did not report its data folder" in run_failing_install(replace(here, data_folder=None)).message


def test_hints_without_python() -> None:
    linux = Facts("box", is_complete=True, system="Linux", data_folder="/home/me/.local/share/kimi-mlx")
    assert "`brew install python`" in (explain_failure(MAC, "no Python", "").hint or "")
    assert "`curl -LsSf https://astral.sh/uv/install.sh | sh`" in (explain_failure(MAC, "no Python", "").hint or "")
    assert "`sudo apt install python3 python3-venv`" in (explain_failure(linux, "no Python", "").hint or "")
    problem = explain_failure(linux, "no venv for Python 3.11", "")
    assert "its Python 3.11 cannot create virtual environments" in problem.message
    assert "`sudo apt install python3.11-venv`" in (problem.hint or "")


def test_failures_of_all_hosts_become_one_error() -> None:
    error = install_error({"a": InstallProblem("full\n  words", "make room"), "b": InstallProblem("full", "make room")})
    assert error.message == "kimi-mlx was not installed on `a`, `b`\n`a`: full\n  words\n`b`: full"
    assert error.hint == "a, b: make room"
    assert install_error({"a": InstallProblem("lost", None)}).hint is None
