"""Install kimi-mlx on two hosts over ssh, with their own Python, pip and uv, from a folder of wheels."""

from __future__ import annotations

import shlex
import shutil
import time
from dataclasses import replace
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kimi_mlx.cluster.hosts.facts import FACTS_LIMIT_S, Facts, Interpreter, facts_script, own_interpreter, parse_facts
from kimi_mlx.cluster.hosts.ssh import run_everywhere, run_script
from kimi_mlx.cluster.install.install import can_upgrade, install, needs_install
from kimi_mlx.cluster.install.wheel import pack_wheel
from kimi_mlx.errors import InstallError
from tests.cluster.hosts import Hosts
from tests.cluster.login_shells import NOISY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an empty wheel of each dependency, of the right name and version."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    folder.parent.chmod(0o755)
    for requirement in map(Requirement, requires("kimi-mlx") or []):
        name = requirement.name
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version(name)}\nProvides-Extra: cpu\n"
            files = {"mlx/core.py": b""} if name == "mlx" else {}
            pack_wheel(folder, name.replace("-", "_"), version(name), files, {"METADATA": metadata.encode()})
    return folder


@pytest.fixture
def bare(hosts: Hosts, wheelhouse: Path) -> Hosts:
    """Return both hosts without kimi-mlx; their pip and uv use the wheelhouse."""
    for name in hosts.names:
        hosts.remove_kimi_mlx(name)
        settings = hosts.home(name) / ".config"
        (settings / "pip").mkdir(parents=True, exist_ok=True)
        (settings / "uv").mkdir(exist_ok=True)
        (settings / "pip/pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {wheelhouse}\n")
        (settings / "uv/uv.toml").write_text(f'no-index = true\nfind-links = ["{wheelhouse}"]\n')
    return hosts


@pytest.fixture
def own(bare: Hosts) -> Interpreter:
    """Return our interpreter, with the Python version of the hosts."""
    python = bare.run("mac-a", "python3", "-c", "import platform; print(platform.python_version())").strip()
    return replace(own_interpreter(), version=python)


def get_facts(hosts: Hosts, *names: str) -> dict[str, Facts]:
    answers = run_everywhere(names or hosts.names, facts_script(), FACTS_LIMIT_S)
    return {name: parse_facts(name, answer.stdout) for name, answer in answers.items()}


def check_installed(hosts: Hosts, name: str, own: Interpreter) -> Facts:
    (facts,) = get_facts(hosts, name).values()
    assert not needs_install(facts, own)
    assert can_upgrade(facts, own)
    assert facts.python is not None
    assert facts.python.path == f"{facts.data_folder}/venv/bin/python"
    program = "import kimi_mlx.cluster.hosts.facts as f; print(f.own_interpreter().code)"
    answer = run_script(name, f"{shlex.quote(facts.python.path)} -c {shlex.quote(program)}", 20)
    assert answer.stdout.strip() == own.code, answer.stderr
    assert hosts.left(name) == []
    return facts


@pytest.mark.sweep
def test_timeout_then_retry_with_pip_while_another_host_is_offline(bare: Hosts, own: Interpreter) -> None:
    time_out(bare, own)
    facts, lines = get_facts(bare), list[str]()
    assert [needs_install(each, own) for each in facts.values()] == [True, True]
    config = bare.home("mac-b") / ".config/pip/pip.conf"
    config.write_text("[global]\nindex-url = http://10.255.0.1:1/\nextra-index-url =\nretries = 0\ntimeout = 1\n")
    with pytest.raises(InstallError) as caught:
        install(facts, own, lines.append)
    assert caught.value.message.startswith("kimi-mlx was not installed on `mac-b`: cannot install kimi-mlx\n  ")
    assert "internet access (`ssh mac-b curl" in (caught.value.hint or "")
    assert f"mac-a: creating a virtual environment with Python {own.minor}" in lines
    assert not any(each.startswith("mac-b: kimi-mlx 0") for each in lines)
    python = check_installed(bare, "mac-a", own).python
    assert needs_install(get_facts(bare, "mac-b")["mac-b"], own)

    assert python is not None
    place = next(Path(python.path).parents[1].glob("lib/*/site-packages/kimi_mlx"))
    (place / "units.py").write_text("other = 1\n")
    facts = get_facts(bare, "mac-a")
    assert needs_install(facts["mac-a"], own)
    lines.clear()
    install(facts, own, lines.append)
    assert "mac-a: upgrading kimi-mlx" in lines
    check_installed(bare, "mac-a", own)


