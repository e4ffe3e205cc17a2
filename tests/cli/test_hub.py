"""Models from the hub: the real client against a small hub on loopback that can break off."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_mlx.weights.locate import resolve

pytestmark = pytest.mark.slow

COMMIT = "a" * 40


class SmallHub(http.server.ThreadingHTTPServer):
    """Serves the files of a folder as the repository `owner/model`, by the hub's protocol.

    Attributes:
        breaks: how many answers with a body of weights are still to be broken off in the middle.
        served: paths of the bodies sent.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.breaks = folder, 0
        self.served: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        files = {path.name: path for path in self.server.folder.iterdir()}
        name = self.path.split("?")[0].split("/")[-1]
        if "owner/model" not in self.path:
            self._send(b"{}", has_body, status=404, **{"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": name, "size": p.stat().st_size, "oid": "0"} for name, p in files.items()]
            self._send(json.dumps(tree).encode(), has_body)
        elif self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": "owner/model", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            self._send(json.dumps(about).encode(), has_body)
        elif name in files:
            self._send(files[name].read_bytes(), has_body, ETag=f'"{name}-1"')
        else:
            self._send(b"{}", has_body, status=404, **{"X-Error-Code": "EntryNotFound"})

    def _send(self, body: bytes, has_body: bool, status: int = 200, **headers: str) -> None:
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body) - start), **headers}.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if not has_body:
            return
        self.server.served.append(self.path)
        if self.server.breaks and self.path.endswith(".safetensors"):
            self.server.breaks -= 1
            self.wfile.write(body[start : start + 1000])
            self.close_connection = True
            return
        self.wfile.write(body[start:])


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    with SmallHub(resolve("kimi-mini")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def chat(hub: SmallHub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from kimi_mlx.cli.app import main; main()", *arguments]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=100, check=False
    )


def test_a_repository_is_fetched_once_and_then_answers(hub: SmallHub, tmp_path: Path) -> None:
    first = chat(hub, tmp_path, "chat", "owner/model", "-p", "hi")
    assert first.returncode == 0, first.stderr
    assert not [path for path in hub.served if path.endswith((".py", ".md"))]
    hub.served.clear()
    again = chat(hub, tmp_path, "chat", "owner/model", "-p", "hi")
    assert again.stdout == first.stdout
    assert hub.served == []


def test_a_download_that_broke_off_is_an_error_and_goes_on_later(hub: SmallHub, tmp_path: Path) -> None:
    hub.breaks = 100
    broken = chat(hub, tmp_path, "chat", "owner/model", "-p", "hi")
    assert broken.returncode == 1
    assert "`owner/model` cannot be fetched" in broken.stderr
    assert "Traceback" not in broken.stderr
    hub.breaks = 0
    whole = chat(hub, tmp_path, "chat", "owner/model", "-p", "hi")
    assert whole.returncode == 0, whole.stderr


def test_a_repository_that_does_not_exist(hub: SmallHub, tmp_path: Path) -> None:
    done = chat(hub, tmp_path, "chat", "owner/other", "-p", "hi")
    assert done.returncode == 1
    assert "there is no repository `owner/other`" in done.stderr
