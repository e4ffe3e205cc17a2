"""Dialogs: one that opens over another replaces it, and keeps what it shows."""

from __future__ import annotations

import pytest

from tests.browser.conftest import OpenPage
from tests.server.running_server import RunningServer

pytestmark = pytest.mark.browser

ASK_TWICE = """async () => {
  const { ask, cancelButton, isDialogOpen } = await import(new URL('page/dialog.js', location.href));
  window.isDialogOpen = isDialogOpen;
  window.first = ask('First', [], [cancelButton()]);
  window.second = ask('Second', [], [cancelButton(), { label: 'Done', value: 'done', kind: 'primary' }]);
  const first = await window.first;
  await new Promise((resolve) => setTimeout(resolve, 100)); // events of the first one come late
  return first;
}"""


@pytest.mark.slow
def test_a_dialog_over_another(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.wait_model("kimi-mini")
    for close, value in (("Enter", "done"), ("Escape", None)):
        assert chat.run(ASK_TWICE) is None
        assert chat.find("dialog").all_inner_texts() == ["Second\nCancel\nDone"]
        assert chat.run("() => isDialogOpen()")
        chat.page.get_by_role("button", name="Done").focus()
        chat.page.keyboard.press(close)
        assert chat.run("() => second") == value
        assert chat.find("dialog").count() == 0
        assert not chat.run("() => isDialogOpen()")