def time_out(hosts: Hosts, own: Interpreter) -> None:
    """Time out a hanging installation; it must end on the host and leave no interpreter."""
    program = hosts.home("mac-a") / ".local/bin/uv"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\n[ "$1" = pip ] || exec mkdir -p "$4"\nsleep 987654\n')
    program.chmod(0o755)
    with pytest.raises(InstallError, match="it was installing kimi-mlx") as caught:
        install(get_facts(hosts, "mac-a"), own, lambda text: None, 3.0)
    assert "not ready within 3.00 s" in caught.value.message
    end = time.monotonic() + 15
    while "sleep 987654" in hosts.run("mac-a", "ps", "-Aoargs="):
        assert time.monotonic() < end
        time.sleep(0.1)
    (facts,) = get_facts(hosts, "mac-a").values()
    assert all("venv" not in each.path for each in facts.interpreters)
    assert facts.broken_interpreters == ()
    program.unlink()


@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv")
def test_with_uv(bare: Hosts, own: Interpreter) -> None:
    program = bare.home("mac-a") / ".local/bin/uv"
    program.parent.mkdir(parents=True)
    program.symlink_to(shutil.which("uv") or "")
    bare.set_login_shell("mac-a", "/bin/bash", NOISY["bash"])
    facts, lines = get_facts(bare, "mac-a"), list[str]()
    assert facts["mac-a"].uv == str(program)
    install(facts, own, lines.append)
    assert f"mac-a: creating a virtual environment with uv and Python {own.minor}" in lines
    assert (Path(facts["mac-a"].data_folder or "") / "venv").is_symlink()
    facts = check_installed(bare, "mac-a", own)
    install({"mac-a": facts}, own, lines.append)
    assert "mac-a: upgrading kimi-mlx" in lines
    check_installed(bare, "mac-a", own)


@pytest.mark.parametrize(
    ("program", "message", "hint"),
    [
        ("exit 1", "neither uv nor Python 3.10 or newer", "curl -LsSf https://astral.sh/uv/install.sh | sh"),
        (
            'case "$2" in *ensurepip*) exit 1 ;; esac; echo 3.11',
            "its Python 3.11 cannot",
            "apt install python3.11-venv",
        ),
    ],
)
def test_no_suitable_python(bare: Hosts, own: Interpreter, program: str, message: str, hint: str) -> None:
    facts = get_facts(bare, "mac-a")
    fake = bare.folder / "mac-a/fake"
    fake.write_text(f"#!/bin/sh\n{program}\n")
    fake.chmod(0o755)
    real = bare.run("mac-a", "readlink", "-f", "/usr/bin/python3").strip()
    bare.run("mac-a", "mount", "--bind", str(fake), real)
    try:
        with pytest.raises(InstallError, match=message) as caught:
            install(facts, own, lambda text: None)
    finally:
        bare.run("mac-a", "umount", real)
    assert hint in (caught.value.hint or "")


def test_read_only_data_folder_and_stopped_ssh_server(bare: Hosts, own: Interpreter) -> None:
    facts = get_facts(bare)
    place = bare.home("mac-a") / ".local"
    place.mkdir()
    bare.run("mac-a", "mount", "-t", "tmpfs", "-o", "ro", "none", str(place))
    bare.stop_sshd("mac-b")
    try:
        with pytest.raises(InstallError) as caught:
            install(facts, own, lambda text: None)
    finally:
        bare.run("mac-a", "umount", str(place))
    assert "`mac-a`: cannot write its data folder" in caught.value.message
    assert "Read-only file system" in caught.value.message
    assert "`mac-b`: `mac-b` refuses connections" in caught.value.message
    assert "mac-a: check its owner" in (caught.value.hint or "")
