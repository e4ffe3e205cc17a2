"""What the page says when something is wrong: keys, a full queue, a lost rank, a server that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import closing

import httpx2
import pytest

from kimi_mlx.engine.events import Event, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import EventCallback, Session, SessionOptions
from tests.browser.conftest import OpenPage
from tests.browser.servers import free_port, slow_down, start_server, start_slow_server
from tests.fakes import KIMI_MINI
from tests.server.running_server import RunningServer, serving

pytestmark = pytest.mark.browser


@pytest.mark.slow
def test_a_wrong_key_then_the_right_one(session: Session, open_page: OpenPage) -> None:
    with serving(session, ServingOptions(Security(keys=("secret",)))) as server:
        chat = open_page(server.url)
        chat.allow("status of 401")
        chat.wait_text("needs one of the API keys", "#dialog")
        for key in ("wrong", "\u5bc6\u94a5", "copied\u2026"):  # no header can have the last ones
            chat.page.fill("#key-input", key)
            chat.page.press("#key-input", "Enter")
            chat.wait_text("rejects this key", "#dialog")
        chat.page.fill("#key-input", "secret")
        chat.click("Use")
        chat.wait_model("kimi-mini")
        assert "kimi-mini" in chat.ask("What are you?")
        chat.page.reload()  # the key is kept
        chat.wait_model("kimi-mini")
        assert not chat.find("#dialog").is_visible()
        assert chat.run("() => Object.keys(localStorage).length + document.cookie.length") == 0
        another = chat.another_tab().open()  # but for this tab only
        another.wait_text("needs one of the API keys", "#dialog")
        another.click("Cancel")
        another.wait_text("needs one of the API keys", "#banner")
        another.send("What are you?")  # it is sent once the key is right
        another.page.fill("#key-input", "secret")
        another.click("Use")
        assert "kimi-mini" in another.wait_answer()
        assert another.find(".message.assistant h2").inner_text() == "kimi-mini"


@pytest.mark.slow
def test_a_full_queue(session: Session, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, session, 0.01)
    with serving(session, ServingOptions(max_queue=1)) as server:
        chat = open_page(server.url)
        chat.allow("status of 429")
        chat.wait_model("kimi-mini")
        body = {"messages": [{"role": "user", "content": "What are you?"}], "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()  # a generator that ends closes the response
            next(lines)
            server.server.service._queue.waiting = 1  # as if another one waited
            chat.send("Me too.")
            chat.wait_answer()
            assert "queue is full" in chat.remark
            assert "Try again in" in chat.remark
            server.server.service._queue.waiting = 0
        server.wait_idle()
        chat.click("Retry")
        chat.wait_text("2 of 2", ".versions")
        assert chat.wait_answer()


@pytest.mark.slow
@pytest.mark.ranks
def test_a_lost_rank(open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(RingSession(SessionOptions(KIMI_MINI, ranks=2))) as session, serving(session, ranks=2) as server:
        chat = open_page(server.url)
        whole = chat.ask("What are you?")
        kill_rank_in_mid_answer(session, monkeypatch)
        chat.send("What are you?")
        chat.wait_text("The answer continues once the ring is back.", ".notice")
        assert "rank 1" in chat.find(".notice").inner_text()
        assert chat.wait_answer().startswith(whole[:10])
        assert chat.remark == ""
        assert chat.find(".notice").count() == 0
        chat.find("#to-cluster").click()
        chat.wait_text("rank 1", "#cluster-view")


def kill_rank_in_mid_answer(session: RingSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill rank 1 after the third token of the next answer."""
    submit, lost = session.submit, session.pids[1]

    def submit_and_kill(request: Request, on_event: EventCallback) -> int:
        num_tokens = 0

        def on_event_then_kill(event: Event | BaseException) -> None:
            nonlocal num_tokens
            on_event(event)
            num_tokens += isinstance(event, Token)
            if num_tokens == 3 and isinstance(event, Token):
                os.kill(lost, signal.SIGKILL)

        return submit(request, on_event_then_kill)

    monkeypatch.setattr(session, "submit", submit_and_kill)


@pytest.mark.slow
def test_a_server_that_is_killed_and_back(open_page: OpenPage) -> None:
    port = free_port()
    process = start_server(port)
    chat = open_page(f"http://127.0.0.1:{port}")
    answer = chat.ask("What are you?")
    process.kill()
    process.wait()
    chat.send("Are you there?")
    chat.wait_text("Cannot reach the server", "#banner")
    chat.wait_messages(2)
    chat.wait_answer()
    assert "connection was lost" in chat.remark
    chat.find("#to-cluster").click()
    assert "Unreachable" in chat.find("#cluster-view section").first.inner_text()
    chat.find("#to-chat").click()
    chat.wait_messages(2)
    assert chat.find(".message.assistant .markdown").first.inner_text().strip() == answer
    start_server(port)
    chat.wait_text("The server is back", "#banner")
    chat.click("Retry")
    chat.wait_text("2 of 2", ".versions")
    assert chat.wait_answer()


