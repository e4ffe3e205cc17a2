"""The page behind a reverse proxy with a path: all of its addresses are relative."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import httpx2
import pytest

from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.session import Session
from tests.browser.conftest import OpenPage
from tests.browser.reverse_proxy import reverse_proxy
from tests.browser.servers import answering, free_port
from tests.browser.test_chat import MARKDOWN
from tests.server.running_server import serving

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_everything_works_below_a_path(open_page: OpenPage) -> None:
    """The watcher of the page fails for any request that does not begin with the path."""
    with answering(MARKDOWN) as server, reverse_proxy(server.port, "/kimi") as url:
        chat = open_page(url)
        chat.wait_model("kimi-mini")
        chat.ask("Show everything.")
        assert chat.find(".markdown td").all_inner_texts() == ["1", "2"]
        address = chat.page.url
        assert address.startswith(f"{url}/#/")
        chat.page.reload()
        chat.wait_answer()
        assert chat.page.url == address
        chat.find("#to-cluster").click()
        chat.find("#cluster-view .plot").wait_for()
        chat.find("#to-chat").click()
        chat.find(".message.assistant h1").wait_for()
        assert chat.page.url == address
        manifest = chat.run("() => document.querySelector('link[rel=manifest]').href")
        assert manifest == f"{url}/page/manifest.json"
        assert httpx2.URL(manifest).join(httpx2.get(manifest).json()["start_url"]) == f"{url}/"
        chat.page.close()
        status = subprocess.run(
            [sys.executable, "-m", "kimi_mlx", "status", url], capture_output=True, text=True, timeout=60, check=False
        )
        assert (status.returncode, status.stderr) == (0, "")
        assert url in status.stdout


def test_a_proxy_that_replaces_the_host(session: Session, open_page: OpenPage) -> None:
    """Its origin must be allowed, or requests look like those of a page of another site."""
    port = free_port()
    origin = f"http://127.0.0.1:{port}"
    post = partial(httpx2.post, f"{origin}/a/b/page/render", json={"text": "x"}, headers={"origin": origin})
    with serving(session) as server, reverse_proxy(server.port, "/a/b", port, keeps_host=False):
        refused = post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
    options = ServingOptions(Security(origins=(origin,)))
    with serving(session, options) as server, reverse_proxy(server.port, "/a/b", port, keeps_host=False) as url:
        chat = open_page(url)
        assert "kimi-mini" in chat.ask("What are you?")
        chat.page.close()
