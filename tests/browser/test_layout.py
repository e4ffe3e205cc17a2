"""Widths, colours, languages, keyboard and accessibility."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.chat_page import ChatPage
from tests.browser.conftest import OpenPage
from tests.browser.servers import answering
from tests.browser.test_chat import MARKDOWN
from tests.server.running_server import RunningServer

pytestmark = pytest.mark.browser

WIDE = f"""{MARKDOWN}

| {" | ".join(f"column {number}" for number in range(20))} |
| {" | ".join("-" for number in range(20))} |
| {" | ".join("value" for number in range(20))} |

{"averyverylongword" * 20}

```
{"a line of code that does not end " * 10}
```

https://example.com/{"path/" * 60}
"""

OUTSIDE = """() => [...document.querySelectorAll('body *')].filter((node) => {
  if (!node.checkVisibility({checkVisibilityCSS: true}) || node.closest('.hidden-text, .skip, svg')) return false;
  for (let parent = node.parentElement; parent; parent = parent.parentElement)
    if (/auto|scroll|hidden/.test(getComputedStyle(parent).overflowX) && parent !== document.body) return false;
  const {left, right, width} = node.getBoundingClientRect();
  return width > 0 && (left < -1 || right > innerWidth + 1);
}).map((node) => node.outerHTML.slice(0, 120))"""


def check_fits(chat: ChatPage) -> None:
    """Check that nothing lies outside the window, and that the window does not scroll sideways."""
    chat.wait_true("() => !document.getAnimations().length")
    assert chat.run("() => document.scrollingElement.scrollWidth <= innerWidth")
    assert chat.run("() => document.querySelector('#log').scrollWidth <= document.querySelector('#log').clientWidth")
    assert chat.run("() => document.querySelector('#cluster-view').scrollWidth <= innerWidth")
    assert chat.run(OUTSIDE) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 360, 768, 3840])
def test_everything_fits_the_window(open_page: OpenPage, width: int) -> None:
    with answering(WIDE, WIDE) as server:
        chat = open_page(server.url, viewport={"width": width, "height": min(width * 2, 2160)})
        check_fits(chat)
        chat.ask(WIDE)
        check_fits(chat)
        chat.find("details summary").click()
        check_fits(chat)
        assert chat.find("#send").is_visible()
        if width < 700:
            chat.click("Conversations")
            chat.find("#new").wait_for()
            check_fits(chat)
            chat.page.keyboard.press("Escape")
            chat.find("#new").wait_for(state="hidden")
        chat.click("Settings")
        check_fits(chat)
        chat.click("Cancel")
        chat.find("#to-cluster").click()
        chat.find("#cluster-view .plot").wait_for()
        check_fits(chat)
        chat.page.goto("about:blank")


def violations(chat: ChatPage) -> list[str]:
    """Return the rules of axe (WCAG and best practice) that the page breaks now, with the elements."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing")
    response: dict[str, Any] = axe.Axe().run(chat.page).response
    return [
        f"{rule['id']}: {node['html'][:150]} {node['failureSummary']}"
        for rule in response["violations"]
        for node in rule["nodes"]
    ]


@pytest.mark.slow
def test_accessibility(open_page: OpenPage) -> None:
    with answering(MARKDOWN, "A thought.") as server:
        chat = open_page(server.url)
        for scheme in ("light", "dark"):
            chat.page.emulate_media(color_scheme=scheme)
            chat.open()
            chat.wait_model("kimi-mini")
            assert violations(chat) == [], scheme
            chat.ask("Show everything.")
            chat.find("details summary").click()
            assert violations(chat) == [], scheme
            chat.click("Settings")
            chat.page.get_by_label("Temperature").fill("9")
            chat.click("Save")
            assert violations(chat) == [], scheme
            chat.click("Cancel")
            chat.find("#to-cluster").click()
            chat.find("#cluster-view .plot").wait_for()
            assert violations(chat) == [], scheme
        chat.page.goto("about:blank")


