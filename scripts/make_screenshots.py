#!/usr/bin/env python3
"""Take the pictures of docs/web.md: five scenes of the web page in headless Chromium.

scripts/make_screenshots.py            write docs/images/web-*.png

The answers are written in this file, since kimi-mini has little to say; the server, the page and the ring are real.
"""

from __future__ import annotations

import io
import sys
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

from kimi_mlx.session.ring import RingSession  # noqa: E402
from kimi_mlx.session.session import SessionOptions  # noqa: E402
from tests.browser.conftest import CHROMIUM_ARGUMENTS, chromium_path  # noqa: E402
from tests.browser.servers import answering  # noqa: E402
from tests.fakes import KIMI_MINI  # noqa: E402
from tests.server.running_server import serving  # noqa: E402

FOLDER = ROOT / "docs" / "images"
MAX_BYTES = 400_000
NUM_COLORS = 160

QUESTION = "How do I split a number into its prime factors in Python?"
REASONING = "Trial division is enough for numbers of this size. I show it with a short loop, then the costs."
ANSWER = """**Divide by each candidate as long as it fits**, and stop at the square root of what is left:

```python
def prime_factors(n: int) -> list[int]:
    factors, candidate = [], 2
    while candidate * candidate <= n:
        while n % candidate == 0:
            factors.append(candidate)
            n //= candidate
        candidate += 1
    return factors + [n] if n > 1 else factors
```

| number | factors | divisions |
| --- | --- | ---: |
| 84 | 2 · 2 · 3 · 7 | 6 |
| 9,973 | itself, since it is prime | 98 |

For numbers of more than 15 digits, use `sympy.factorint` instead.
"""


def save(page: Page, name: str) -> None:
    """Write what a page shows as a PNG with few colours."""
    page.wait_for_timeout(300)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE)
    image.save(FOLDER / f"web-{name}.png", optimize=True)


def ask(page: Page, question: str) -> None:
    """Send a message, and wait until the answer is complete."""
    page.fill("#input", question)
    page.click("#send")
    page.locator(".message.assistant:last-child .footer button").first.wait_for()


def take_chat(browser: Browser) -> None:
    """A chat on a wide window; the same on a phone in the dark; its settings."""
    with answering(ANSWER, REASONING, tokens_per_s=300) as server:
        page = browser.new_page(locale="en", viewport={"width": 1100, "height": 885})
        page.goto(server.url)
        ask(page, QUESTION)
        save(page, "chat")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Instructions").fill("Answer briefly, with an example.")
        save(page, "settings")
        page.close()
        phone = browser.new_page(
            locale="en", color_scheme="dark", viewport={"width": 390, "height": 760}, has_touch=True, is_mobile=True
        )
        phone.goto(server.url)
        ask(phone, QUESTION)
        save(phone, "phone")
        phone.close()


def take_cluster(browser: Browser) -> None:
    """The cluster of two ranks, and the same on a phone."""
    with closing(RingSession(SessionOptions(KIMI_MINI, ranks=2))) as session, serving(session, ranks=2) as server:
        page = browser.new_page(locale="en", viewport={"width": 1100, "height": 760})
        page.goto(server.url)
        ask(page, "What are you?")
        page.locator("#to-cluster").click()
        page.locator("#cluster-view .plot").wait_for()
        page.wait_for_timeout(6000)  # a status after the answer
        save(page, "cluster")
        page.set_viewport_size({"width": 390, "height": 760})
        page.emulate_media(color_scheme="dark")
        save(page, "cluster-phone")
        page.close()


def main() -> None:
    """Take all pictures."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium_path(), headless=True, args=CHROMIUM_ARGUMENTS)
        take_chat(browser)
        take_cluster(browser)
        browser.close()
    size = sum(path.stat().st_size for path in FOLDER.glob("web-*.png"))
    print(f"{size:,} bytes in {FOLDER}")
    assert size <= MAX_BYTES


if __name__ == "__main__":
    main()
