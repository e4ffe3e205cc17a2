"""`kimi-mlx service`: the command that is installed, and options that are refused before anything is written."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from kimi_mlx.cli.service.definition import kept_environment, program
from kimi_mlx.errors import ServiceError
from tests.command import call

HOSTS = "--hosts=mac-a,mac-b"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the user a home folder of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "KIMI_MLX_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(*arguments: str) -> list[str]:
    """Return the words after the program of a service, as its file has them."""
    done = call("service", "install", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("ExecStart="))
    return line.replace('"', "").split()[line.count(" -m kimi_mlx") * 2 + 1 :]


linux_only = pytest.mark.skipif(sys.platform == "darwin", reason="reads a unit of systemd")


@linux_only
def test_options_of_serve_are_kept(home: Path) -> None:
    assert words() == ["serve", "kimi-mini"]
    (home / "keys").write_text("secret\n")
    (home / "keys").chmod(0o600)
    options = ("--port", "8000", "--api-key-file", "keys", "--cache-dir", "~/c", "--cache-memory", "2GB", "--fast-sync")
    expected = ["serve", "kimi-mini", "--fast-sync", "--cache-memory=2000000000", "--port=8000"]
    expected += [f"--api-key-file={home}/keys", f"--cache-dir={home}/c"]
    assert words("kimi-mini", "--ranks", "1", *options) == [*expected[:2], "--ranks=1", *expected[2:]]
    named = words("--served-name", "a", "--served-name=b", "kimi-mini-vl")
    assert named == ["serve", "kimi-mini-vl", "--served-name=a", "--served-name=b"]


@linux_only
def test_the_default_model_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_MLX_MODEL", "kimi-mini-vl")
    assert words() == ["serve", "kimi-mini-vl"]


@linux_only
def test_values_of_the_users_file_are_kept(home: Path) -> None:
    folder = home / ".config" / "kimi-mlx"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        'model = "kimi-mini-vl"\n[serve]\nport = 8009\nserved_name = ["a", "b"]\n'
        '[launch]\nhosts = ["x", "y"]\nlimit = 30\n'
    )
    assert words() == ["serve", "kimi-mini-vl", "--port=8009", "--served-name=a", "--served-name=b"]
    assert words("kimi-mini", "--port", "8010", "--served-name=c")[1:] == [
        "kimi-mini",
        "--port=8010",
        "--served-name=c",
    ]
    assert words("kimi-k2", HOSTS, "--served-name=c")[:3] == ["launch", HOSTS, "--limit=30.0"]
    (folder / "config.toml").write_text("[serve]\nnonsense = 1\n")
    assert call("service", "install", "--dry-run").returncode == 2


@linux_only
def test_a_folder_becomes_an_absolute_path(home: Path) -> None:
    import kimi_mlx

    (home / "model").symlink_to(Path(kimi_mlx.__file__).parent / "models" / "kimi-mini")
    assert words("./model") == ["serve", str((home / "model").resolve())]


@linux_only
def test_several_hosts() -> None:
    launched = words("kimi-k2", HOSTS, "--install", "--port=8000", "--limit=20", "--env=A=1", "--strategy=pipeline:3:1")
    expected = ["launch", HOSTS, "--env=A=1", "--install", "--limit=20.0"]
    assert launched == [*expected, "serve", "kimi-k2", "--strategy=pipeline:3:1", "--port=8000"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--api-key", "x"], "would write the key"),
        (["--host", "0.0.0.0"], "without an API key"),
        (["--port", "0"], "port that stays the same"),
        (["--cache-disk", "5GB"], "--cache-dir, which is not set"),
        (["--cors-origin", "x"], "origin"),
        (["--nonsense"], "No such option"),
        (["no-such-model"], "no model"),
        (["moonlight"], "downloads nothing"),
        (["--restarts", "2"], "server on several hosts"),
        (["kimi-k2", HOSTS, "--ranks", "2"], "exclude each other"),
        (["kimi-k2", HOSTS, "--hostfile", "x"], "exclude each other"),
        (["kimi-k2", "--hostfile", "x"], "x"),
        (["--api-key-file", "none"], "no such file"),
        (["--name", "A B"], "not a name"),
    ],
)
def test_wrong_options_write_nothing(arguments: list[str], error: str, home: Path) -> None:
    done = call("service", "install", *arguments)
    assert done.returncode == 2, done.stderr
    assert error in done.stderr
    assert not list(home.rglob("*.service"))
    assert not list(home.rglob("*.plist"))


def test_a_key_of_the_environment_is_refused() -> None:
    done = call("service", "install", "--dry-run", variables={"KIMI_MLX_API_KEY": "secret-key"})
    assert done.returncode == 2
    assert "would have no key" in done.stderr
    assert "secret-key" not in done.stderr + done.stdout


def test_a_key_file_that_others_can_read_is_refused(home: Path) -> None:
    (home / "keys").write_text("secret\n")
    (home / "keys").chmod(0o644)
    done = call("service", "install", "--dry-run", "--api-key-file", "keys")
    assert (done.returncode, "mode 0644" in done.stderr, "chmod 600" in done.stderr) == (2, True, True)


def test_environment_of_a_service() -> None:
    found = {
        "PATH": "/bin",
        "HF_HOME": "/h",
        "KIMI_MLX_STORES": "/s",
        "XDG_STATE_HOME": "/x",
        "KIMI_MLX_API_KEY": "k",
        "HF_TOKEN": "t",
        "HF_ACCESS_TOKEN": "t",
        "MLX_SECRET_VALUE": "v",
        "XDG_RUNTIME_DIR": "/run",
        "EDITOR": "vi",
        "HF_HUB_CACHE": "",
    }
    assert list(kept_environment(found)) == ["HF_HOME", "KIMI_MLX_STORES", "PATH", "XDG_STATE_HOME"]


def test_a_temporary_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(program()[0]).is_absolute()
    monkeypatch.setattr(sys, "prefix", "/home/me/.cache/uv/archive-v0/abc")
    with pytest.raises(ServiceError, match="may be emptied"):
        program()


def test_without_a_service() -> None:
    for command in ("status", "logs", "start", "stop", "restart", "uninstall"):
        done = call("service", command)
        assert (done.returncode, "no service is installed" in done.stderr) == (1, True), done.stderr
    assert "hint" in json.loads(call("service", "status", "--json").stdout)


def test_an_unknown_command_gets_a_similar_one() -> None:
    done = call("service", "instal")
    assert (done.returncode, "did you mean `install`?" in done.stderr) == (2, True)
    assert "`kimi-mlx service --help`" in call("service", "x").stderr


def test_a_port_in_use() -> None:
    from kimi_mlx.cli.serve import ServerOptions
    from kimi_mlx.cli.service.definition import check_port
    from kimi_mlx.errors import UsageError
    from kimi_mlx.services.service import Service

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match="in use"):
            check_port(ServerOptions(port=port), None)
        check_port(ServerOptions(port=port), Service("a", ("/x", "serve", "m", f"--port={port}"), {}, Path("/l")))
