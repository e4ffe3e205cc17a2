"""The view of the cluster: it follows the server while the page is visible, and costs nothing when it is hidden."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import mlx.core as mx
import pytest

from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.open import open_session
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import Session, SessionOptions
from tests.browser.conftest import OpenPage
from tests.browser.servers import answering, free_port, start_server
from tests.fakes import KIMI_MINI
from tests.server.running_server import RunningServer, serving

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_it_follows_answers(open_page: OpenPage) -> None:
    with answering("word ", tokens_per_s=50, is_endless=True) as server:
        chat = open_page(server.url)
        chat.send("Talk.")
        chat.wait_text("word", ".markdown")
        view = chat.another_tab().open("#/cluster")
        view.wait_text("Running", "#cluster-view")
        view.wait_text("answering", "#cluster-view td")
        view.wait_true("""() => [...document.querySelectorAll('#cluster-view td')]
          .some((cell) => Number(cell.textContent.replace(',', '')) > 100)""")
        view.page.close()
        chat.click("Stop")
        chat.wait_answer()


SHOW = """(value) => {
  Object.defineProperty(document, 'visibilityState', { value, configurable: true });
  document.dispatchEvent(new Event('visibilitychange'));
}"""


def test_it_disconnects_while_the_page_is_hidden(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url, "#/cluster")
    chat.find("#cluster-view .plot").wait_for()
    open_streams = 1

    def count(request: object, change: int) -> None:
        nonlocal open_streams
        open_streams += change if str(getattr(request, "url", "")).endswith("/v1/cluster/events") else 0

    chat.page.on("request", lambda request: count(request, 1))
    for name in ("requestfailed", "requestfinished"):
        chat.page.on(name, lambda request: count(request, -1))

    def wait_for(number: int) -> None:
        deadline = time.monotonic() + 20
        while open_streams != number:
            assert time.monotonic() < deadline, open_streams
            chat.page.wait_for_timeout(20)

    for _ in range(2):
        chat.run(SHOW, "hidden")  # headless Chromium shows all of its tabs
        wait_for(0)
        chat.page.wait_for_timeout(300)
        assert open_streams == 0
        chat.run(SHOW, "visible")
        wait_for(1)


def test_it_asks_for_the_key(session: Session, open_page: OpenPage) -> None:
    with serving(session, ServingOptions(Security(keys=("secret",)))) as server:
        chat = open_page(server.url, "#/cluster")
        chat.allow("status of 401")
        chat.wait_text("needs one of the API keys", "#dialog")
        chat.page.fill("#key-input", "secret")
        chat.page.press("#key-input", "Enter")
        chat.wait_text("Running", "#cluster-view")
        chat.page.close()


def test_the_prompt_cache_on_disk(tmp_path: Path, open_page: OpenPage) -> None:
    """The page and `kimi-mlx status` show what is on disk, and the tokens that came from there after a restart."""
    mx.set_default_device(mx.cpu)  # pyright: ignore[reportArgumentType]
    options = SessionOptions(KIMI_MINI, cache_dir=tmp_path / "cache")
    question = "What are you? " * 70  # more than a block of 256 tokens
    cache: dict[str, Any] = {}
    for _ in range(2):
        with closing(open_session(options)) as session, serving(session) as server:
            chat = open_page(server.url)
            chat.ask(question)
            document = httpx2.get(f"{server.url}/v1/cluster").json()
            cache = document["prompt_cache"]
            assert (cache["has_disk"], cache["disk_blocks"]) == (True, 1)
            assert document["ranks"][0]["cache_disk_bytes"] == cache["disk_bytes"] > 0
            schemas = httpx2.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
            assert schemas["PromptCacheStatus"]["properties"].keys() == cache.keys()
            chat.find("#to-cluster").click()
            chat.wait_text("blocks: 1", "#cluster-view")
            printed = subprocess.run(
                [sys.executable, "-m", "kimi_mlx", "status", server.url], capture_output=True, text=True, check=True
            ).stdout
            assert "1 block, " in printed
            assert f"{cache['disk_hit_tokens']} on disk" in printed
            chat.page.close()
    assert cache["disk_hit_tokens"] >= 256 - 16
    assert cache["miss_tokens"] + cache["memory_hit_tokens"] + cache["disk_hit_tokens"] == cache["prompt_tokens"]


@pytest.mark.ranks
def test_two_ranks(open_page: OpenPage) -> None:
    with closing(RingSession(SessionOptions(KIMI_MINI, ranks=2))) as session, serving(session, ranks=2) as server:
        chat = open_page(server.url)
        chat.ask("What are you?")
        chat.find("#to-cluster").click()
        chat.wait_text("Rank", "#cluster-view")
        bar = chat.find("#cluster-view .placement svg").first
        assert "Rank 0" in (bar.get_attribute("aria-label") or "")
        assert bar.locator("rect").count() == 2
        chat.page.close()


@pytest.mark.ranks
def test_a_rank_that_is_killed(open_page: OpenPage) -> None:
    """Of `serve --ranks 2`: the loss with its reason, the restart, versions, and checks of this machine."""
    port = free_port()
    process = start_server(port, "--ranks", "2")
    view = open_page(f"http://127.0.0.1:{port}", "#/cluster")
    view.wait_text("No restarts", "#cluster-view")
    view.wait_text("No problems found", "#cluster-view")
    hosts = view.find("#cluster-view section").filter(has_text="Hosts").locator("td").all_inner_texts()
    assert hosts[0] == "localhost"
    assert all(f"{name} {version(name)}" in hosts[-1] for name in ("kimi-mlx", "mlx"))
    os.kill(rank_processes(process.pid)[0], signal.SIGKILL)
    view.wait_text("was ended by SIGKILL", "#cluster-view li")
    view.wait_text("up again after", "#cluster-view li")
    view.wait_text("Running", "#cluster-view")
    printed = subprocess.run(
        [sys.executable, "-m", "kimi_mlx", "status", f"http://127.0.0.1:{port}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "restarts" in printed
    assert "was ended by SIGKILL" in " ".join(printed.split())  # folded at any place
    view.page.close()


def rank_processes(server: int) -> list[int]:
    """Return the processes of a server's ranks, in any order: children of its children, their guards."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listed.splitlines())}
    return [child for child, parent in parents.items() if parents.get(parent) == server]
