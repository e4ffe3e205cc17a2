"""Fixtures: headless Chromium, pages that are watched, and servers to open."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.chat_page import ChatPage, Watcher

if TYPE_CHECKING:
    from playwright.sync_api import Browser

OpenPage = Callable[..., ChatPage]

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def chromium_path() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Start Chromium with a home of its own, once a module: playwright's event loop must end before others run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    path = chromium_path()
    if path is None:
        pytest.skip("chromium is missing")
    with playwright.sync_playwright() as driver:
        home = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
        home["HOME"] = str(tmp_path_factory.mktemp("chromium"))
        opened = driver.chromium.launch(executable_path=path, headless=True, args=CHROMIUM_ARGUMENTS, env=home)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Return a function that opens the page of a server in a browser profile of its own.

    Its arguments: URL of the server, part of the address after it, and options of the browser context such as
    `viewport` or `locale`. At the end of the test there must be no request to another host and nothing on the console.
    """
    watchers: list[Watcher] = []

    def open_in_context(url: str, fragment: str = "", **options: Any) -> ChatPage:
        context = browser.new_context(**{"locale": "en", **options})
        watcher = Watcher(url)
        watchers.append(watcher)
        watcher.watch(context)
        contexts.append(context)
        return ChatPage(context.new_page(), url, watcher).open(fragment)

    contexts: list[Any] = []
    yield open_in_context
    for context in contexts:
        context.close()
    for watcher in watchers:
        watcher.check()