@pytest.mark.slow
def test_an_answer_continues_after_its_server_was_killed(open_page: OpenPage) -> None:
    """Without a click, and with the same text as without the loss, because it is greedy."""
    port = free_port()
    process = start_server(port)
    chat = open_page(f"http://127.0.0.1:{port}")
    chat.click("Settings")
    chat.page.get_by_label("Temperature").fill("0")
    chat.click("Save")
    whole = chat.ask("What are you?")
    end(process)
    process = start_slow_server(port)
    chat.wait_text("The server is back", "#banner")
    chat.click("Retry")
    chat.find("#stop").wait_for()
    chat.wait_text("I am kimi-mini", ".message.assistant .markdown")
    end(process)
    chat.wait_text("continues once the server is back", ".notice")
    partial = chat.answer
    assert whole.startswith(partial)
    assert partial != whole
    start_server(port)
    assert chat.wait_answer() == whole
    assert chat.remark == ""
    chat.page.reload()
    assert chat.wait_answer() == whole


@pytest.mark.sweep
def test_an_answer_continues_after_its_server_was_restarted(
    session: Session, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is stopped says so to the page."""
    port = free_port()
    slow_down(monkeypatch, session, 0.1)
    with serving(session, port=port) as server:
        chat = open_page(server.url)
        chat.send("What are you?")
        chat.wait_text("I am kimi-mini", ".markdown")
    chat.wait_text("continues once the server is back", ".notice")
    partial = chat.answer
    with serving(session, port=port):
        answer = chat.wait_answer()
        assert answer.startswith(partial)
        assert len(answer) > len(partial)
        assert chat.remark == ""
        chat.page.close()


@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_answer(open_page: OpenPage) -> None:
    """Stop keeps what has come. Without it, an answer that keeps to a schema starts again once the server is back."""
    port = free_port()
    process = start_slow_server(port)
    chat = open_page(f"http://127.0.0.1:{port}")
    chat.click("Settings")
    chat.page.get_by_label("JSON schema").fill('{"type": "string", "minLength": 4000}')
    chat.click("Save")
    chat.send("Write much.")
    chat.find(".markdown .code").wait_for()
    end(process)
    chat.wait_text("continues once the server is back", ".notice")
    chat.click("Stop")
    chat.wait_answer()
    assert "stopped" in chat.remark
    assert not chat.has_button("Continue")  # a schema cannot be continued
    partial = chat.answer
    assert partial
    process = start_slow_server(port)
    chat.wait_text("The server is back", "#banner")
    chat.page.reload()
    assert json_of(chat.wait_answer()) == json_of(partial)  # plain text while the server was gone
    chat.click("Retry")
    chat.find("#stop").wait_for()
    chat.find(".markdown .code").wait_for()
    end(process)
    chat.wait_text("continues once the server is back", ".notice")
    chat.run("""() => { window.notices = []; new MutationObserver(() => {
      const notice = document.querySelector('.notice')?.textContent;
      if (notice) window.notices.push(notice);
    }).observe(document.getElementById('log'), { childList: true, subtree: true }); }""")
    start_server(port)
    chat.wait_true("() => window.notices.some((notice) => notice.includes('starts again'))")
    chat.find(".markdown .code").wait_for()
    chat.click("Stop")
    chat.wait_answer()
    assert "stopped" in chat.remark


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def json_of(answer: str) -> list[str]:
    """Return the words of an answer that is shown as code, or plain."""
    return answer.removeprefix("json").strip("`\n").removeprefix("json").strip().removeprefix("Copy code").split()


@pytest.mark.slow
def test_a_broken_answer_of_the_server(running: RunningServer, open_page: OpenPage) -> None:
    """The reason of the server is shown."""
    chat = open_page(running.url)
    chat.allow("status of 400")
    chat.click("Settings")
    chat.page.get_by_label("JSON schema").fill('{"type": "nonsense"}')
    chat.click("Save")
    chat.send("Hello")
    chat.wait_answer()
    assert "The server rejected the request" in chat.remark
    assert "nonsense" in chat.remark


FULL_DISK = """() => {
  const put = IDBObjectStore.prototype.put;
  IDBObjectStore.prototype.put = function (value) {
    const request = put.call(this, value);
    request.addEventListener('success', () => this.transaction.abort());
    return request;
  };
}"""


@pytest.mark.slow
def test_a_browser_that_cannot_save(running: RunningServer, open_page: OpenPage) -> None:
    """The user is told, and the chat goes on."""
    chat = open_page(running.url)
    chat.wait_model("kimi-mini")
    chat.run(FULL_DISK)
    assert "kimi-mini" in chat.ask("What are you?")
    chat.wait_text("cannot save", "#banner")
    chat.ask("And now?")
    assert chat.find(".message").count() == 4


@pytest.mark.sweep
@pytest.mark.parametrize(
    "answer", ["throw new DOMException('', 'SecurityError')", "return {}"], ids=["refused", "silent"]
)
def test_a_browser_without_storage(running: RunningServer, open_page: OpenPage, answer: str) -> None:
    chat = open_page(running.url)
    chat.page.add_init_script(f"IDBFactory.prototype.open = () => {{ {answer} }}")
    chat.page.reload()
    assert "kimi-mini" in chat.ask("What are you?")
    chat.click("New conversation")
    chat.find(".empty").wait_for()
    assert not chat.run("async () => (await import('/page/store.js')).isPersistent")
