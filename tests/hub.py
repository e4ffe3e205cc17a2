"""A Hugging Face hub on loopback that serves folders as repositories, with faults on demand.

    with Hub({"owner/model": folder}) as hub:
        hub.fail("drop", "*.safetensors", after_bytes=1000, times=2)
        ... HF_ENDPOINT=hub.url ...
        assert hub.sent["owner/model/model.safetensors"] == size

Files in large-file storage (`*.safetensors`, `tiktoken.model`) are redirected (302) to `/cdn/...` under another host
name, like on the real hub: the client reads size and checksum from the redirect, and must not forward its token.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "a" * 40
ALWAYS = 10**9
LARGE = ("*.safetensors", "tiktoken.model")
CHUNK_BYTES = 1 << 14
SEND_BUFFER_BYTES = 1 << 16
"""Send buffer of each connection, small to limit the data that a killed client has not read."""

Kind = Literal["drop", "corrupt", "status", "slow", "stall", "missing", "ignore_range", "wrong_size"]


@dataclass
class Fault:
    """A fault of the server.

    Args:
        kind: `drop` (the connection ends), `corrupt` (a byte is changed), `status` (another status), `slow`, `stall`
            (no more data), `missing` (404), `ignore_range` (200 with the whole file), `wrong_size` (truncated body).
        path: pattern of paths; files have `/cdn/owner/name/file` in large-file storage, and
            `/owner/name/resolve/revision/file` otherwise.
        times: number of occurrences.
        after_bytes: position in the body, for `drop`, `stall` and `corrupt`.
        status: HTTP status, for `status`.
        headers: headers such as Retry-After, for `status`.
        body: body, for `status`.
        bytes_per_s: speed, for `slow`.
    """

    kind: Kind
    path: str
    times: int = ALWAYS
    after_bytes: int = 0
    status: int = 503
    headers: Mapping[str, str] | None = None
    body: bytes = b"<html>something is wrong</html>"
    bytes_per_s: int = 0


class Hub:
    """The hub, a context manager that starts and stops it.

    Args:
        folders: `owner/name` -> folder with the files.
        names: two host names of this machine, for the hub and for its storage.

    Attributes:
        commits: `owner/name` -> commit of `main`.
        gated: names of gated repositories.
        token: the only accepted token; None accepts any, and none.
        xet: pattern of files in Xet storage.
        sent: number of body bytes sent, by `owner/name/file`.
        requests: requests with their method: `GET /api/models/owner/name`.
        authorized: requests with a token.
    """

    def __init__(self, folders: Mapping[str, Path], names: tuple[str, str] = ("127.0.0.1", "localhost")):
        self.names = names
        self.folders = dict(folders)
        self.commits = dict.fromkeys(folders, COMMIT)
        self.gated: set[str] = set()
        self.token: str | None = None
        self.xet = ""
        self.sent: Counter[str] = Counter()
        self.requests: list[str] = []
        self.authorized: list[str] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.is_closing = threading.Event()
        self._server = _Server(self)

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Value for HF_ENDPOINT."""
        return f"http://{self.names[0]}:{self._server.server_port}"

    @property
    def cdn_url(self) -> str:
        """The same server under another name."""
        return f"http://{self.names[1]}:{self._server.server_port}"

    @property
    def sent_bytes(self) -> int:
        """Number of body bytes of all files, without the API's responses."""
        with self._lock:
            return sum(self.sent.values())

    def reset_counts(self) -> None:
        """Reset all counters."""
        with self._lock:
            self.sent.clear()
            self.requests.clear()
            self.authorized.clear()

    def fail(self, kind: Kind, path: str = "*", **details: int | bytes | Mapping[str, str]) -> None:
        """Add a fault; see Fault."""
        with self._lock:
            self._faults.append(Fault(kind, path, **details))  # pyright: ignore[reportArgumentType]

    def clear_faults(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults.clear()

    def take_fault(self, kind: Kind, path: str) -> Fault | None:
        """Return the fault that is due for a response, and count it."""
        with self._lock:
            for fault in self._faults:
                if fault.kind == kind and fault.times > 0 and fnmatchcase(path, fault.path):
                    fault.times -= 1
                    return fault
        return None

    def record_request(self, request: str, is_authorized: bool) -> None:
        """Record a request."""
        with self._lock:
            self.requests.append(request)
            if is_authorized:
                self.authorized.append(request)

    def count_sent(self, file: str, count: int) -> None:
        """Count sent bytes."""
        with self._lock:
            self.sent[file] += count


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: Hub):
        super().__init__(("127.0.0.1" if hub.names[0] == "127.0.0.1" else "0.0.0.0", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect; tests do that on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        super().setup()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def _respond(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        hub.record_request(f"{self.command} {path}", token is not None)
        fault = hub.take_fault("status", path) if self.command == "GET" else None
        if fault:
            self._send(fault.body, fault.status, fault.headers)
        elif path.startswith("/cdn/"):
            owner, name, file = path.removeprefix("/cdn/").split("/", 2)
            self._send_file(f"{owner}/{name}", file, path)
        elif token and hub.token and token != f"Bearer {hub.token}":
            self._refuse(401, None, "Invalid credentials in Authorization header")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path):
            self._send_api(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3], path)
        else:
            self._refuse(404, None, "no such address")

    def _is_known(self, repository: str, revision: str | None) -> bool:
        hub = self.server.hub
        if repository not in hub.folders:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif revision not in (None, "main", hub.commits[repository]):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _send_api(self, repository: str, kind: str | None, revision: str | None) -> None:
        if not self._is_known(repository, revision):
            return
        hub, folder = self.server.hub, self.server.hub.folders[repository]
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        if kind == "tree":
            answer: object = [_tree_entry(folder, name) for name in names]
        else:
            has_sizes = "blobs=" in self.path
            siblings = [_sibling(folder, name) if has_sizes else {"rfilename": name} for name in names]
            answer = {"id": repository, "sha": hub.commits[repository], "siblings": siblings, "tags": []}
            answer |= {"private": False, "gated": "manual" if repository in hub.gated else False}
        self._send(json.dumps(answer).encode(), headers={"Content-Type": "application/json"})

    def _resolve(self, repository: str, revision: str, file: str, path: str) -> None:
        hub = self.server.hub
        if not self._is_known(repository, revision):
            return
        on_disk = hub.folders[repository] / file
        commit = {"X-Repo-Commit": hub.commits[repository]}
        if not on_disk.is_file() or hub.take_fault("missing", path):
            self._refuse(404, "EntryNotFound", "Entry not found", commit)
        elif repository in hub.gated:
            self._refuse(403, "GatedRepo", f"Access to model {repository} is restricted")
        elif _is_large(file):
            linked = {"X-Linked-Etag": f'"{_sha256(on_disk)}"', "X-Linked-Size": str(on_disk.stat().st_size)}
            if hub.xet and fnmatchcase(file, hub.xet):
                linked |= {"X-Xet-Hash": _sha256(on_disk), "X-Xet-Refresh-Route": f"{hub.url}/xet-token"}
            location = {"Location": f"{hub.cdn_url}/cdn/{repository}/{file}?signature=secret"}
            self._send(b"Found", 302, {**commit, **linked, **location})
        else:
            self._send_file(repository, file, path, commit)

    def _send_file(self, repository: str, file: str, path: str, headers: Mapping[str, str] | None = None) -> None:
        hub, on_disk = self.server.hub, self.server.hub.folders[repository] / file
        body, status = on_disk.read_bytes(), 200
        fields = {**(headers or {}), "ETag": f'"{_sha256(on_disk) if _is_large(file) else _blob_id(on_disk)}"'}
        fields["Accept-Ranges"] = "bytes"
        if self.command == "GET" and (fault := hub.take_fault("wrong_size", path)):
            body = body[: fault.after_bytes]
        if self.command == "GET" and (fault := hub.take_fault("corrupt", path)):
            at = fault.after_bytes
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if byte_range and not hub.take_fault("ignore_range", path):
            start, end = int(byte_range[1]), min(int(byte_range[2] or len(body)) + 1, len(body))
            if start >= len(body):
                self._send(b"", 416, {"Content-Range": f"bytes */{len(body)}"})
                return
            fields["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
            body, status = body[start:end], 206
        self._send(body, status, fields, count_as=f"{repository}/{file}", path=path)

    def _refuse(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        fields = {**(headers or {}), "X-Error-Message": message}
        if code:
            fields["X-Error-Code"] = code
        self._send(json.dumps({"error": message}).encode(), status, fields)

    def _send(
        self,
        body: bytes,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        count_as: str = "",
        path: str = "",
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if count_as:
            self._send_counted(body, count_as, path)
        else:
            self.wfile.write(body)

    def _send_counted(self, body: bytes, name: str, path: str) -> None:
        hub = self.server.hub
        stall, drop, slow = hub.take_fault("stall", path), hub.take_fault("drop", path), hub.take_fault("slow", path)
        end = min([len(body), *(fault.after_bytes for fault in (stall, drop) if fault)])
        started_s, position = time.monotonic(), 0
        while position < end and not hub.is_closing.is_set():
            chunk = body[position : min(position + CHUNK_BYTES, end)]
            hub.count_sent(name, len(chunk))  # counted before it is sent: may be one chunk too many
            self.wfile.write(chunk)
            position += len(chunk)
            if slow:
                hub.is_closing.wait(max(0.0, started_s + position / slow.bytes_per_s - time.monotonic()))
        if stall:
            hub.is_closing.wait(600)
        self.close_connection = self.close_connection or end < len(body)


def _is_large(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in LARGE)


def _sibling(folder: Path, name: str) -> dict[str, object]:
    path = folder / name
    info: dict[str, object] = {"rfilename": name, "size": path.stat().st_size, "blobId": _blob_id(path)}
    if _is_large(name):
        info["blobId"] = "f" * 40  # id of the pointer file in git
        info["lfs"] = {"sha256": _sha256(path), "size": path.stat().st_size, "pointerSize": 134}
    return info


def _tree_entry(folder: Path, name: str) -> dict[str, object]:
    info = _sibling(folder, name)
    entry: dict[str, object] = {"type": "file", "path": name, "size": info["size"], "oid": info["blobId"]}
    if _is_large(name):
        entry["lfs"] = {"oid": _sha256(folder / name), "size": info["size"], "pointerSize": 134}
    return entry


def _sha256(path: Path) -> str:
    return _digest(path, path.stat().st_size, path.stat().st_mtime_ns, True)


def _blob_id(path: Path) -> str:
    return _digest(path, path.stat().st_size, path.stat().st_mtime_ns, False)


@cache
def _digest(path: Path, size: int, changed: int, is_large: bool) -> str:
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest() if is_large else hashlib.sha1(b"blob %d\0" % size + data).hexdigest()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Return the environment variables for another process that uses the hub, with a cache of its own."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return variables | {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def use(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process use the hub. Set constants, because huggingface_hub may have read its environment already."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    values = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DOWNLOAD_TIMEOUT": 5}
    values["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    values |= {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
