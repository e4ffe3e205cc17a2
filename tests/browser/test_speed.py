"""Speed and memory of the page. Limits are wide, because the machine may be busy; `pytest -rP` shows the figures."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import OpenPage
from tests.browser.servers import answering, free_port, start_server
from tests.browser.test_chat import MARKDOWN
from tests.server.running_server import RunningServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

FIRST_PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"

MODULES_LOADED = """() => Math.max(...performance.getEntriesByType('resource')
  .filter(({ name }) => name.endsWith('.js')).map(({ responseEnd }) => responseEnd))"""

COUNT_FRAMES = """() => {
  window.frames_seen = [];
  const see = (time) => { window.frames_seen.push(time); requestAnimationFrame(see); };
  requestAnimationFrame(see);
}"""

NUM_TURNS = 200


def report(text: str) -> None:
    print(f"{text} (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")


def test_first_paint(running: RunningServer, open_page: OpenPage) -> None:
    times: dict[str, list[float]] = {"first paint": [], "all modules loaded": []}
    for _ in range(7):
        chat = open_page(running.url)
        chat.wait_model("kimi-mini")
        chat.wait_true(FIRST_PAINT)
        times["first paint"].append(chat.run(FIRST_PAINT))
        times["all modules loaded"].append(chat.run(MODULES_LOADED))
        chat.page.close()
    for name, values in times.items():
        report(f"{name}: median {median(values):.0f} ms, {min(values):.0f} to {max(values):.0f} ms")
        assert median(values) < 3000


@pytest.mark.sweep
def test_frames_while_a_fast_answer_streams(open_page: OpenPage) -> None:
    paragraphs = f"{'A sentence of several common words. ' * 6}\n\n"
    text = (paragraphs + MARKDOWN) * 40
    with answering(text, tokens_per_s=1000) as server:
        chat = open_page(server.url)
        chat.wait_model("kimi-mini")
        chat.run(COUNT_FRAMES)
        chat.send("Quickly.")
        chat.find(".markdown").wait_for()
        started_at = time.monotonic()
        frames_before = chat.run("() => frames_seen.length")
        chat.find("#stop").wait_for(state="hidden")
        seconds = time.monotonic() - started_at
        frames = chat.run("() => frames_seen")[frames_before:]
        num_tokens = int(chat.find(".statistics").inner_text().split()[0].replace(",", ""))
        gaps = sorted(later - earlier for earlier, later in itertools.pairwise(frames))
        rate = len(frames) / seconds
        report(
            f"{num_tokens} tokens in {seconds:.1f} s ({num_tokens / seconds:.0f} tok/s): {rate:.0f} frames/s, "
            f"99 % of gaps below {gaps[int(len(gaps) * 0.99)]:.0f} ms, longest {gaps[-1]:.0f} ms"
        )
        assert rate > 5
        assert chat.find(".markdown h1").count() == 40
        chat.page.close()


def heap_bytes(page: Page) -> int:
    """Return the size of the page's heap after a garbage collection."""
    tools = page.context.new_cdp_session(page)
    tools.send("HeapProfiler.collectGarbage")
    size = tools.send("Runtime.getHeapUsage")["usedSize"]
    tools.detach()
    return size


@pytest.mark.sweep
def test_memory_over_many_turns(open_page: OpenPage) -> None:
    with answering(MARKDOWN, "A thought.") as server:
        chat = open_page(server.url)
        chat.ask("Turn 0")
        sizes, times = [heap_bytes(chat.page)], []
        for turn in range(1, NUM_TURNS):
            started_at = time.monotonic()
            chat.ask(f"Turn {turn}")
            times.append(time.monotonic() - started_at)
            if turn % 50 == 49:
                sizes.append(heap_bytes(chat.page))
        chat.click("New conversation")
        chat.find(".empty").wait_for()
        chat.ask("Another")
        after = heap_bytes(chat.page)
        report(
            f"heap after 1, 50, 100, 150, 200 turns: {', '.join(f'{size / 1e6:.1f}' for size in sizes)} MB; "
            f"in a new conversation {after / 1e6:.1f} MB; "
            f"a turn takes {median(times[:20]):.2f} s at first, {median(times[-20:]):.2f} s at last"
        )
        first, second = sizes[2] - sizes[1], sizes[4] - sizes[3]
        assert second < 2 * first + 2e6  # no faster than the conversation
        assert sizes[-1] < sizes[0] + 50e6
        assert after < sizes[0] + 10e6
        chat.page.close()


def cpu_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.sweep
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's /proc")
def test_cpu_time_of_the_server_with_three_views(open_page: OpenPage) -> None:
    port = free_port()
    process = start_server(port)

    def share(seconds: float = 10) -> float:
        before = cpu_seconds(process.pid)
        time.sleep(seconds)
        return (cpu_seconds(process.pid) - before) / seconds

    alone = share()
    chat = open_page(f"http://127.0.0.1:{port}", "#/cluster")
    pages = [chat, chat.another_tab().open("#/cluster"), chat.another_tab().open("#/cluster")]
    for page in pages:
        page.find("#cluster-view .plot").wait_for()
    watched = share()
    report(f"CPU of the server: {alone:.2%} of a core without pages, {watched:.2%} with three")
    assert watched - alone < 0.2
    for page in pages:
        page.page.close()
