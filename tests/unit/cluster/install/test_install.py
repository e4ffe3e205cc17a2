"""What is installed where, and the script that does it: here, with a program that is taken for uv."""

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
from kimi_mlx.cluster.hosts.ssh import script_command
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


def with_package(found: Interpreter, name: str, version: str) -> Interpreter:
    return replace(found, packages={**found.packages, name: version})


@pytest.mark.parametrize(
    ("interpreters", "is_needed", "is_renewed"),
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
def test_who_needs_it(interpreters: Sequence[Interpreter], is_needed: bool, is_renewed: bool) -> None:
    facts = replace(MAC, interpreters=tuple(interpreters))
    assert needs_install(facts, OWN) is is_needed
    assert can_upgrade(facts, OWN) is is_renewed


def test_an_interpreter_like_ours_is_taken_before_one_with_another_kimi_mlx() -> None:
    other = replace(OWN, code="def")
    older = replace(VENV, version="3.11.9")
    assert prefer_matching(replace(MAC, interpreters=(PLAIN, other, VENV)), OWN).python == VENV
    assert prefer_matching(replace(MAC, interpreters=(older, OWN)), OWN).python == OWN
    assert prefer_matching(replace(MAC, interpreters=(other, older)), OWN).python == older
    assert prefer_matching(replace(MAC, interpreters=(PLAIN, other)), OWN).python == other
    assert prefer_matching(MAC, OWN).python is None


class Uv:
    """A program that is taken for uv: its environments run this Python, and it does what a test says at `install`."""

    def __init__(self, folder: Path):
        self.path = folder / "it's uv"
        self.log = folder / "log"
        self.at_install("")

    def at_install(self, script: str) -> None:
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


def run(facts: Facts, limit_s: float = 30.0) -> list[str]:
    said: list[str] = []
    install({"localhost": facts}, own_interpreter(), said.append, limit_s)
    return said


def failure(facts: Facts, limit_s: float = 30.0) -> InstallError:
    with pytest.raises(InstallError) as caught:
        run(facts, limit_s)
    assert not (Path(facts.data_folder or "") / "venv").is_symlink()
    return caught.value


@pytest.mark.parametrize("shell", SHELLS)
def test_a_new_environment_and_one_that_is_renewed(
    shell: str, here: Facts, uv: Uv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "script_command", lambda script: [shell, *script_command(script)[1:]])
    own, folder = own_interpreter(), Path(here.data_folder or "")
    said = run(here)
    assert [line.partition(":")[0] for line in said] == ["localhost"] * len(said)
    assert said[0] == "localhost: sending kimi-mlx"
    assert said[-1].startswith(f"localhost: kimi-mlx {own.packages['kimi-mlx']} is installed")
    place = (folder / "venv").resolve().parent
    assert place.parent == folder / "installed"
    assert (place / "pins.txt").read_text().splitlines() == [f"{p}=={own.packages[p]}" for p in ("mlx", "mlx-lm")]
    assert os.access(folder / "venv/bin/python", os.X_OK)
    assert [call.split()[:2] for call in uv.calls] == [["venv", "--python"], ["pip", "install"]]

    found = replace(own, path=f"{folder}/venv/bin/python", code="other")
    assert "localhost: renewing kimi-mlx" in run(replace(here, interpreters=(found,)))
    assert (folder / "venv").resolve().parent == place
    assert "--force-reinstall" in uv.calls[0]
    assert os.listdir(folder / "installed") == [place.name]

    run(here)
    newer = (folder / "venv").resolve().parent
    assert newer != place
    run(here)
    assert not place.exists()
    assert len(os.listdir(folder / "installed")) == 2, "the one that was used until now is left"
    assert not (tmp_path / "injected").exists()
    assert not Path("injected").exists()


def test_what_was_used_is_used_until_another_is_complete(here: Facts, uv: Uv) -> None:
    run(here)
    used = (Path(here.data_folder or "") / "venv").resolve()
    uv.at_install("exit 1")
    with pytest.raises(InstallError):
        run(here)
    assert (Path(here.data_folder or "") / "venv").resolve() == used
    assert os.access(used / "bin/python", os.X_OK)


@pytest.mark.slow
def test_the_time_is_over_and_the_next_try_begins_anew(
    here: Facts, uv: Uv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END_PATIENCE_S", 0.2)
    uv.at_install(f'echo "fetching much" >&2; echo $$ >"{tmp_path}/pid"; sleep 100')
    begin = time.monotonic()
    error = failure(here, 2.0)
    assert time.monotonic() - begin < 60
    assert "`localhost`: not ready within 2.00 s; it was installing kimi-mlx" in error.message
    assert "\n  fetching much" in error.message
    while Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists():
        assert time.monotonic() - begin < 60
        time.sleep(0.05)
    folder = Path(here.data_folder or "") / "installed"
    (left,) = os.listdir(folder)
    uv.at_install("")
    run(here)
    assert left not in os.listdir(folder)


@pytest.mark.slow
def test_news_keep_coming(here: Facts, uv: Uv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPORT_INTERVAL_S", 0.2)
    uv.at_install("echo 'Downloading mlx' >&2; sleep 3")
    assert len([line for line in run(here) if line.endswith("s: Downloading mlx")]) >= 2


@pytest.mark.parametrize(
    ("script", "message", "hint"),
    [
        ("echo 'No space left on device (os error 28)' >&2; exit 1", "No space left", "ssh localhost df -h"),
        ("echo 'dns error: failed to lookup' >&2; exit 1", "kimi-mlx could not be installed\n  dns error", "internet"),
        ("echo 'ERROR: No matching distribution found for mlx' >&2; exit 1", "No matching", "a system as new as"),
        ("echo hm >&2; exit 1", "`localhost`: kimi-mlx could not be installed\n  hm", "ssh localhost"),
        ("kill -KILL 0", "the installation was ended by SIGKILL", "try again"),
        ('echo "exit 3" >venv/bin/python', "installed, but does not start", "lines"),
    ],
)
def test_failures_in_words(here: Facts, uv: Uv, script: str, message: str, hint: str) -> None:
    uv.at_install(script)
    error = failure(here)
    assert error.message.startswith("kimi-mlx was not installed on `localhost`: ")
    assert message in error.message
    assert hint in (error.hint or "")


def test_other_code_there_than_here(here: Facts) -> None:
    said: list[str] = []
    with pytest.raises(InstallError, match="what was installed is not what is here") as caught:
        install({"localhost": here}, replace(own_interpreter(), code="123456"), said.append)
    assert "code 123456" in caught.value.message


def test_a_folder_that_is_not_ours_is_left_alone(here: Facts) -> None:
    theirs = Path(here.data_folder or "") / "venv/bin/python"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    assert "kimi-mlx has not made it" in failure(here).message
    assert theirs.read_text() == "theirs"


def test_a_link_of_the_user_is_replaced_but_what_it_leads_to_is_left_alone(here: Facts, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs/bin/python"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    folder = Path(here.data_folder or "")
    folder.mkdir()
    (folder / "venv").symlink_to(tmp_path / "theirs")
    run(replace(here, interpreters=(replace(own_interpreter(), path=f"{folder}/venv/bin/python", code="other"),)))
    assert theirs.read_text() == "theirs"
    assert os.listdir(tmp_path / "theirs") == ["bin"]
    assert (folder / "venv").resolve().parent.parent == folder / "installed"


def test_a_data_folder_that_cannot_be_made(here: Facts) -> None:
    Path(here.data_folder or "").write_text("a file")
    error = failure(here)
    assert "its data folder cannot be written" in error.message
    assert error.hint is not None
    assert error.hint.startswith("whose is it? Type there `ls -ld '")
    assert "did not tell where" in failure(replace(here, data_folder=None)).message


def test_what_to_type_where_there_is_no_python() -> None:
    linux = Facts("box", is_complete=True, system="Linux", data_folder="/home/me/.local/share/kimi-mlx")
    assert "`brew install python`" in (explain_failure(MAC, "no Python", "").hint or "")
    assert "`curl -LsSf https://astral.sh/uv/install.sh | sh`" in (explain_failure(MAC, "no Python", "").hint or "")
    assert "`sudo apt install python3 python3-venv`" in (explain_failure(linux, "no Python", "").hint or "")
    problem = explain_failure(linux, "no venv for Python 3.11", "")
    assert "its Python 3.11 cannot make environments" in problem.message
    assert "`sudo apt install python3.11-venv`" in (problem.hint or "")


def test_one_error_for_all_hosts() -> None:
    error = install_error({"a": InstallProblem("full\n  words", "make room"), "b": InstallProblem("full", "make room")})
    assert error.message == "kimi-mlx was not installed on `a`, `b`\n`a`: full\n  words\n`b`: full"
    assert error.hint == "a, b: make room"
    assert install_error({"a": InstallProblem("lost", None)}).hint is None
