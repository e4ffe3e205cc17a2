"""Conversations with the real server: answers, branches, unfinished answers, several tabs."""

from __future__ import annotations

import json

import pytest

from kimi_mlx.session.session import Session
from tests.browser.conftest import OpenPage
from tests.browser.servers import answering, slow_down
from tests.server.running_server import RunningServer

pytestmark = pytest.mark.browser

MARKDOWN = """# Heading

Some *emphasis*, `code` and a [link](https://example.com/a).

| a | b |
| - | -: |
| 1 | 2 |

```python
print("<b>")
```

1. one
2. two
"""


@pytest.mark.slow
def test_a_conversation(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.wait_model("kimi-mini")
    assert "kimi-mini" in chat.ask("What are you?")
    assert "tok/s" in chat.find(".statistics").inner_text()
    assert chat.find("#title").input_value() == "What are you?"
    address = chat.page.url
    chat.ask("What else?")
    chat.write("A draft")
    chat.page.reload()
    chat.wait_messages(2)
    assert chat.find("#input").input_value() == "A draft"
    assert chat.page.url == address
    assert "kimi-mini" in chat.find(".message.assistant").first.inner_text()


@pytest.mark.slow
def test_markdown_and_reasoning(open_page: OpenPage) -> None:
    with answering(MARKDOWN, "A thought with *stars*.", tokens_per_s=200) as server:
        chat = open_page(server.url)
        chat.ask("Show everything.")
        answer = chat.find(".message.assistant")
        assert answer.locator("h1").inner_text() == "Heading"
        assert answer.locator("em").inner_text() == "emphasis"
        assert answer.locator("a").get_attribute("rel") == "noopener noreferrer nofollow"
        assert answer.locator("td").all_inner_texts() == ["1", "2"]
        assert answer.locator("ol li").all_inner_texts() == ["one", "two"]
        assert answer.locator(".code pre").inner_text() == 'print("<b>")\n'
        assert answer.locator(".code .nb").inner_text() == "print"
        assert chat.find("details .reasoning").text_content() == "A thought with *stars*."
        assert chat.find("details").get_attribute("open") is None
        chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        chat.click("Copy code")
        chat.wait_text("Copied", ".code-header")
        assert chat.run("() => navigator.clipboard.readText()") == 'print("<b>")\n'


@pytest.mark.slow
def test_stop(open_page: OpenPage) -> None:
    with answering("More words. ", tokens_per_s=100, is_endless=True) as server:
        chat = open_page(server.url)
        chat.send("Talk.")
        chat.wait_text("More words. More words.", ".markdown")
        chat.click("Stop")
        answer = chat.wait_answer()
        server.wait_idle()
        assert answer.startswith("More words.")
        assert "stopped" in chat.remark
        chat.send("Again.")
        chat.wait_messages(2)
        chat.wait_text("More words.", ".message:last-child .markdown")
        chat.page.keyboard.press("Escape")
        chat.wait_answer()
        server.wait_idle()


@pytest.mark.slow
def test_versions_and_branches(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.ask("What are you?")
    first = chat.ask("How are you?")
    chat.click("Retry")
    chat.wait_text("2 of 2", ".versions")
    chat.wait_answer()
    chat.click("Previous version")
    chat.wait_text("1 of 2", ".versions")
    assert chat.wait_answer() == first
    chat.page.get_by_role("button", name="Edit").first.click()
    chat.page.fill("form.edit textarea", "Who are you?")
    chat.page.press("form.edit textarea", "Enter")
    chat.wait_text("Who are you?", ".message.user")
    chat.wait_answer()
    assert chat.find(".message").count() == 2
    chat.click("Previous version")
    chat.wait_text("What are you?", ".message.user")
    chat.wait_messages(2)
    chat.page.reload()  # the branch that was chosen last is the one that is shown
    chat.wait_messages(2)
    assert chat.find(".message.user").first.locator(".plain").inner_text() == "What are you?"


@pytest.mark.slow
def test_editing_does_not_scroll(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.ask("What are you?")
    chat.ask("And you?")
    height = chat.run("() => document.querySelector('#log').lastChild.getBoundingClientRect().bottom + 120 + 24")
    chat.page.set_viewport_size({"width": 1000, "height": round(height)})  # the conversation just fits
    chat.page.get_by_role("button", name="Edit").first.click()
    chat.find("form.edit textarea").wait_for()
    chat.page.wait_for_timeout(200)  # its height is known
    top, bottom = chat.run(EDGES, "form.edit textarea")
    log_top, log_bottom = chat.run(EDGES, "#log")
    assert log_top <= top < bottom <= log_bottom
    chat.page.press("form.edit textarea", "Enter")
    chat.wait_answer()
    assert chat.run("() => document.activeElement.id") == "input"  # one can go on typing


EDGES = """(selector) => {
  const {top, bottom} = document.querySelector(selector).getBoundingClientRect();
  return [top, bottom];
}"""


@pytest.mark.slow
def test_settings_are_cleared_only_when_saved(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.click("Settings")
    chat.page.get_by_label("Instructions").fill("Be brief.")
    chat.click("Save")
    chat.find("#settings.changed").wait_for()
    for last in ("Cancel", "Save"):
        chat.click("Settings")
        assert chat.page.get_by_label("Instructions").input_value() == "Be brief."
        chat.click("Use defaults")
        assert chat.page.get_by_label("Instructions").input_value() == ""
        chat.click(last)
    chat.find("#settings:not(.changed)").wait_for()


@pytest.mark.slow
def test_reload_in_mid_answer(
    running: RunningServer, session: Session, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = open_page(running.url)
    with monkeypatch.context() as patch:
        slow_down(patch, session, 0.1)
        chat.send("What are you?")
        chat.wait_text("I am kimi-mini", ".markdown")
        chat.page.reload()
        partial = chat.wait_answer()
    running.wait_idle()
    assert partial.startswith("I")  # the words of the last half second may be missing
    assert "unfinished" in chat.remark
    chat.click("Continue")
    chat.wait_text("knowledge", ".markdown")
    whole = chat.wait_answer()
    assert whole.startswith(partial)
    assert chat.remark == ""
    chat.page.reload()
    assert chat.wait_answer() == whole


@pytest.mark.slow
def test_two_tabs(running: RunningServer, open_page: OpenPage) -> None:
    first = open_page(running.url)
    first.ask("What are you?")
    second = first.another_tab().open(first.page.url.removeprefix(f"{running.url}/"))
    second.wait_messages(1)
    second.ask("And who made you?")
    first.wait_messages(2)  # the other tab's message appears
    assert first.wait_answer() == second.wait_answer()
    second.click("New conversation")
    second.ask("Say hello.")
    first.wait_text("Say hello.", "#conversations")
    assert first.find(".message.user").count() == 2  # the conversation that is open stays open


@pytest.mark.slow
def test_answers_in_two_tabs_at_once(open_page: OpenPage) -> None:
    with answering("Word. ", tokens_per_s=100, is_endless=True) as server:
        first = open_page(server.url)
        first.send("One")
        first.wait_text("Word.", ".markdown")
        second = first.another_tab().open(first.page.url.removeprefix(f"{server.url}/"))
        second.wait_messages(1)
        second.wait_text("Word.", ".markdown")  # it streams in the other tab
        second.page.close()
        first.click("Stop")
        first.wait_answer()
        server.wait_idle()


@pytest.mark.slow
def test_what_the_user_writes_is_kept(open_page: OpenPage) -> None:
    """While another tab changes the conversation, and while the cluster is shown."""
    with answering("Word. ", tokens_per_s=50, is_endless=True) as server:
        first = open_page(server.url)
        first.send("One")
        first.wait_text("Word.", ".markdown")
        first.click("Stop")
        first.wait_answer()
        second = first.another_tab().open(first.page.url.removeprefix(f"{server.url}/"))
        second.wait_answer()
        second.click("Edit")
        second.page.fill("form.edit textarea", "Another one")
        first.send("Two")
        first.wait_messages(2)
        first.wait_text("Word.", ".message:last-child .markdown")
        second.page.fill("#title", "Renamed")
        second.page.press("#title", "Tab")
        second.find("#to-cluster").click()
        second.find("#cluster-view").wait_for()
        second.find("#to-chat").click()
        assert second.find("form.edit textarea").input_value() == "Another one"
        first.click("Stop")
        first.wait_answer()
        first.wait_text("Renamed", "#conversations a")  # the end of the answer does not undo it
        second.find("form.edit").get_by_role("button", name="Cancel").click()
        second.find("form.edit").wait_for(state="detached")
        second.wait_text("Two", ".message.user")
        assert second.find(".message.user .plain").all_inner_texts() == ["One", "Two"]


@pytest.mark.slow
def test_the_conversation_that_was_opened_last_is_shown(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    messages = [{"role": "user", "content": "word " * 500}] * 500
    buffer = json.dumps(messages).encode()
    chat.page.set_input_files(
        "#import-file", [{"name": "Large.json", "mimeType": "application/json", "buffer": buffer}]
    )
    chat.wait_text("Large", "#conversations a")
    address = chat.find("#conversations a").get_attribute("href")
    open_both = "(address) => { location.hash = address; setTimeout(() => document.querySelector('#new').click(), 5); }"
    chat.run(open_both, address)
    chat.page.wait_for_timeout(1500)
    assert chat.find(".message").count() == 0
    assert chat.run("() => location.hash") == "#/"


@pytest.mark.sweep
def test_a_clock_that_is_set_back(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.ask("What are you?")
    chat.run("() => { const now = Date.now; Date.now = () => now() - 86_400_000; }")
    chat.click("Retry")
    chat.wait_text("2 of 2", ".versions")
    chat.wait_answer()
