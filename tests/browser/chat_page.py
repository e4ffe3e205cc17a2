"""The web page in a browser, as a user sees and operates it, and the errors that it reports."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, Request

PATIENCE_MS = 30_000

SERVER_GONE = r"net::ERR_(CONNECTION|INCOMPLETE|EMPTY)"
"""Chromium's message for requests to a server that has ended. Requests to other hosts are problems of their own."""

FINISHED = ".message.assistant:last-child .footer button"


@dataclass
class Watcher:
    """Records requests to other hosts, errors of scripts, and console messages such as violations of the CSP.

    Args:
        origin: the only origin that may receive requests.
        allowed: regular expressions of messages that a test expects.
    """

    origin: str
    allowed: list[str] = field(default_factory=lambda: [SERVER_GONE])
    problems: list[str] = field(default_factory=list)

    def watch(self, context: BrowserContext) -> None:
        context.on("request", self._on_request)
        context.on("console", self._on_console)
        context.on("weberror", lambda error: self.problems.append(f"error: {error.error}"))

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.origin}/", f"blob:{self.origin}/", "data:")):
            self.problems.append(f"request to {request.url}")

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text}")

    def check(self) -> None:
        unexpected = [text for text in self.problems if not any(re.search(pattern, text) for pattern in self.allowed)]
        assert not unexpected, unexpected


class ChatPage:
    """One tab with the page.

    Args:
        page: the tab.
        url: URL of the server, without a slash at the end.
        watcher: watcher of its context.
    """

    def __init__(self, page: Page, url: str, watcher: Watcher):
        self.page, self.url, self.watcher = page, url, watcher
        page.set_default_timeout(PATIENCE_MS)

    def open(self, fragment: str = "") -> ChatPage:
        self.page.goto(f"{self.url}/{fragment}")
        return self

    def another_tab(self) -> ChatPage:
        """Return a second tab of the same browser, with the same stored conversations."""
        return ChatPage(self.page.context.new_page(), self.url, self.watcher)

    def allow(self, pattern: str) -> None:
        """Do not count messages that match a regular expression as problems."""
        self.watcher.allowed.append(pattern)

    def find(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def click(self, name: str) -> None:
        """Press the last visible button of this name."""
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def has_button(self, name: str) -> bool:
        return self.page.get_by_role("button", name=name, exact=True).count() > 0

    def wait_model(self, name: str) -> None:
        """Wait until the page has connected to the server."""
        self.find("#model").filter(has_text=name).wait_for()

    def write(self, text: str) -> None:
        self.page.fill("#input", text)

    def send(self, text: str) -> None:
        """Send a message, and do not wait for the answer."""
        self.write(text)
        self.find("#send").click()  # Enter starts a line on a touch screen

    def ask(self, text: str) -> str:
        """Send a message; return the answer."""
        num_answers = self.find(".message.assistant").count()
        self.send(text)
        self.wait_messages(num_answers + 1)
        return self.wait_answer()

    def wait_messages(self, count: int, role: str = "assistant") -> None:
        self.find(f".message.{role}").nth(count - 1).wait_for()

    def wait_answer(self) -> str:
        """Wait until the last answer is complete; return its text."""
        self.find(FINISHED).first.wait_for()
        self.find("#send").wait_for()
        return self.answer

    @property
    def answer(self) -> str:
        """Text of the last answer as it is now, without its reasoning."""
        parts = self.find(".message.assistant").last.locator(".markdown")
        return parts.first.inner_text().strip() if parts.count() else ""

    @property
    def remark(self) -> str:
        """Remark or error below the last answer."""
        return " ".join(self.find(".message.assistant").last.locator(".remark, .footer .error").all_inner_texts())

    def wait_text(self, text: str, selector: str = "body") -> None:
        """Wait until an element contains a text."""
        self.find(selector).filter(has_text=text).first.wait_for()

    def run(self, script: str, argument: Any = None) -> Any:
        """Return the value of JavaScript in the page."""
        return self.page.evaluate(script, argument)

    def wait_true(self, script: str, argument: Any = None) -> None:
        """Wait until a JavaScript function returns a true value."""
        self.page.wait_for_function(script, arg=argument)
