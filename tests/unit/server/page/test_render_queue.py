"""The queue of texts to render: one client does not stall another, and hostile texts reach a time limit."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import anyio
import pytest

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.page import render_queue
from kimi_mlx.server.page.render_queue import MAX_WAITING, SHORT_TEXT_CHARS, RenderQueue

# the pipes of a killed worker process are closed with its object
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_processes() -> Iterator[None]:
    """Delete the objects of killed processes here, where their warnings are expected, and not in a later test."""
    yield
    gc.collect()


HOSTILE = "![" * 4 * SHORT_TEXT_CHARS


TABLE = "|a" * 100 + "\n" + "|-" * 100 + "\n" + "|\r" * 400
"""A short text that becomes 40,000 cells."""

SLOW_CODE = "```java\n" + "\n" * (SHORT_TEXT_CHARS - 20) + "```"


@pytest.mark.parametrize(
    "text",
    [HOSTILE, *(pytest.param(text, marks=pytest.mark.slow) for text in (TABLE, SLOW_CODE))],
    ids=["brackets", "table", "code"],
)
def test_a_text_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """It is rendered in another process, which ends."""
    monkeypatch.setattr(render_queue, "LIMIT_S", 0.01)

    async def run() -> None:
        with pytest.raises(ApiError, match="takes more than"):
            await RenderQueue().render("a", text, is_final=True)

    anyio.run(run)


def test_a_client_with_many_texts_does_not_stall_another() -> None:
    async def run() -> None:
        queue = RenderQueue()
        refused: list[ApiError] = []

        async def render_hostile() -> None:
            try:
                await queue.render("hostile", HOSTILE, is_final=True)
            except ApiError as error:
                refused.append(error)

        async with anyio.create_task_group() as group:
            for _ in range(MAX_WAITING + 1):
                group.start_soon(render_hostile)
            await anyio.sleep(0.1)
            assert [error.status for error in refused] == [429]
            long_text = "word\n\n" * (SHORT_TEXT_CHARS // 4)  # rendered in a process, too
            assert await queue.render("other", long_text, is_final=True)
            group.cancel_scope.cancel()

    anyio.run(run)