@pytest.mark.slow
def test_accessibility_on_a_phone(open_page: OpenPage) -> None:
    with answering("word ", tokens_per_s=20, is_endless=True) as server:
        chat = open_page(server.url, viewport={"width": 320, "height": 640}, has_touch=True)
        chat.send("Talk.")
        chat.wait_text("word", ".markdown")
        assert violations(chat) == []
        chat.click("Stop")
        chat.wait_answer()
        chat.click("Edit")
        assert violations(chat) == []
        chat.click("Conversations")
        assert violations(chat) == []
        chat.click("Delete: Talk.")
        assert violations(chat) == []
        chat.click("Cancel")
        chat.page.get_by_role("link", name="Talk.").click()  # the conversation that is open: back to it
        chat.find("body:not(.with-sidebar)").wait_for()


def focused(chat: ChatPage) -> str:
    return chat.run("() => document.activeElement.id || document.activeElement.textContent.slice(0, 30)")


@pytest.mark.slow
def test_the_keyboard_alone(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    keyboard = chat.page.keyboard
    chat.wait_model("kimi-mini")
    assert focused(chat) == "input"
    keyboard.type("What are you?")
    keyboard.press("Shift+Enter")
    keyboard.type("Say it.")
    keyboard.press("Enter")
    chat.wait_messages(1)
    chat.wait_answer()
    assert chat.find(".message.user .plain").inner_text() == "What are you?\nSay it."
    assert focused(chat) == "input"
    reach(chat, "Retry")
    keyboard.press("Enter")
    chat.wait_text("2 of 2", ".versions")
    chat.wait_answer()
    reach(chat, "Edit")
    keyboard.press("Enter")
    keyboard.press("Control+a")
    keyboard.type("Who are you?")
    keyboard.press("Enter")
    chat.wait_text("Who are you?", ".message.user")
    chat.wait_answer()
    reach(chat, "settings")
    keyboard.press("Enter")
    chat.find("#dialog[open]").wait_for()
    for _ in range(30):  # the focus stays inside
        keyboard.press("Tab")
        assert chat.run("() => document.activeElement === document.body || !!document.activeElement.closest('#dialog')")
    keyboard.press("Escape")
    chat.find("#dialog[open]").wait_for(state="hidden")
    assert focused(chat) == "settings"
    reach(chat, "to-cluster")
    keyboard.press("Enter")
    chat.find("#cluster-view .plot").wait_for()
    reach(chat, "to-chat")
    keyboard.press("Enter")
    chat.find("#input").wait_for()


def reach(chat: ChatPage, name: str) -> None:
    """Press Tab until an element with this id or text has the focus, and check that the focus is visible there."""
    for _ in range(60):
        chat.page.keyboard.press("Tab")
        if focused(chat) == name:
            assert chat.run("() => getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"{name} cannot be reached with Tab")


@pytest.mark.slow
def test_reduced_motion(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url, reduced_motion="reduce")
    chat.ask("What are you?")
    assert chat.run("() => document.getAnimations().length") == 0
    moving = """() => [...document.querySelectorAll('*')].filter((node) => {
      const style = getComputedStyle(node);
      return parseFloat(style.transitionDuration) > 0.01 || parseFloat(style.animationDuration) > 0.01;
    }).length"""
    assert chat.run(moving) == 0


@pytest.mark.slow
def test_chinese(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url, locale="zh-CN")
    chat.wait_model("kimi-mini")
    assert chat.run("() => document.documentElement.lang") == "zh-CN"
    assert chat.find("#send").inner_text() == "发送"
    assert "kimi-mini" in chat.ask("你是谁")
    chat.find("#to-cluster").click()
    chat.wait_text("运行中", "#cluster-view")
    shown = chat.find("body").inner_text()
    for word in ("Send", "Settings", "Cluster", "Placement", "Retry", "Rank ", "tokens"):
        assert word not in shown
