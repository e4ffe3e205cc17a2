"""The web page: its files, headers and access, and the rendering of Markdown."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2
import pytest

from kimi_mlx.server.http.security import Security
from kimi_mlx.server.page.routes import MAX_TEXT_CHARS, load_page_files
from kimi_mlx.server.server import SHUTDOWN_S, ServingOptions
from kimi_mlx.session.session import Session
from tests.server.running_server import RunningServer, serving

MAX_PAGE_BYTES = 200_000


@pytest.fixture(scope="module")
def with_key(session: Session) -> Iterator[RunningServer]:
    with serving(session, ServingOptions(Security(keys=("secret",)))) as server:
        yield server


def test_the_page_is_small() -> None:
    assert sum(len(file.data) for file in load_page_files().values()) <= MAX_PAGE_BYTES


def test_headers_of_files(running: RunningServer) -> None:
    for name, file in load_page_files().items():
        path = "/" if name == "index.html" else f"/page/{name}"
        response = httpx2.get(running.url + path)
        assert (response.status_code, response.content) == (200, file.data)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-type"] == file.media_type
        assert "set-cookie" not in response.headers
        again = httpx2.get(running.url + path, headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_files_name_no_other_host() -> None:
    for name, file in load_page_files().items():
        text = file.data.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text, name
        assert "https://" not in text, name


def test_the_page_preloads_all_of_its_modules() -> None:
    """Otherwise a browser finds them one after the other, by their imports."""
    page_files = load_page_files()
    links = re.findall(r'<link rel="modulepreload" href="page/(.+?)">', page_files["index.html"].data.decode())
    assert sorted(links) == sorted(name for name in page_files if name.endswith(".js") and name != "app.js")


def test_files_need_no_key_but_rendering_does(with_key: RunningServer) -> None:
    assert httpx2.get(f"{with_key.url}/").status_code == 200
    assert httpx2.get(f"{with_key.url}/page/app.js").status_code == 200
    body = {"text": "*x*", "final": True}
    assert httpx2.post(f"{with_key.url}/page/render", json=body).status_code == 401
    headers = {"authorization": "Bearer secret"}
    answer = httpx2.post(f"{with_key.url}/page/render", json=body, headers=headers)
    assert answer.json() == {"blocks": [{"html": "<p><em>x</em></p>\n", "end": 3, "finished": True}]}


@pytest.mark.parametrize(
    "path", ["/page/", "/page/secret", "/page/../app.py", "/page/%2e%2e/routes.py", "/page/index.html"]
)
def test_other_files_are_not_served(running: RunningServer, path: str) -> None:
    assert httpx2.get(running.url + path).status_code == 404


@pytest.mark.parametrize("body", [{}, {"text": 5}, {"text": "x" * (MAX_TEXT_CHARS + 1)}, {"text": "x", "final": "no"}])
def test_bad_bodies_are_refused(running: RunningServer, body: object) -> None:
    response = httpx2.post(f"{running.url}/page/render", json=body)
    assert response.status_code == 400
    assert "`text`" in response.json()["error"]["message"] or "`final`" in response.json()["error"]["message"]


def test_headers_of_errors(with_key: RunningServer) -> None:
    answers = [
        httpx2.get(f"{with_key.url}/page/secret"),
        httpx2.post(f"{with_key.url}/page/render", json={"text": "x"}),
        httpx2.post(f"{with_key.url}/"),
        httpx2.get(f"{with_key.url}/", headers={"host": "evil.example"}),
    ]
    assert [answer.status_code for answer in answers] == [401, 401, 405, 403]
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_head_requests(running: RunningServer) -> None:
    for path in ("/", "/page/app.js"):
        response = httpx2.head(running.url + path)
        assert (response.status_code, response.content) == (200, b"")
        assert int(response.headers["content-length"]) > 1000


def test_long_texts_are_rendered(running: RunningServer) -> None:
    text = "word **bold** `code`\n\n" * 500  # long enough for a worker process
    blocks = httpx2.post(f"{running.url}/page/render", json={"text": text, "final": True}, timeout=60).json()["blocks"]
    assert [block["end"] for block in blocks] == [22 * number + 21 for number in range(500)]


def test_other_sites_are_refused(running: RunningServer) -> None:
    assert httpx2.get(f"{running.url}/", headers={"origin": "https://evil.example"}).status_code == 403
    assert httpx2.get(f"{running.url}/", headers={"host": "evil.example"}).status_code == 403


def test_without_the_page_its_paths_are_unknown(session: Session) -> None:
    with serving(session, ServingOptions(has_page=False)) as server:
        assert httpx2.get(f"{server.url}/").status_code == 404
        assert httpx2.post(f"{server.url}/page/render", json={"text": "x"}).status_code == 404


def test_the_status_is_streamed(running: RunningServer) -> None:
    with httpx2.stream("GET", f"{running.url}/v1/cluster/events", timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        assert next(lines) == "event: status"
        status = json.loads(next(lines).removeprefix("data: "))
    assert status.keys() == httpx2.get(f"{running.url}/v1/cluster").json().keys()


def test_open_streams_do_not_delay_the_shutdown(session: Session) -> None:
    with ExitStack() as stack:
        with serving(session) as server:
            url = f"{server.url}/v1/cluster/events"
            response = stack.enter_context(httpx2.stream("GET", url, timeout=20))
            lines = response.iter_lines()
            next(lines)
            started_at = time.monotonic()
        assert time.monotonic() - started_at < SHUTDOWN_S - 2
